//! Sums over rows of logits.
//!
//! The exponentials are float32, their sums and the logarithms float64: a vocabulary is long, and a divergence is
//! a small difference of large terms.

use super::exp::{LANES, exp, largest, tree, vectorised};

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
