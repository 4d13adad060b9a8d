//! The scalar reference, written as MLX composes it from single operations.

use super::codes::{
    E2M1, E4M3, NV_RANGE, ceil_log2, e2m1_nearest, e4m3_decode, e4m3_encode, magnitude, power_of_two,
};
use crate::affine::pack;
use crate::{FloatType, Mode, PackedMut, PackedRef};

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

/// What a scale byte stands for.
pub fn scale_of(mode: Mode, byte: u8) -> f32 {
    scale_value(mode, FloatType::F32, byte)
}

/// The byte of a scale that [`scale_of`] gives; of another number, that of one near it.
pub fn scale_byte(mode: Mode, scale: f32) -> u8 {
    match mode {
        Mode::Nvfp4 => e4m3_encode(scale),
        // 2^-127, which is subnormal in float32, is byte 0 as well.
        _ => (scale.to_bits() >> 23 & 0xFF) as u8,
    }
}

/// A scale byte decoded and rounded to T.
#[inline(always)]
pub(super) fn scale_value(mode: Mode, float: FloatType, byte: u8) -> f32 {
    match mode {
        Mode::Nvfp4 => float.round(E4M3[byte as usize]),
        _ => float.round(power_of_two(byte as i32 - 127)),
    }
}
