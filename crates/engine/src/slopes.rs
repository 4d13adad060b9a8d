//! From rows of logits to gradients of losses, in place.
//!
//! Exponentials are float32, sums float64, both in a fixed order.

use crate::exp::{LANES, exp, tree, vectorised};

/// Elements whose sum is looked at together while a token is drawn.
const CHUNK: usize = 64;

/// Turns logits into probabilities, given the whole row's log-sum-exp. Adds `p (1 - p)` of each to `squares`, and gives
/// their sum and, for `draw` at or above `before`, the first element at which `before` plus the sum so far exceeds
/// `draw`.
///
/// # Panics
/// If `squares` is shorter than the row.
pub fn probabilities(
    row: &mut [f32],
    lse: f64,
    squares: &mut [f64],
    before: f64,
    draw: f64,
) -> (f64, Option<usize>) {
    let squares = &mut squares[..row.len()];
    vectorised(
        #[inline(always)]
        || {
            for (value, square) in row.iter_mut().zip(squares) {
                *value = exp((f64::from(*value) - lse) as f32);
                *square += f64::from(*value * (1.0 - *value));
            }
        },
    );
    let (mut sum, mut drawn) = (0f64, None);
    for (at, chunk) in row.chunks(CHUNK).enumerate() {
        let part: f64 = chunk.iter().map(|value| f64::from(*value)).sum();
        if drawn.is_none() && before + sum + part > draw {
            let mut passed = before + sum;
            let place = chunk.iter().position(|value| {
                passed += f64::from(*value);
                passed > draw
            });
            drawn = Some(at * CHUNK + place.unwrap_or(chunk.len() - 1));
        }
        sum += part;
    }
    (sum, drawn)
}

/// Turns logits into `(q - p) * scale`, the gradient of `KL(p || q)` with respect to `factor` times the logits, and
/// gives this row's part of the divergence. Log-sum-exps are of the products with `factor`.
pub fn divergence(
    reference: &[f32],
    reference_lse: f64,
    logits: &mut [f32],
    lse: f64,
    factor: f64,
    scale: f32,
) -> f64 {
    vectorised(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let (reference, reference_rest) = reference.as_chunks::<LANES>();
            let (logits, logits_rest) = logits.as_chunks_mut::<LANES>();
            for (p, q) in reference.iter().zip(logits) {
                for lane in 0..LANES {
                    lanes[lane] += turn(p[lane], &mut q[lane], (reference_lse, lse), factor, scale);
                }
            }
            for (lane, (p, q)) in lanes.iter_mut().zip(reference_rest.iter().zip(logits_rest)) {
                *lane += turn(*p, q, (reference_lse, lse), factor, scale);
            }
            tree(lanes)
        },
    )
}

#[inline(always)]
fn turn(p: f32, q: &mut f32, (reference_lse, lse): (f64, f64), factor: f64, scale: f32) -> f64 {
    let log_p = f64::from(p) * factor - reference_lse;
    let log_q = f64::from(*q) * factor - lse;
    let p = exp(log_p as f32);
    *q = (exp(log_q as f32) - p) * scale;
    // What has no probability adds nothing, even where its logarithm is infinite.
    if p == 0.0 { 0.0 } else { f64::from(p) * (log_p - log_q) }
}

/// Turns logits into `exp(factor * logit - lse) * scale`.
pub fn scaled_probabilities(row: &mut [f32], lse: f64, factor: f64, scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            for value in row {
                *value = exp((f64::from(*value) * factor - lse) as f32) * scale;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lse(row: &[f32], factor: f64) -> f64 {
        row.iter().map(|x| (f64::from(*x) * factor).exp()).sum::<f64>().ln()
    }

    fn row(seed: u32, length: usize) -> Vec<f32> {
        (0..length as u32)
            .map(|at| ((at.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(97)) % 1009) as f32 / 200.0)
            .collect()
    }

    /// The gradient is that of the divergence, by central differences.
    #[test]
    fn slopes_are_gradients() {
        let (reference, logits, factor) = (row(1, 77), row(2, 77), 0.5);
        let value = |logits: &[f32]| {
            divergence(
                &reference,
                lse(&reference, factor),
                &mut logits.to_vec(),
                lse(logits, factor),
                factor,
                1.0,
            )
        };
        let mut slopes = logits.clone();
        divergence(&reference, lse(&reference, factor), &mut slopes, lse(&logits, factor), factor, 0.5);
        for at in [0, 13, 76] {
            let moved = |by: f32| {
                let mut moved = logits.clone();
                moved[at] += by;
                value(&moved)
            };
            let difference = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!((difference - f64::from(slopes[at])).abs() < 1e-4, "{difference} {}", slopes[at]);
        }
        assert!(value(&reference).abs() < 1e-6);
    }

    #[test]
    fn a_draw_lands_where_the_probabilities_say() {
        let logits = row(3, 300);
        let total = lse(&logits, 1.0);
        let mut first_sum = 0.0;
        let mut found = [false; 2];
        for (range, own) in [(0..130, 0), (130..300, 1)] {
            let mut part = logits[range.clone()].to_vec();
            let mut squares = vec![0.0; part.len()];
            let (sum, drawn) = probabilities(&mut part, total, &mut squares, first_sum, 0.6);
            if let Some(at) = drawn {
                let before: f64 =
                    logits[..range.start + at].iter().map(|x| (f64::from(*x) - total).exp()).sum();
                let own_part = (f64::from(logits[range.start + at]) - total).exp();
                assert!(before <= 0.6 + 1e-6 && before + own_part > 0.6 - 1e-6);
                found[own] = true;
                if own == 0 {
                    break;
                }
            }
            first_sum += sum;
        }
        assert!(found.contains(&true));
    }
}
