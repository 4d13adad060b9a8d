//! What an evaluation needs of the logits of one token.
//!
//! The exponentials are float32, their sums and the logarithms float64: a vocabulary is long, and a divergence is
//! a small difference of large terms.

use super::exp::{LANES, exp, largest, tree, vectorised};
use super::slices::BLOCK;

/// The score of one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Minus the log probability of the target, in nats.
    pub nll: f64,
    /// The most likely token; the first of equals.
    pub best: u32,
    /// Logarithm of the sum of the exponentials of the row.
    pub log_sum_exp: f64,
}

/// Scores a row of logits, one for each token of the vocabulary, against the token that followed.
///
/// A target outside of the row has an infinite `nll`. NaN is never the best token, and makes the other two NaN.
pub fn score(logits: &[f32], target: u32) -> TokenScore {
    let log_sum_exp = log_sum_exp(logits, 1.0);
    let nll = logits.get(target as usize).map_or(f64::INFINITY, |value| log_sum_exp - f64::from(*value));
    TokenScore { nll, best: first_of_largest(logits) as u32, log_sum_exp }
}

/// `KL(reference || logits)` in nats of two rows, given the `log_sum_exp` of both.
pub fn kl_of_rows(reference: &[f32], reference_lse: f64, logits: &[f32], lse: f64) -> f64 {
    divergence(reference, reference_lse, logits, lse, 1.0)
}

fn first_of_largest(row: &[f32]) -> usize {
    vectorised(
        #[inline(always)]
        || {
            let most = largest(row);
            let holds = |block: &[f32]| block.iter().filter(|value| **value == most).count() > 0;
            let block = row.chunks(BLOCK).position(holds).unwrap_or(0);
            let start = block * BLOCK;
            start + row[start..].iter().position(|value| *value == most).unwrap_or(0)
        },
    )
}

/// `ln(sum(exp(x * factor)))`.
pub(super) fn log_sum_exp(row: &[f32], factor: f64) -> f64 {
    vectorised(
        #[inline(always)]
        || {
            let most = largest(row);
            let small = factor as f32;
            let sum = sum_of(
                row,
                row,
                #[inline(always)]
                |x, _| f64::from(exp((x - most) * small)),
            );
            f64::from(most) * factor + sum.ln()
        },
    )
}

/// `KL(reference || logits)`, both times `factor`; the `log_sum_exp`s are of the products.
pub(super) fn divergence(
    reference: &[f32],
    reference_lse: f64,
    logits: &[f32],
    lse: f64,
    factor: f64,
) -> f64 {
    vectorised(
        #[inline(always)]
        || {
            sum_of(
                reference,
                logits,
                #[inline(always)]
                |p, q| {
                    let log_p = f64::from(p) * factor - reference_lse;
                    let log_q = f64::from(q) * factor - lse;
                    let probability = f64::from(exp(log_p as f32));
                    // What has no probability adds nothing, even where its logarithm is infinite.
                    if probability == 0.0 { 0.0 } else { probability * (log_p - log_q) }
                },
            )
        },
    )
}

/// The sum of `f` of each pair of elements, in [`LANES`] lanes of float64.
#[inline(always)]
fn sum_of(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f64) -> f64 {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane += f(*x, *y);
    }
    tree(lanes)
}
