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
//! [`quantize_reference`] and [`dequantize_reference`] are that in so many words; [`quantize`] is the form that is run.

mod codes;
pub mod quantize;
mod reference;

use codes::{E4M3, NV_RANGE};
use reference::scale_value;

use crate::affine::pack;
use crate::element::Element;
use crate::{FloatType, Mode, NonFinite, PackedMut, PackedRef, Scheme};

pub use codes::{E2M1, e4m3_decode, e4m3_encode};
pub use reference::{dequantize_reference, quantize_reference, scale_byte, scale_of};

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
}
