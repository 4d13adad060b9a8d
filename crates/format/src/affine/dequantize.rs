//! The vectorised affine decoder: `round_T(round_T(code * scale) + bias)`.

use super::pack;
use crate::element::Element;
use crate::{PackedRef, Scheme};

/// Whole groups of `packed` into `out` (dtype E).
#[inline(always)]
pub(crate) fn dequantize<E: Element, const BITS: u32>(scheme: Scheme, packed: PackedRef<'_>, out: &mut [u8]) {
    let group = scheme.group_size();
    let size = E::FLOAT.size();
    let mut codes = [0u8; 128];
    let mut values = [0f32; 128];
    let (codes, values) = (&mut codes[..group], &mut values[..group]);
    let (mut scale, mut bias) = ([0f32], [0f32]);
    let weights = packed.weight.chunks_exact(group * BITS as usize / 8);
    let scales = packed.scales.chunks_exact(size).zip(packed.biases.chunks_exact(size));
    for ((weight, (raw_scale, raw_bias)), out) in weights.zip(scales).zip(out.chunks_exact_mut(group * size))
    {
        E::widen(raw_scale, &mut scale);
        E::widen(raw_bias, &mut bias);
        pack::unpack::<BITS>(weight, codes);
        for (value, code) in values.iter_mut().zip(&*codes) {
            *value = *code as f32 * scale[0];
        }
        E::round(values);
        for value in &mut *values {
            *value += bias[0];
        }
        E::narrow(values, out);
    }
}
