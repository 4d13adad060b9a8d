//! The three floating dtypes that MLX quantizes, as bytes.
//!
//! Tensors stay little-endian bytes from the mapped file to the written one, at any alignment: nothing
//! is reinterpreted in place, and the loops below compile to plain vector loads.

use half::{bf16, f16};
use safetensors::Dtype;

/// A dtype whose weights can be quantized; also the dtype of scales and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The safetensors dtype.
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// `None` for dtypes that are not one of the three.
    pub const fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// The name used by config.json and `--dtype`: `float32`, `float16`, `bfloat16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Inverse of [`FloatType::name`]; `None` for every other string.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|float| float.name() == name)
    }

    /// Rounds a float32 to this dtype (nearest even) and widens it again.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Widens little-endian elements to float32, exactly. `bytes` holds `out.len()` elements.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => F32::widen(bytes, out),
            Self::F16 => F16::widen(bytes, out),
            Self::Bf16 => Bf16::widen(bytes, out),
        }
    }

    /// Rounds float32 values (nearest even) into little-endian elements of this dtype.
    pub fn narrow(self, values: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => F32::narrow(values, out),
            Self::F16 => F16::narrow(values, out),
            Self::Bf16 => Bf16::narrow(values, out),
        }
    }

    /// Index of the first NaN or infinity among the elements in `bytes`.
    pub fn first_nonfinite(self, bytes: &[u8]) -> Option<usize> {
        let mut values = [0f32; 256];
        let mut seen = 0;
        for part in bytes.chunks(256 * self.size()) {
            let values = &mut values[..part.len() / self.size()];
            self.widen(part, values);
            if !all_finite(values) {
                return values.iter().position(|v| !v.is_finite()).map(|i| seen + i);
            }
            seen += values.len();
        }
        None
    }
}

/// Whether every value is finite; the form that compilers vectorise.
#[inline(always)]
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values.iter().map(|v| v.to_bits() & 0x7FFF_FFFF).fold(0, u32::max) < 0x7F80_0000
}

/// One of the three dtypes at compile time.
pub(crate) trait Element {
    const FLOAT: FloatType;
    fn widen(bytes: &[u8], out: &mut [f32]);
    fn narrow(values: &[f32], out: &mut [u8]);
    /// Rounds in place; NaN stays NaN.
    fn round(values: &mut [f32]);
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Element for F32 {
    const FLOAT: FloatType = FloatType::F32;

    #[inline(always)]
    fn widen(bytes: &[u8], out: &mut [f32]) {
        for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*raw);
        }
    }

    #[inline(always)]
    fn narrow(values: &[f32], out: &mut [u8]) {
        for (raw, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *raw = value.to_le_bytes();
        }
    }

    #[inline(always)]
    fn round(_: &mut [f32]) {}
}

/// bfloat16 bits of a float32, nearest even, every NaN as 0x7FC0 (as MLX's CPU backend stores it).
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7FFF_FFFF > 0x7F80_0000 { 0x7FC0 } else { rounded }
}

impl Element for Bf16 {
    const FLOAT: FloatType = FloatType::Bf16;

    #[inline(always)]
    fn widen(bytes: &[u8], out: &mut [f32]) {
        for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f32::from_bits((u16::from_le_bytes(*raw) as u32) << 16);
        }
    }

    #[inline(always)]
    fn narrow(values: &[f32], out: &mut [u8]) {
        for (raw, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
            *raw = (bf16_bits(*value) as u16).to_le_bytes();
        }
    }

    #[inline(always)]
    fn round(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(bf16_bits(*value) << 16);
        }
    }
}

/// float32 of binary16 bits: the exponent is shifted into place and rescaled by one exact product.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    let magnitude = f32::from_bits((bits as u32 & 0x7FFF) << 13) * f32::from_bits((254 - 15) << 23);
    let special = f32::from_bits(0x7F80_0000 | (bits as u32 & 0x3FF) << 13);
    let magnitude = if bits & 0x7C00 == 0x7C00 { special } else { magnitude };
    f32::from_bits(magnitude.to_bits() | (bits as u32 & 0x8000) << 16)
}

/// binary16 bits of a float32, nearest even. Below 2^-14 the sum with 0.5 leaves the rounded subnormal
/// in the low mantissa bits.
#[inline(always)]
fn f16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xFFF + ((magnitude >> 13) & 1)) >> 13;
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let finite = if magnitude >= 0x477F_F000 { 0x7C00 } else { finite };
    let result = if magnitude > 0x7F80_0000 { 0x7E00 } else { finite };
    result | (bits >> 16 & 0x8000)
}

impl Element for F16 {
    const FLOAT: FloatType = FloatType::F16;

    #[inline(always)]
    fn widen(bytes: &[u8], out: &mut [f32]) {
        for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f16_value(u16::from_le_bytes(*raw));
        }
    }

    #[inline(always)]
    fn narrow(values: &[f32], out: &mut [u8]) {
        for (raw, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
            *raw = (f16_bits(*value) as u16).to_le_bytes();
        }
    }

    #[inline(always)]
    fn round(values: &mut [f32]) {
        for value in values {
            *value = f16_value(f16_bits(*value) as u16);
        }
    }
}

/// A weight that is NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("element {element} is {value}")]
pub struct NonFinite {
    /// Index among the elements that were given.
    pub element: usize,
    /// Its value, widened to float32.
    pub value: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_equal_half_on_every_16_bit_pattern_and_its_neighbours() {
        for bits in 0..=u16::MAX {
            let (bf, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            let mut value = [0f32];
            for (float, expected) in [(FloatType::Bf16, bf.to_f32()), (FloatType::F16, h.to_f32())] {
                float.widen(&bits.to_le_bytes(), &mut value);
                assert!(value[0].to_bits() == expected.to_bits() || expected.is_nan() && value[0].is_nan());
                // Halfway points and their float32 neighbours on both sides.
                let half_step = if float == FloatType::Bf16 { 0x8000u32 } else { 0x1000 };
                for offset in [0, 1, half_step - 1, half_step, half_step + 1, half_step * 2 - 1] {
                    let wide = f32::from_bits(expected.to_bits().wrapping_add(offset));
                    let mut out = [0u8; 2];
                    float.narrow(&[wide], &mut out);
                    let ours = u16::from_le_bytes(out);
                    let (reference, is_nan) = match float {
                        FloatType::Bf16 => (bf16::from_f32(wide).to_bits(), bf16::from_bits(ours).is_nan()),
                        _ => (f16::from_f32(wide).to_bits(), f16::from_bits(ours).is_nan()),
                    };
                    assert!(ours == reference || wide.is_nan() && is_nan, "{float:?} {wide:e}");
                }
            }
        }
    }

    #[test]
    fn subnormal_halfway_points_round_to_even() {
        for k in 0..2048u32 {
            for offset in [-1i32, 0, 1] {
                let value = (k as f32 + 0.5) * f32::powi(2.0, -24);
                let value = f32::from_bits(value.to_bits().wrapping_add_signed(offset));
                assert_eq!(f16_bits(value) as u16, f16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn first_nonfinite_names_the_element() {
        let mut bytes = vec![0u8; 2000];
        assert_eq!(FloatType::Bf16.first_nonfinite(&bytes), None);
        bytes[2 * 700..2 * 700 + 2].copy_from_slice(&bf16::NAN.to_bits().to_le_bytes());
        assert_eq!(FloatType::Bf16.first_nonfinite(&bytes), Some(700));
    }
}
