//! MLX's affine quantization, bit for bit as its CPU backend (`mlx/backend/cpu/quantized.cpp`, 0.32.4).
//!
//! A row of weights is cut into groups; each group gets a scale and a bias in the dtype T of the weights and
//! one integer code per weight. With n = 2^bits - 1, in IEEE float32, nearest even, never fused:
//!
//! 1. `hi`, `lo` = largest and smallest element; NaN is skipped.
//! 2. `step = (hi - lo) / n`, at least 1e-7.
//! 3. If `|lo| > |hi|`: `scale = step`, `edge = lo`. Otherwise `scale = -step`, `edge = hi`: code 0 is always
//!    the element of largest magnitude.
//! 4. `q0 = rint(edge / scale)`. If it is not 0, `scale = edge / q0` and `bias = edge` (some code then decodes
//!    to zero); else `bias = 0`.
//! 5. `code = clamp(rint((w - bias) / scale), 0, n)`, halves to even, with the *unrounded* scale.
//! 6. Stored: codes packed ([`pack`]), scale and bias rounded to T.
//!
//! One bit is different: `scale = max(hi - lo, 1e-7)`, `bias = lo`, then step 5.
//!
//! Decoding is `round_T(round_T(code * scale) + bias)`.
//!
//! This module holds the reference that reads like those lines. [`quantize`](mod@quantize) and
//! [`dequantize`](mod@dequantize) hold the forms that are run; tests hold the two equal.

pub mod dequantize;
pub mod pack;
pub mod quantize;

use crate::{FloatType, PackedMut, PackedRef, Scheme};

/// The smallest step (`mlx/backend/cpu/quantized.cpp`: `eps`).
pub(crate) const EPS: f32 = 1e-7;

/// Scale and bias of one group of float32 values, not yet rounded to the stored dtype.
pub fn parameters(group: &[f32], bits: u32) -> (f32, f32) {
    let n = ((1u32 << bits) - 1) as f32;
    let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
    for &value in group {
        if value > hi {
            hi = value;
        }
        if value < lo {
            lo = value;
        }
    }
    if bits == 1 {
        let range = hi - lo;
        return (if range < EPS { EPS } else { range }, lo);
    }
    let step = (hi - lo) / n;
    let step = if step < EPS { EPS } else { step };
    let (scale, edge) = if lo.abs() > hi.abs() { (step, lo) } else { (-step, hi) };
    let q0 = (edge / scale).round_ties_even();
    if q0 == 0.0 { (scale, 0.0) } else { (edge / q0, edge) }
}

/// Code of one value; NaN quotients give 0, as on x86-64 and ARM.
pub fn code(value: f32, scale: f32, bias: f32, bits: u32) -> u8 {
    let n = ((1u32 << bits) - 1) as f32;
    // `as` maps NaN to 0.
    ((value - bias) / scale).round_ties_even().clamp(0.0, n) as u8
}

/// The scalar reference of [`crate::quantize`] for the affine mode; same shapes.
pub fn quantize_reference(scheme: Scheme, float: FloatType, weights: &[u8], out: PackedMut<'_>) {
    let (bits, size) = (scheme.bits(), float.size());
    let mut group = vec![0f32; scheme.group_size()];
    let mut codes = Vec::with_capacity(weights.len() / size);
    for (index, raw) in weights.chunks_exact(group.len() * size).enumerate() {
        float.widen(raw, &mut group);
        let (scale, bias) = parameters(&group, bits);
        codes.extend(group.iter().map(|&value| code(value, scale, bias, bits)));
        float.narrow(&[scale], &mut out.scales[index * size..][..size]);
        float.narrow(&[bias], &mut out.biases[index * size..][..size]);
    }
    pack::pack_reference(&codes, bits, out.weight);
}

/// The scalar reference of [`crate::dequantize`] for the affine mode; same shapes.
pub fn dequantize_reference(scheme: Scheme, float: FloatType, packed: PackedRef<'_>, out: &mut [u8]) {
    let size = float.size();
    let (mut scale, mut bias) = ([0f32], [0f32]);
    for (index, raw) in out.chunks_exact_mut(size).enumerate() {
        let group = index / scheme.group_size() * size;
        float.widen(&packed.scales[group..][..size], &mut scale);
        float.widen(&packed.biases[group..][..size], &mut bias);
        let code = pack::code_at(packed.weight, index, scheme.bits()) as f32;
        float.narrow(&[float.round(code * scale[0]) + bias[0]], raw);
    }
}
