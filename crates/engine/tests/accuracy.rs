//! The stated error bounds of the float32 functions, against float64.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use mlx_quant_engine::exp;

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
