//! Losses over a vocabulary that comes in tiles, against whole rows in float64.

use mlx_quant_engine::running::{RunningDivergence, RunningScore};
use mlx_quant_engine::{Candidates, Device, Labels, Likeliest, Tensor, plain};

use super::{engines, numbers, values};

const TOKENS: usize = 5;
/// No multiple of anything, in uneven tiles.
const VOCABULARY: usize = 331;
const TILES: [usize; 4] = [0, 1, 130, VOCABULARY];

fn all() -> Vec<Device> {
    engines().into_iter().chain([plain()]).collect()
}

/// Logits of all tokens, `[tokens, vocabulary]`.
fn logits(seed: u64) -> Vec<f32> {
    numbers(TOKENS * VOCABULARY, seed).into_iter().map(|value| 4.0 * value).collect()
}

/// Tiles of them, with their first tokens.
fn tiles(logits: &[f32], device: &Device) -> Vec<(usize, Tensor)> {
    let tile = |ends: &[usize]| {
        let rows = logits.chunks_exact(VOCABULARY);
        let own: Vec<f32> = rows.flat_map(|row| row[ends[0]..ends[1]].to_vec()).collect();
        (ends[0], Tensor::from_vec(own, (TOKENS, ends[1] - ends[0]), device).unwrap())
    };
    TILES.windows(2).map(tile).collect()
}

fn lse(row: &[f32], factor: f64) -> f64 {
    row.iter().map(|value| (f64::from(*value) * factor).exp()).sum::<f64>().ln()
}

fn lses(logits: &[f32], factor: f64) -> Vec<f64> {
    logits.chunks_exact(VOCABULARY).map(|row| lse(row, factor)).collect()
}

/// Probabilities of a row.
fn softmax(row: &[f32], factor: f64) -> Vec<f64> {
    let lse = lse(row, factor);
    row.iter().map(|value| (f64::from(*value) * factor - lse).exp()).collect()
}

fn near(found: f64, expected: f64, what: &str, device: &Device) {
    let apart = (found - expected).abs() / (1.0 + expected.abs());
    assert!(apart < 3e-6, "{what} on {}: {found}, {expected}", device.name());
}

/// Each tile's slopes beside those of whole rows.
fn same_slopes(slopes: &[(usize, Tensor)], expected: &[f64], what: &str, device: &Device) {
    for (first, tile) in slopes {
        let width = tile.dims()[1];
        for (token, row) in values(tile).chunks_exact(width).enumerate() {
            let whole = &expected[token * VOCABULARY + first..][..width];
            row.iter().zip(whole).for_each(|(own, whole)| near(f64::from(*own), *whole, what, device));
        }
    }
}

#[test]
fn scores_and_divergences_are_those_of_whole_rows() {
    let (own, reference) = (logits(1), logits(2));
    let targets: Vec<u32> = (0..TOKENS).map(|token| (token * 70) as u32).collect();
    for device in all() {
        let mut scores = vec![RunningScore::default(); TOKENS];
        let mut both = vec![RunningDivergence::default(); TOKENS];
        for ((first, tile), (_, theirs)) in tiles(&own, &device).iter().zip(tiles(&reference, &device)) {
            device.score(tile, *first as u32, &targets, &mut scores).unwrap();
            device.compare(&theirs, tile, *first as u32, &targets, &mut both).unwrap();
        }
        for token in 0..TOKENS {
            let range = token * VOCABULARY..(token + 1) * VOCABULARY;
            let (row, theirs) = (&own[range.clone()], &reference[range]);
            let target = targets[token] as usize;
            near(scores[token].log_sum_exp(), lse(row, 1.0), "log-sum-exp", &device);
            near(scores[token].nll(), lse(row, 1.0) - f64::from(row[target]), "nll", &device);
            let best = (0..VOCABULARY).fold(0, |best, at| if row[at] > row[best] { at } else { best });
            assert_eq!(scores[token].best() as usize, best);
            let (p, q) = (softmax(theirs, 1.0), softmax(row, 1.0));
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            near(both[token].divergence(), kl, "divergence", &device);
            near(both[token].reference.nll(), -p[target].ln(), "nll of the reference", &device);
        }
        let (_, tile) = &tiles(&own, &device)[1];
        assert!(device.score(tile, 0, &[], &mut scores[..2]).is_err(), "another number of tokens");
        assert!(device.compare(tile, &tiles(&own, &device)[2].1, 0, &[], &mut both).is_err());
    }
}

#[test]
fn slopes_of_divergences_are_those_of_whole_rows() {
    let (own, reference, factor, scale) = (logits(3), logits(4), 0.5, 0.25f32);
    let (lse, reference_lse) = (lses(&own, factor), lses(&reference, factor));
    let mut expected = Vec::new();
    let mut divergence = 0.0;
    for (row, theirs) in own.chunks_exact(VOCABULARY).zip(reference.chunks_exact(VOCABULARY)) {
        for (p, q) in softmax(theirs, factor).into_iter().zip(softmax(row, factor)) {
            expected.push((q - p) * f64::from(scale));
            divergence += p * (p / q).ln();
        }
    }
    for device in all() {
        let mut loss = 0.0;
        let mut slopes = Vec::new();
        for ((first, tile), (_, theirs)) in tiles(&own, &device).iter().zip(tiles(&reference, &device)) {
            let lses = (&*reference_lse, &*lse);
            let tile = device.divergence_slopes(&theirs, tile, lses, (factor, scale), &mut loss).unwrap();
            slopes.push((*first, tile));
        }
        near(loss, divergence, "loss", &device);
        same_slopes(&slopes, &expected, "slopes", &device);
    }
}

/// With all tokens among the likeliest it is the divergence; with few, these and the rest.
#[test]
fn the_likeliest_stand_for_the_whole() {
    let (own, reference, factor, scale) = (logits(5), logits(6), 0.7, 0.5f32);
    let lse = lses(&own, factor);
    for (device, kept) in all().into_iter().flat_map(|device| [(device.clone(), 17), (device, VOCABULARY)]) {
        let mut found = vec![Candidates::default(); TOKENS];
        for (first, tile) in tiles(&reference, &device) {
            device.keep_likeliest(&tile, first as u32, kept, &mut found).unwrap();
        }
        let mut tops = Vec::new();
        for (own, row) in found.iter().zip(reference.chunks_exact(VOCABULARY)) {
            let mut order: Vec<u32> = (0..VOCABULARY as u32).collect();
            order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
            order.truncate(kept);
            order.sort_unstable();
            let mut ids: Vec<u32> = own.found.iter().map(|candidate| candidate.1).collect();
            ids.sort_unstable();
            assert_eq!(ids, order);
            let probabilities = softmax(row, factor);
            let logs: Vec<f32> = ids.iter().map(|id| probabilities[*id as usize].ln() as f32).collect();
            tops.push((ids, logs));
        }
        let rest: Vec<f32> = (0..TOKENS).map(|token| 0.1 * token as f32).collect();
        let (mut known, mut loss, mut slopes) = (vec![0.0; TOKENS], 0.0, Vec::new());
        for (first, tile) in tiles(&own, &device) {
            let width = tile.dims()[1];
            let within = |(ids, logs): &'_ (Vec<u32>, Vec<f32>)| {
                let [start, end] =
                    [first, first + width].map(|at| ids.partition_point(|id| (*id as usize) < at));
                (ids[start..end].to_vec(), logs[start..end].to_vec())
            };
            let parts: Vec<(Vec<u32>, Vec<f32>)> = tops.iter().map(within).collect();
            let likeliest: Vec<Likeliest<'_>> =
                parts.iter().map(|(ids, log_probabilities)| Likeliest { ids, log_probabilities }).collect();
            let first = first as u32;
            device.likeliest_probability(&tile, first, &likeliest, (&lse, factor), &mut known).unwrap();
            let (tokens, factors) = ((&*lse, &*rest), (factor, scale));
            let own = device.likeliest_slopes(&tile, first, &likeliest, tokens, factors, &mut loss).unwrap();
            slopes.push((first as usize, own));
        }
        let (mut expected, mut divergence) = (Vec::new(), 0.0);
        for (token, row) in own.chunks_exact(VOCABULARY).enumerate() {
            let (q, (ids, logs)) = (softmax(row, factor), &tops[token]);
            near(known[token], ids.iter().map(|id| q[*id as usize]).sum(), "known", &device);
            for (id, q) in (0..).zip(&q) {
                expected.push(match ids.binary_search(&id) {
                    Ok(at) => {
                        let p = f64::from(logs[at]).exp();
                        divergence += p * (f64::from(logs[at]) - q.ln());
                        (q - p) * f64::from(scale)
                    }
                    Err(_) => q * f64::from(scale * rest[token]),
                });
            }
        }
        near(loss, divergence, "loss", &device);
        same_slopes(&slopes, &expected, "slopes of the likeliest", &device);
        let outside = [Likeliest { ids: &[1000], log_probabilities: &[-1.0] }; TOKENS];
        let (_, tile) = &tiles(&own, &device)[1];
        assert!(device.likeliest_probability(tile, 1, &outside, (&lse, factor), &mut known).is_err());
    }
}

#[test]
fn labels_are_drawn_from_the_distribution() {
    // Flat, so that a draw that is a little off lands elsewhere.
    let own = numbers(TOKENS * VOCABULARY, 7);
    let lse = lses(&own, 1.0);
    let draws = [0.0, 0.25, 0.5, 0.75, 0.999_999_999_999];
    for (device, softcap) in
        all().into_iter().flat_map(|device| [(device.clone(), None), (device, Some(30.0))])
    {
        let mut labels = Labels::new(draws.to_vec());
        let (mut slopes, mut squares) = (Vec::new(), Vec::new());
        for (first, tile) in tiles(&own, &device) {
            let last = first + tile.dims()[1] == VOCABULARY;
            let (own, sums) = device.label_slopes(&tile, &lse, softcap, last, &mut labels).unwrap();
            slopes.push((first, own));
            squares.extend(sums);
        }
        let (mut expected, mut sums) = (Vec::new(), vec![0.0; VOCABULARY]);
        for (row, draw) in own.chunks_exact(VOCABULARY).zip(draws) {
            let p = softmax(row, 1.0);
            let mut passed = 0.0;
            let label = p.iter().position(|p| {
                passed += p;
                passed > draw + 1e-9
            });
            for (at, (p, logit)) in p.iter().zip(row).enumerate() {
                let cap = softcap.map_or(1.0, |cap: f64| 1.0 - (f64::from(*logit) / cap).powi(2));
                sums[at] += p * (1.0 - p) * cap * cap;
                let drawn = Some(at) == label.or(Some(VOCABULARY - 1));
                expected.push(if drawn { p - 1.0 } else { *p });
            }
        }
        same_slopes(&slopes, &expected, "slopes of labels", &device);
        squares.iter().zip(&sums).for_each(|(own, sum)| near(*own, *sum, "squares", &device));
    }
}

/// Rows of several thousand tokens, some of which, and one whole tile, have no probability.
#[test]
fn wide_rows_with_masked_tokens() {
    let (tokens, vocabulary, tile) = (3, 6000, 1500);
    let mut own: Vec<f32> = numbers(tokens * vocabulary, 8).iter().map(|value| 5.0 * value).collect();
    for (at, value) in own.iter_mut().enumerate() {
        if at % 7 == 3 || (2 * tile..3 * tile).contains(&(at % vocabulary)) {
            *value = f32::NEG_INFINITY;
        }
    }
    // Of equals the first.
    (own[700], own[4600]) = (30.0, 30.0);
    let targets = [0, 4610, 2];
    for device in all() {
        let mut scores = vec![RunningScore::default(); tokens];
        let mut both = vec![RunningDivergence::default(); tokens];
        for first in (0..vocabulary).step_by(tile) {
            let rows = own.chunks_exact(vocabulary).flat_map(|row| &row[first..first + tile]);
            let rows = Tensor::from_vec(rows.copied().collect(), (tokens, tile), &device).unwrap();
            device.score(&rows, first as u32, &targets, &mut scores).unwrap();
            device.compare(&rows, &rows, first as u32, &targets, &mut both).unwrap();
        }
        for (token, row) in own.chunks_exact(vocabulary).enumerate() {
            near(scores[token].log_sum_exp(), lse(row, 1.0), "log-sum-exp", &device);
            near(
                scores[token].nll(),
                lse(row, 1.0) - f64::from(row[targets[token] as usize]),
                "nll",
                &device,
            );
            let best = (0..vocabulary).fold(0, |best, at| if row[at] > row[best] { at } else { best });
            assert_eq!(scores[token].best() as usize, best);
            // A model does not diverge from itself.
            assert!(both[token].divergence() == 0.0 && both[token].agrees(), "{}", device.name());
        }
        let nan = Tensor::full(f32::NAN, (tokens, tile), &device).unwrap();
        device.score(&nan, 0, &targets, &mut scores).unwrap();
        assert!(scores.iter().all(|score| score.nll().is_nan()));
    }
}

/// The more of them the later a tile, equals, and fewer in a tile than are kept.
#[test]
fn the_likeliest_of_rows_in_any_order() {
    let (vocabulary, tile) = (1100, 100);
    let rows: [&dyn Fn(usize) -> f32; 4] =
        [&|at| at as f32 * 0.05, &|at| at as f32 * -0.05, &|_| -1.0, &|at| {
            if at % 5 == 0 { -0.0 } else { 0.0 }
        }];
    let all_rows: Vec<Vec<f32>> = rows.iter().map(|row| (0..vocabulary).map(row).collect()).collect();
    for (device, kept) in all().into_iter().flat_map(|device| [(device.clone(), 40), (device, 130)]) {
        let mut found = vec![Candidates::default(); rows.len()];
        for first in (0..vocabulary).step_by(tile) {
            let own = all_rows.iter().flat_map(|row| &row[first..first + tile]).copied().collect();
            let own = Tensor::from_vec(own, (rows.len(), tile), &device).unwrap();
            device.keep_likeliest(&own, first as u32, kept, &mut found).unwrap();
        }
        for (row, own) in all_rows.iter().zip(&mut found) {
            let mut order: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
            order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            order.truncate(kept);
            own.found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            assert_eq!(own.found, order, "{kept} on {}", device.name());
            near(own.score.log_sum_exp(), lse(row, 1.0), "log-sum-exp", &device);
        }
    }
}
