//! The stated error bounds of the float32 functions, against float64.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use mlx_quant_model::ops::{exp, tokens};

/// Every 257th float32 from `-range` to `range`.
fn sweep(range: f32) -> impl Iterator<Item = f32> {
    (0..=range.to_bits()).step_by(257).flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
}

fn units(found: f32, expected: f64) -> f64 {
    let nearest = expected as f32;
    let spacing = f64::from(f32::from_bits((nearest.abs().to_bits() + 1).min(0x7f7f_ffff)))
        - f64::from(f32::from_bits((nearest.abs().to_bits() + 1).min(0x7f7f_ffff) - 1));
    (f64::from(found) - expected).abs() / spacing
}

/// `1 - erf`, by the Taylor series and the continued fraction.
fn erfc(z: f64) -> f64 {
    if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..120 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..=120).rev().fold(0.0, |tail, n| f64::from(n) / 2.0 / (z + tail));
    (-z * z).exp() / ((z + fraction) * std::f64::consts::PI.sqrt())
}

#[test]
fn exponential() {
    let mut worst = 0.0f64;
    for x in sweep(120.0) {
        let expected = f64::from(x).exp();
        let found = exp::exp(x);
        if expected as f32 == f32::INFINITY {
            assert_eq!(found, f32::INFINITY, "{x}");
        } else {
            worst = worst.max(units(found, expected));
        }
    }
    assert!(worst <= 2.0, "{worst} units in the last place");
    for (x, expected) in [(f32::NEG_INFINITY, 0.0), (-1e30, 0.0), (f32::INFINITY, f32::INFINITY), (0.0, 1.0)]
    {
        assert_eq!(exp::exp(x), expected);
    }
    assert!(exp::exp(f32::NAN).is_nan());
}

#[test]
fn relatives_of_the_exponential() {
    let mut worst = [0.0f64; 4];
    for x in sweep(100.0) {
        let wide = f64::from(x);
        if x.abs() > 1e-30 {
            worst[0] = worst[0].max(units(exp::tanh(x), wide.tanh()));
        }
        let sigmoid = 1.0 / (1.0 + (-wide).exp());
        if sigmoid > 1.2e-38 {
            let wrong = (f64::from(exp::sigmoid(x)) - sigmoid).abs() / sigmoid;
            worst[1] = worst[1].max(wrong / (1.0 + wide.abs()));
        }
        let softplus = wide.max(0.0) + (-wide.abs()).exp().ln_1p();
        if softplus > 1.2e-38 {
            worst[2] = worst[2].max((f64::from(exp::softplus(x)) - softplus).abs() / softplus);
        }
        let tail = erfc(wide.abs() / 2.0f64.sqrt()) / 2.0;
        let normal = if x > 0.0 { 1.0 - tail } else { tail };
        worst[3] = worst[3].max((f64::from(exp::normal(x)) - normal).abs());
    }
    let bounds = [4.0, 4e-7, 1e-6, 2e-7];
    for (i, (worst, bound)) in worst.iter().zip(bounds).enumerate() {
        assert!(worst <= &bound, "function {i}: {worst} where {bound} is stated");
    }
}

fn row(length: usize, seed: u32, spread: f32) -> Vec<f32> {
    (0..length as u32).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 10_007.0 * spread).collect()
}

fn exact_lse(row: &[f32]) -> f64 {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(most) + row.iter().map(|x| (f64::from(*x) - f64::from(most)).exp()).sum::<f64>().ln()
}

#[test]
fn scores_of_rows() {
    for length in [1, 5, 16, 1023, 1024, 1025, 50_000] {
        let (p, q) = (row(length, 1, 20.0), row(length, 2, 15.0));
        let target = length as u32 / 2;
        let found = tokens::score(&p, target);
        let lse = exact_lse(&p);
        assert!((found.log_sum_exp - lse).abs() < 1e-6, "{length}: {} and {lse}", found.log_sum_exp);
        assert!((found.nll - (lse - f64::from(p[target as usize]))).abs() < 1e-6);
        let best = p.iter().enumerate().fold(0, |best, (i, x)| if *x > p[best] { i } else { best });
        assert_eq!(found.best as usize, best);
        let other = tokens::score(&q, 0).log_sum_exp;
        let exact_other = exact_lse(&q);
        let exact: f64 = p
            .iter()
            .zip(&q)
            .map(|(p, q)| {
                let log_p = f64::from(*p) - lse;
                log_p.exp() * (log_p - (f64::from(*q) - exact_other))
            })
            .sum();
        let divergence = tokens::kl_of_rows(&p, found.log_sum_exp, &q, other);
        assert!((divergence - exact).abs() < 1e-6 * (1.0 + exact), "{length}: {divergence} and {exact}");
        assert_eq!(tokens::kl_of_rows(&p, lse, &p, lse), 0.0);
    }
}

#[test]
fn first_of_equals_and_odd_rows() {
    let mut flat = vec![0.0; 3000];
    flat[1500] = 1.0;
    flat[1501] = 1.0;
    assert_eq!(tokens::score(&flat, 0).best, 1500);
    assert_eq!(tokens::score(&[], 0).best, 0);
    assert_eq!(tokens::score(&[1.0], 5).nll, f64::INFINITY);
    assert!(tokens::score(&[f32::NAN, 2.0], 1).nll.is_nan());
    assert_eq!(tokens::score(&[f32::NAN, 2.0], 1).best, 1);
    let masked = [1.0, f32::NEG_INFINITY];
    let lse = tokens::score(&masked, 0).log_sum_exp;
    assert_eq!(tokens::kl_of_rows(&masked, lse, &masked, lse), 0.0);
}
