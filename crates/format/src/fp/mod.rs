//! The microscaling modes mxfp4, mxfp8 and nvfp4, bit for bit as MLX 0.32.4's CPU backend.
//!
//! | | mxfp4 | mxfp8 | nvfp4 |
//! |---|---|---|---|
//! | group, bits | 32, 4 | 32, 8 | 16, 4 |
//! | scale byte | e8m0: 2^(byte - 127) | same | e4m3 |
//! | element | e2m1 | e4m3 | e2m1 |
//! | M | 6 | 448 | 6 |
//!
//! MLX composes these from single operations in the dtype T of the weights, so each step rounds to T:
//!
//! * mx: `t = round_T(amax / M)`. If t is 0 the scale is 1; else e is the smallest integer with 2^e >= t, stored
//!   as e + 127 modulo 256. `x = round_T(w / 2^e)`.
//! * nv: `t = round_T(amax / 6)`, byte = e4m3(t), `s = round_T(decode(byte))`, `x = round_T(w / s)`. With a global
//!   scale g, in float32: byte = e4m3(t * (2688 / g)) and x is multiplied by 2688 / g.
//! * e2m1 code: the nearest table value, equal distances to the lower code; what is nearest to zero is code 0,
//!   negative or not. mx rounds the distances to T before it compares them.
//! * e4m3 code: nearest even with subnormals; from 448 up, and for NaN, +-448.
//! * decoding: `round_T(value * scale)`.
//!
//! nvfp4 without a global scale loses every group with amax <= 6 * 2^-10 (its scale byte is 0), and MLX's GPU
//! backends break ties differently; both are MLX's behaviour, kept.
//!
//! This module holds the reference; [`quantize`] the form that is run.

pub mod quantize;

use crate::element::Element;
use crate::{FloatType, Mode, NonFinite, PackedMut, PackedRef, Scheme, affine::pack};

/// Values of the e2m1 codes 0 to 15.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Largest e4m3 times largest e2m1: what a global scale is spread over.
const NV_RANGE: f32 = 448.0 * 6.0;

/// e4m3 (finite, no infinity) byte of a float32: nearest even, saturating at +-448.
#[inline(always)]
pub fn e4m3_encode(value: f32) -> u8 {
    const DENORMAL: u32 = 141 << 23;
    let bits = value.to_bits();
    let sign = bits >> 24 & 0x80;
    let magnitude = bits & 0x7FFF_FFFF;
    let low = (f32::from_bits(magnitude) + f32::from_bits(DENORMAL)).to_bits().wrapping_sub(DENORMAL);
    let high = magnitude.wrapping_sub(120 << 23).wrapping_add(0x7_FFFF + (magnitude >> 20 & 1)) >> 20;
    let code = if magnitude < 121 << 23 { low } else { high };
    let code = if magnitude >= 448f32.to_bits() { 0x7E } else { code };
    (code | sign) as u8
}

/// Value of an e4m3 byte; 0x7F and 0xFF are NaN.
pub const fn e4m3_decode(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3 & 0xF) as u32, (byte & 7) as u32);
    let magnitude = if byte & 0x7F == 0x7F {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits((exponent + 120) << 23 | mantissa << 20)
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// [`e4m3_decode`] of every byte.
const E4M3: [f32; 256] = {
    let mut table = [0f32; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = e4m3_decode(byte as u8);
        byte += 1;
    }
    table
};

/// 2^exponent as float32, subnormals and infinity included.
fn power_of_two(exponent: i32) -> f32 {
    f64::powi(2.0, exponent) as f32
}

/// Smallest integer e with 2^e >= t, for positive finite t.
fn ceil_log2(t: f32) -> i32 {
    let bits = (t as f64).to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    exponent + i32::from(bits & ((1 << 52) - 1) != 0)
}

/// Nearest e2m1 code: the first of equal distances; NaN never wins, so that NaN gives code 0.
fn e2m1_nearest(x: f32, round: impl Fn(f32) -> f32) -> u8 {
    let distance = |code: usize| round(x - E2M1[code]).abs();
    let (mut best, mut code) = (distance(0), 0);
    for candidate in 1..16 {
        if distance(candidate) < best {
            (best, code) = (distance(candidate), candidate);
        }
    }
    code as u8
}

/// Largest magnitude; NaN makes it NaN, as `mx.max` does.
fn magnitude(group: &[f32]) -> f32 {
    group.iter().fold(0f32, |max, v| if v.is_nan() || max.is_nan() { f32::NAN } else { max.max(v.abs()) })
}

/// The scalar reference of [`crate::quantize`] for the fp modes; `global` is nvfp4's optional global scale.
pub fn quantize_reference(
    mode: Mode,
    float: FloatType,
    weights: &[u8],
    out: PackedMut<'_>,
    global: Option<f32>,
) {
    let (bits, size) = mode.defaults();
    let mut group = vec![0f32; size];
    let mut codes = Vec::with_capacity(weights.len() / float.size());
    let round = |value: f32| float.round(value);
    for (index, raw) in weights.chunks_exact(size * float.size()).enumerate() {
        float.widen(raw, &mut group);
        let amax = magnitude(&group);
        if mode == Mode::Nvfp4 {
            let spread = global.map_or(1.0, |global| NV_RANGE / global);
            let byte = e4m3_encode(round(amax / 6.0) * spread);
            let scale = round(e4m3_decode(byte));
            out.scales[index] = byte;
            codes.extend(group.iter().map(|&w| e2m1_nearest(round(w / scale) * spread, |d| d)));
        } else {
            let t = round(amax / if bits == 4 { 6.0 } else { 448.0 });
            if !t.is_finite() {
                // What MLX makes of a group with NaN or infinity, measured on x86-64: every quotient is infinite.
                out.scales[index] = if float == FloatType::F32 { 128 } else { 0 };
                codes.extend(
                    group.iter().map(|w| if bits == 4 { 0 } else { e4m3_encode(448f32.copysign(*w)) }),
                );
                continue;
            }
            let exponent = if t == 0.0 { 0 } else { ceil_log2(t) };
            let scale = round(power_of_two(exponent));
            out.scales[index] = (exponent + 127) as u8;
            let scaled = group.iter().map(|&w| round(w / scale));
            if bits == 4 {
                codes.extend(scaled.map(|x| e2m1_nearest(x, round)));
            } else {
                codes.extend(scaled.map(e4m3_encode));
            }
        }
    }
    pack::pack_reference(&codes, bits, out.weight);
}

/// The scalar reference of [`crate::dequantize`] for the fp modes, without global scale.
pub fn dequantize_reference(mode: Mode, float: FloatType, packed: PackedRef<'_>, out: &mut [u8]) {
    let (bits, size) = mode.defaults();
    for (index, raw) in out.chunks_exact_mut(float.size()).enumerate() {
        let code = pack::code_at(packed.weight, index, bits);
        let value = if bits == 4 { E2M1[code as usize] } else { e4m3_decode(code) };
        float.narrow(&[value * scale_value(mode, float, packed.scales[index / size])], raw);
    }
}

/// A scale byte decoded and rounded to T.
#[inline(always)]
fn scale_value(mode: Mode, float: FloatType, byte: u8) -> f32 {
    match mode {
        Mode::Nvfp4 => float.round(E4M3[byte as usize]),
        _ => float.round(power_of_two(byte as i32 - 127)),
    }
}

/// Whole groups of `packed` into `out` (dtype E).
#[inline(always)]
pub(crate) fn dequantize<E: Element>(mode: Mode, packed: PackedRef<'_>, out: &mut [u8]) {
    let (bits, size) = mode.defaults();
    let (mut codes, mut values) = ([0u8; 32], [0f32; 32]);
    let (codes, values) = (&mut codes[..size], &mut values[..size]);
    let weights = packed.weight.chunks_exact(size * bits as usize / 8);
    let outs = out.chunks_exact_mut(size * E::FLOAT.size());
    for ((weight, byte), out) in weights.zip(packed.scales).zip(outs) {
        let scale = scale_value(mode, E::FLOAT, *byte);
        if bits == 4 {
            pack::unpack::<4>(weight, codes);
            for (value, code) in values.iter_mut().zip(&*codes) {
                *value = E2M1[(code & 15) as usize] * scale;
            }
        } else {
            for (value, code) in values.iter_mut().zip(weight) {
                *value = E4M3[*code as usize] * scale;
            }
        }
        E::narrow(values, out);
    }
}

/// nvfp4 with a global scale: `weights` of dtype `float`, any number of whole groups, `global` > 0 (MLX takes
/// max |w|). Lengths as [`PackedMut`]. Equal to `mx.quantize(w, mode="nvfp4", global_scale=g)`.
///
/// # Errors
/// [`NonFinite`] at the first NaN or infinity.
pub fn quantize_nvfp4_global(
    float: FloatType,
    weights: &[u8],
    global: f32,
    out: PackedMut<'_>,
) -> Result<(), NonFinite> {
    use crate::element::{Bf16, F16, F32};
    match float {
        FloatType::F32 => quantize::nv::<F32>(weights, out, Some(global), false),
        FloatType::F16 => quantize::nv::<F16>(weights, out, Some(global), false),
        FloatType::Bf16 => quantize::nv::<Bf16>(weights, out, Some(global), false),
    }
}

/// Decodes nvfp4 with a global scale: `value * (scale * (g / 2688))`, float32 whatever T (as MLX on CPU), with
/// the scale rounded to `float`, the dtype of the weights that were quantized.
pub fn dequantize_nvfp4_global(float: FloatType, packed: PackedRef<'_>, global: f32, out: &mut [f32]) {
    let spread = global / NV_RANGE;
    for (index, value) in out.iter_mut().enumerate() {
        let scale = scale_value(Mode::Nvfp4, float, packed.scales[index / 16]);
        *value = E2M1[pack::code_at(packed.weight, index, 4) as usize] * (scale * spread);
    }
}

/// The scheme of a global-scale tensor, for length checks by callers.
pub const NVFP4: Scheme = match Scheme::new(Mode::Nvfp4, None, None) {
    Ok(scheme) => scheme,
    Err(_) => unreachable!(),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_round_trips_and_rounds_to_nearest_even() {
        for byte in 0..=255u8 {
            let value = e4m3_decode(byte);
            if value.is_nan() {
                assert!(byte & 0x7F == 0x7F);
                continue;
            }
            assert_eq!(e4m3_encode(value), byte);
            if byte & 0x7F < 0x7E {
                let next = e4m3_decode(byte + 1);
                let middle = f32::midpoint(value, next);
                let even = if byte % 2 == 0 { byte } else { byte + 1 };
                assert_eq!(e4m3_encode(middle), even, "{middle}");
            }
        }
        assert_eq!(
            (e4m3_encode(1e9), e4m3_encode(-f32::INFINITY), e4m3_encode(f32::NAN) & 0x7F),
            (0x7E, 0xFE, 0x7E)
        );
    }

    /// Bytes of `mx.quantize` (0.32.4, x86-64) for `linspace(-3, 3, 32)` with a bad sixth element.
    #[test]
    fn groups_with_nonfinite_elements_are_stored_as_mlx_stores_them() {
        for bad in [f32::INFINITY, f32::NAN] {
            let mut values: Vec<f32> = (0..32).map(|i| -3.0 + 6.0 * i as f32 / 31.0).collect();
            values[5] = bad;
            for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
                let mut input = vec![0u8; 32 * float.size()];
                float.narrow(&values, &mut input);
                let run = |mode: Mode| {
                    let scheme = Scheme::new(mode, None, None).unwrap();
                    let (mut weight, mut scales) =
                        (vec![0u8; scheme.words(32) * 4], vec![0u8; scheme.groups(32)]);
                    let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut [] };
                    crate::quantize(scheme, float, 32, &input, out, true).unwrap();
                    (weight, scales)
                };
                let scale = if float == FloatType::F32 { 128 } else { 0 };
                assert_eq!(run(Mode::Mxfp4), (vec![0; 16], vec![scale]));
                let eights: Vec<u8> = (0..32).map(|i| if i < 16 && i != 5 { 254 } else { 126 }).collect();
                assert_eq!(run(Mode::Mxfp8), (eights, vec![scale]));
                let fours = vec![0, 0, 0, 0, 0, 0, 0, 0, 16, 50, 67, 85, 101, 102, 118, 119];
                assert_eq!(run(Mode::Nvfp4), (fours, vec![126, 48]));
            }
        }
    }

    #[test]
    fn ceil_log2_is_exact_at_powers() {
        for exponent in -149..=127 {
            let power = power_of_two(exponent);
            assert_eq!(ceil_log2(power), exponent);
            if exponent > -149 {
                assert_eq!(ceil_log2(f32::from_bits(power.to_bits() + 1)), exponent + 1);
            }
        }
    }
}
