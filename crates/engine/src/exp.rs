//! The exponential and its relatives in float32, as plain loops that the compiler turns into vector code.
//!
//! The functions take one number and have no branches and no table, so that a loop over them vectorises when
//! `vectorised` compiles it for AVX2, AVX-512 or NEON. They use no fused multiply-add: the same input gives
//! the same bits on every instruction set. The stated bounds are what the tests measure against float64.

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

/// Lanes of the sums; fixed, so that the order of a sum is.
pub(crate) const LANES: usize = 16;

/// Runs `f`, compiled for the widest instruction set of this machine; what it calls has to be inlined.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Adds lanes up as a fixed tree.
#[inline(always)]
pub(crate) fn tree<T: Copy + std::ops::Add<Output = T>>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = lanes[i] + lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `f` of each element, in [`LANES`] lanes.
#[inline(always)]
pub(super) fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(*value);
    }
    tree(lanes)
}

/// The sum of `f` of each pair of elements, in [`LANES`] lanes.
#[inline(always)]
pub(super) fn sum_of_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
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

/// The largest element, minus infinity of none; NaN is passed over.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |best, value| if *value > best { *value } else { best })
}

/// `x = n * ln 2 + r` as `(n, exp(r) - 1)`, for `x` within -104..=89 or NaN.
#[inline(always)]
fn reduced(x: f32) -> (i32, f32) {
    /// Added and taken away, rounds to a whole number; its bits hold that number.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` as a number of few bits, whose multiples are exact, and the rest.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    // The Taylor series; the first term left out is below 6e-9 of the result.
    let mut series = 1.0 / 5040.0;
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0] {
        series = series * r + term;
    }
    (rounded.to_bits().cast_signed().wrapping_sub(ROUND.to_bits().cast_signed()), r + r * r * series)
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[inline(always)]
fn clamped(x: f32, low: f32, high: f32) -> f32 {
    // Comparisons that keep NaN.
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// `e^x` within 2 units in the last place, subnormal results included.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let (n, s) = reduced(clamped(x, -104.0, 89.0));
    let half = n >> 1;
    // Two factors: neither overflows, and a subnormal result is rounded once.
    ((1.0 + s) * power_of_two(half)) * power_of_two(n.wrapping_sub(half))
}

/// `tanh(x)` within 4 units in the last place for numbers above 1e-30 in size.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (n, s) = reduced(clamped(2.0 * x.abs(), 0.0, 40.0));
    let scale = power_of_two(n);
    let below = scale * s + (scale - 1.0);
    (below / (below + 2.0)).copysign(x)
}

/// `1 / (1 + e^-x)` within `4e-7 * (1 + |x|)` of it relative; 0 where it is subnormal.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `ln(1 + e^x)` within a relative error of 1e-6 and `1e-7 * |x|` relative for negative `x`.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    let u = exp(-x.abs());
    let s = u / (2.0 + u);
    let squared = s * s;
    let mut series = 1.0 / 15.0;
    for term in [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        series = series * squared + term;
    }
    let positive = if x < 0.0 { 0.0 } else { x };
    positive + 2.0 * s * series
}

/// The normal distribution function, within an absolute error of 2e-7.
#[inline(always)]
pub fn normal(x: f32) -> f32 {
    // erfc(z) * exp(z^2) / t at t = 1 / (1 + z / 2), interpolated at the Chebyshev nodes of u, which is t moved
    // to -1..=1; z beyond 10.5 has an erfc of 0 in float32.
    const SERIES: [f32; 9] = [
        -5.810_831e-5,
        2.468_174_2e-5,
        6.153_885e-4,
        -6.861_686e-4,
        -6.324_628e-3,
        6.311_618e-3,
        0.103_520_79,
        0.327_187_66,
        0.569_408_7,
    ];
    let z = clamped(x.abs() * FRAC_1_SQRT_2, 0.0, 10.5);
    let t = 1.0 / (1.0 + 0.5 * z);
    let u = (2.0 * t - 1.16) * (1.0 / 0.84);
    let mut series = SERIES[0];
    for term in &SERIES[1..] {
        series = series * u + term;
    }
    let tail = 0.5 * t * series * exp(-z * z);
    if x > 0.0 { 1.0 - tail } else { tail }
}

/// Replaces each element by `f` of it. The last few go through a whole vector too: one number at a time, they
/// would cost as much as all others of a short row.
#[inline(always)]
pub(super) fn map_in_place(x: &mut [f32], f: impl Fn(f32) -> f32) {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for value in chunk {
            *value = f(*value);
        }
    }
    if !rest.is_empty() {
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for value in &mut last {
            *value = f(*value);
        }
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Turns each element into `exp(x - shift)` and returns their sum.
#[inline(always)]
pub(super) fn exponentials(x: &mut [f32], shift: f32) -> f32 {
    map_in_place(
        x,
        #[inline(always)]
        |x| exp(x - shift),
    );
    sum_of(x, |x| x)
}
