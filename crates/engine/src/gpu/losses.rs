//! Losses over a vocabulary, a tile of it at a time. What comes back is a few numbers a token, fetched once a call; what
//! they are added to is kept in float64 on the processor. Gradients stay on the card.

use std::sync::Arc;

use super::card::Card;
use super::elementary::bytes_of;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::program::{Program, program};
use super::trained::{Squares, squares};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::losses::{Candidates, Labels, Likeliest};
use crate::plain::{check_same, check_tile, place_in_tile, target_of};
use crate::running::{RunningDivergence, RunningScore, TileScore};

static SCORE: Program = program!("score", 3, 1, "lanes");
static DIVERGENCE: Program = program!("divergence", 3, 2, "lanes");
static LIKELIEST: Program = program!("likeliest", 3, 2, "lanes");
static LABELS: Program = program!("labels", 2, 2);
static CANDIDATES: Program = program!("candidates", 2, 1);

/// A number as two of float32, of which the second holds what the first lost.
fn pair(number: f64) -> [f32; 2] {
    let high = number as f32;
    // An infinite one is all in the first.
    let low = if high.is_finite() { (number - f64::from(high)) as f32 } else { 0.0 };
    [high, low]
}

fn words(names: &[(&'static str, bool)]) -> Vec<(&'static str, String)> {
    names.iter().map(|(name, holds)| (*name, u8::from(*holds).to_string())).collect()
}

/// Numbers of a tile's scores, for each token, as bits: of a model alone, or of a model beside a reference.
struct Scores {
    memory: Memory,
    /// Of a token.
    numbers: usize,
    first: u32,
}

impl Scores {
    fn launch(
        card: &Arc<Card>,
        model: &Tensor,
        reference: Option<&Tensor>,
        (rows, width): (usize, usize),
        first: u32,
        targets: &[u32],
    ) -> Result<Self> {
        let numbers = if reference.is_some() { 9 } else { 4 };
        let memory = card.room(rows * numbers)?;
        let model = Slice::of(model)?;
        let reference_slice = reference.map_or(Ok(model), Slice::of)?;
        let list: Vec<u32> = (0..rows).map(|token| target_of(targets, token)).collect();
        let list = if targets.is_empty() { None } else { Some(card.put(bytes_of(&list))?) };
        let mut words = words(&[("BOTH", reference.is_some()), ("TARGETS", list.is_some())]);
        words.push(("MODELS", if reference.is_some() { "2" } else { "1" }.to_owned()));
        words.push(("NUMBERS", numbers.to_string()));
        for own in row_parts(card, rows, width) {
            let (at, count) = (own.start * width, own.len() * width);
            let model = model.part(at, count);
            let out = Slice::all(&memory, rows * numbers);
            card.launch(&Launch {
                program: &SCORE,
                words: &words,
                slices: &[
                    model,
                    reference_slice.part(at, count),
                    list.as_ref().map_or(model, |list| Slice::all(list, rows).part(own.start, own.len())),
                    out.part(own.start * numbers, own.len() * numbers),
                ],
                numbers: &[own.len() as u32, width as u32, first, f32::NEG_INFINITY.to_bits()],
                groups: card.groups_for(own.len()),
                work: 20 * count as u64,
            })?;
        }
        Ok(Self { memory, numbers, first })
    }

    /// Of the model, or of the reference, from a token's numbers.
    fn score(&self, numbers: &[f32], model: usize, width: usize, target: u32) -> TileScore {
        let own = &numbers[4 * model..];
        let here = target.checked_sub(self.first).is_some_and(|at| (at as usize) < width);
        TileScore {
            largest: own[0],
            sum: f64::from(own[1]),
            best: self.first.saturating_add(own[2].to_bits()),
            target: here.then_some(own[3]),
        }
    }
}

pub(super) fn score(
    card: &Arc<Card>,
    logits: &Tensor,
    first: u32,
    targets: &[u32],
    running: &mut [RunningScore],
) -> Result<()> {
    let (rows, width) = (running.len(), check_tile(logits, running.len(), "score")?);
    let scores = Scores::launch(card, logits, None, (rows, width), first, targets)?;
    card.get(&scores.memory, 0, rows * scores.numbers, &mut |all| {
        let tokens = running.iter_mut().zip(all.chunks_exact(scores.numbers)).enumerate();
        for (token, (running, numbers)) in tokens {
            running.join(scores.score(numbers, 0, width, target_of(targets, token)));
        }
    })
}

pub(super) fn compare(
    card: &Arc<Card>,
    reference: &Tensor,
    logits: &Tensor,
    first: u32,
    targets: &[u32],
    running: &mut [RunningDivergence],
) -> Result<()> {
    let (rows, width) = (running.len(), check_tile(logits, running.len(), "compare")?);
    check_same(reference, logits, "compare")?;
    let scores = Scores::launch(card, logits, Some(reference), (rows, width), first, targets)?;
    card.get(&scores.memory, 0, rows * scores.numbers, &mut |all| {
        let tokens = running.iter_mut().zip(all.chunks_exact(scores.numbers)).enumerate();
        for (token, (running, numbers)) in tokens {
            let of = |model| scores.score(numbers, model, width, target_of(targets, token));
            running.join(of(1), of(0), f64::from(numbers[8]));
        }
    })
}

/// The key of a number in the order of [`f32::total_cmp`], as in the kernels.
fn key(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

pub(super) fn keep_likeliest(
    card: &Arc<Card>,
    logits: &Tensor,
    first: u32,
    kept: usize,
    candidates: &mut [Candidates],
) -> Result<()> {
    let (rows, width) = (candidates.len(), check_tile(logits, candidates.len(), "likeliest tokens")?);
    let scores = Scores::launch(card, logits, None, (rows, width), first, &[])?;
    // Where as many are kept already, only what is likelier than the last of them is of use.
    let least = |own: &Candidates| match own.found.get(kept.max(1) - 1) {
        Some(last) => key(last.0).saturating_add(1),
        None => 0,
    };
    let leasts: Vec<u32> = candidates.iter().map(least).collect();
    let select = kept < width && leasts.contains(&0);
    let (leasts, x) = (card.put(bytes_of(&leasts))?, Slice::of(logits)?);
    for own in row_parts(card, rows, 2 * width + 3) {
        let (count, head) = (own.len() * width, 1 + 2 * own.len());
        let (before, all) = (own.len() * scores.numbers, head + 2 * count);
        // Scores first, so that all is fetched at once.
        let out = card.room(before + all)?;
        let bytes = |numbers: usize| 4 * numbers as u64;
        let from = bytes(own.start * scores.numbers);
        card.copy(scores.memory.buffer()?, from, out.buffer()?, 0, bytes(before))?;
        card.clear_some(out.buffer()?, bytes(before), Some(4));
        card.launch(&Launch {
            program: &CANDIDATES,
            words: &words(&[("SELECT", select)]),
            slices: &[
                x.part(own.start * width, count),
                Slice::all(&leasts, rows).part(own.start, own.len()),
                Slice::all(&out, before + all).part(before, all),
            ],
            numbers: &[own.len() as u32, width as u32, first, kept.min(width) as u32],
            groups: card.groups_for(own.len()),
            work: (if select { 70 } else { 6 }) * count as u64,
        })?;
        // A first tile may bring all that are kept; a later one the fewer the more came before, and this is twice as many.
        let part = 2.0 * width as f64 / (first as usize + width) as f64;
        let expected = ((own.len() * kept.min(width)) as f64 * part.min(1.0)) as usize;
        let mut numbers: Vec<f32> = Vec::new();
        let mut fetch = |end: usize| {
            let begin = numbers.len();
            card.get(&out, begin, end.saturating_sub(begin), &mut |found| numbers.extend(found))?;
            Ok(before + head + 2 * numbers[before].to_bits() as usize)
        };
        let wanted = fetch((before + head + 2 * expected).min(before + all))?;
        fetch(wanted)?;
        let (of_scores, found) = numbers.split_at(before);
        for (row, own) in candidates[own].iter_mut().enumerate() {
            let [begin, count] = [1, 2].map(|at| found[at + 2 * row].to_bits() as usize);
            let begin = head + 2 * begin;
            let Some(found) = found.get(begin..begin + 2 * count) else {
                bail!("{} miscounts likeliest tokens; hint: another driver, or cpu", card.adapter.name)
            };
            let found = found.chunks_exact(2).map(|own| (own[0], own[1].to_bits()));
            let mut found: Vec<(f32, u32)> = found.collect();
            // A workgroup's threads leave them in any order.
            found.sort_unstable_by_key(|own| own.1);
            own.found.extend(found);
            own.prune(kept);
            let of = &of_scores[row * scores.numbers..][..scores.numbers];
            own.score.join(scores.score(of, 0, width, u32::MAX));
        }
    }
    Ok(())
}

pub(super) fn label_slopes(
    card: &Arc<Card>,
    logits: &Tensor,
    lse: &[f64],
    softcap: Option<f64>,
    last: bool,
    labels: &mut Labels,
) -> Result<(Tensor, Vec<f64>)> {
    let rows = lse.len().min(labels.draws.len());
    let width = check_tile(logits, rows, "labels")?;
    let token = |token: usize| {
        let ([lse, low], open) = (pair(lse[token]), f32::from(u8::from(!labels.chosen[token])));
        let [left, left_low] = pair(labels.draws[token] - labels.passed[token]);
        [lse, low, left, left_low, open]
    };
    let tokens: Vec<f32> = (0..rows).flat_map(token).collect();
    let tokens = card.put(bytemuck::cast_slice(&tokens))?;
    let (x, out) = (Slice::of(logits)?, card.room(rows * width)?);
    // Squares and sums are fetched together.
    let sums = card.room(2 * width + 3 * rows)?;
    let all = Slice::all(&sums, 2 * width + 3 * rows);
    for own in row_parts(card, rows, width) {
        let (at, count) = (own.start * width, own.len() * width);
        card.launch(&Launch {
            program: &LABELS,
            words: &[],
            slices: &[
                x.part(at, count),
                Slice::all(&tokens, 5 * rows).part(5 * own.start, 5 * own.len()),
                Slice::all(&out, rows * width).part(at, count),
                all.part(2 * width + 3 * own.start, 3 * own.len()),
            ],
            numbers: &[own.len() as u32, width as u32, u32::from(last), 0],
            groups: card.groups_for(own.len()),
            work: 40 * count as u64,
        })?;
    }
    let what = Squares::Slopes { tokens: Slice::all(&tokens, 5 * rows), softcap };
    squares(card, x, width, what, all.part(0, 2 * width), false)?;
    let mut squares = Vec::new();
    card.get(&sums, 0, 2 * width + 3 * rows, &mut |numbers| {
        let (all, sums) = numbers.split_at(2 * width);
        let (first, second) = all.split_at(width);
        squares
            .extend(first.iter().zip(second).map(|(first, second)| f64::from(*first) + f64::from(*second)));
        for (token, own) in sums.chunks_exact(3).enumerate() {
            labels.passed[token] += f64::from(own[0]) + f64::from(own[1]);
            labels.chosen[token] |= own[2] != 0.0;
        }
    })?;
    Ok((tensor(out, logits.dims(), logits), squares))
}

pub(super) fn divergence_slopes(
    card: &Arc<Card>,
    reference: &Tensor,
    logits: &Tensor,
    (reference_lse, lse): (&[f64], &[f64]),
    (factor, scale): (f64, f32),
    loss: &mut f64,
) -> Result<Tensor> {
    let rows = lse.len().min(reference_lse.len());
    let width = check_tile(logits, rows, "divergence")?;
    check_same(reference, logits, "divergence")?;
    let token = |(theirs, own): (&f64, &f64)| {
        let ([own_high, own_low], [high, low]) = (pair(*own), pair(*theirs));
        [own_high, own_low, high, low, (theirs - own) as f32]
    };
    let tokens: Vec<f32> = reference_lse.iter().zip(lse).flat_map(token).collect();
    let tokens = card.put(bytemuck::cast_slice(&tokens))?;
    let (x, y) = (Slice::of(logits)?, Slice::of(reference)?);
    let (out, sums) = (card.room(rows * width)?, card.room(rows)?);
    for own in row_parts(card, rows, width) {
        let (at, count) = (own.start * width, own.len() * width);
        card.launch(&Launch {
            program: &DIVERGENCE,
            words: &[],
            slices: &[
                x.part(at, count),
                y.part(at, count),
                Slice::all(&tokens, 5 * rows).part(5 * own.start, 5 * own.len()),
                Slice::all(&out, rows * width).part(at, count),
                Slice::all(&sums, rows).part(own.start, own.len()),
            ],
            numbers: &[own.len() as u32, width as u32, (factor as f32).to_bits(), scale.to_bits()],
            groups: card.groups_for(own.len()),
            work: 40 * count as u64,
        })?;
    }
    card.get(&sums, 0, rows, &mut |sums| *loss += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>())?;
    Ok(tensor(out, logits.dims(), logits))
}

/// A teacher's likeliest tokens beside a tile, on the card.
struct Listed<'l> {
    logits: Slice<'l>,
    rows: usize,
    width: usize,
    first: u32,
    /// Where each row's begin, then tokens, then log probabilities.
    list: Memory,
    count: usize,
    /// Three numbers a row.
    tokens: Memory,
}

impl<'l> Listed<'l> {
    fn new(
        card: &Arc<Card>,
        logits: &'l Tensor,
        (first, width): (u32, usize),
        likeliest: &[Likeliest<'_>],
        (lse, rest): (&[f64], &[f32]),
    ) -> Result<Self> {
        let rows = logits.dim(0)?;
        let (mut starts, mut ids, mut logs) = (vec![0u32], Vec::new(), Vec::new());
        for own in &likeliest[..rows] {
            for (id, log) in own.ids.iter().zip(own.log_probabilities) {
                place_in_tile(*id, first, width)?;
                ids.push(*id);
                logs.push(log.to_bits());
            }
            starts.push(ids.len() as u32);
        }
        let token = |token: usize| {
            let [high, low] = pair(lse[token]);
            [high, low, rest.get(token).copied().unwrap_or(0.0)]
        };
        let tokens: Vec<f32> = (0..rows).flat_map(token).collect();
        Ok(Self {
            logits: Slice::of(logits)?,
            rows,
            width,
            first,
            count: ids.len(),
            list: card.put(bytes_of(&[starts, ids, logs].concat()))?,
            tokens: card.put(bytemuck::cast_slice(&tokens))?,
        })
    }

    /// A number a row. Gradients go to `slopes` where they are asked for.
    fn run(&self, card: &Arc<Card>, (factor, scale): (f64, f32), slopes: Option<&Memory>) -> Result<Memory> {
        let &Self { rows, width, count, .. } = self;
        let sums = card.room(rows)?;
        let spare = card.room(1)?;
        for own in row_parts(card, rows, width) {
            let (at, length) = (own.start * width, own.len() * width);
            let places = [own.start, rows + 1, rows + 1 + count].map(|place| place as u32);
            let numbers = [own.len() as u32, width as u32, self.first];
            card.launch(&Launch {
                program: &LIKELIEST,
                words: &words(&[("SLOPES", slopes.is_some())]),
                slices: &[
                    self.logits.part(at, length),
                    Slice::all(&self.tokens, 3 * rows).part(3 * own.start, 3 * own.len()),
                    Slice::all(&self.list, rows + 1 + 2 * count),
                    slopes.map_or(Slice::all(&spare, 1), |slopes| {
                        Slice::all(slopes, rows * width).part(at, length)
                    }),
                    Slice::all(&sums, rows).part(own.start, own.len()),
                ],
                numbers: &[&numbers[..], &places, &[(factor as f32).to_bits(), scale.to_bits()]].concat(),
                groups: card.groups_for(own.len()),
                work: 20 * length as u64,
            })?;
        }
        Ok(sums)
    }
}

pub(super) fn likeliest_slopes(
    card: &Arc<Card>,
    logits: &Tensor,
    first: u32,
    likeliest: &[Likeliest<'_>],
    (lse, rest): (&[f64], &[f32]),
    factors: (f64, f32),
    loss: &mut f64,
) -> Result<Tensor> {
    let width = check_tile(logits, lse.len().min(rest.len()).min(likeliest.len()), "divergence")?;
    let listed = Listed::new(card, logits, (first, width), likeliest, (lse, rest))?;
    let out = card.room(listed.rows * width)?;
    let sums = listed.run(card, factors, Some(&out))?;
    card.get(&sums, 0, listed.rows, &mut |sums| {
        *loss += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>();
    })?;
    Ok(tensor(out, logits.dims(), logits))
}

pub(super) fn likeliest_probability(
    card: &Arc<Card>,
    logits: &Tensor,
    first: u32,
    likeliest: &[Likeliest<'_>],
    (lse, factor): (&[f64], f64),
    known: &mut [f64],
) -> Result<()> {
    let width = check_tile(logits, lse.len().min(known.len()).min(likeliest.len()), "likeliest tokens")?;
    let listed = Listed::new(card, logits, (first, width), likeliest, (lse, &[]))?;
    let sums = listed.run(card, (factor, 1.0), None)?;
    card.get(&sums, 0, listed.rows, &mut |sums| {
        known.iter_mut().zip(sums).for_each(|(known, sum)| *known += f64::from(*sum));
    })
}
