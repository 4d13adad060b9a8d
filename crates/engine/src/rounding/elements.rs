//! What codes stand for, and what a group's scale may be: whole numbers under any scale of a dtype (affine), or the
//! small floats of the fp modes under scales that are one byte.
//!
//! mxfp4 and nvfp4 have e2m1 elements, mxfp8 e4m3; scales are e8m0 (powers of two) for mx, e4m3 for nv
//! (`mlx_format::fp`). While a weight is rounded, a code *is* its element, so that `element * scale + bias` decodes
//! all modes; the fp modes have no bias.

use mlx_format::fp::{E2M1, e4m3_encode};
use mlx_format::{FloatType, Mode, Scheme};

use super::grid::{code, stored};

/// What codes stand for before scale and bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Elements {
    /// 0 to `most`.
    Whole {
        /// The largest.
        most: f32,
    },
    /// 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    E2m1,
    /// Floats of 3 bits of mantissa up to 448, and their negatives.
    E4m3,
}

/// The numbers that a group's scale may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scales {
    /// Any of a dtype.
    Float(FloatType),
    /// Powers of two.
    E8m0,
    /// Floats of 3 bits of mantissa from 2^-9 up to 448, and 0.
    E4m3,
}

/// Elements and scales of a scheme, with scales and biases of the affine mode in dtype `float`.
pub(crate) fn numbers(scheme: Scheme, float: FloatType) -> (Elements, Scales) {
    match scheme.mode() {
        Mode::Affine => {
            (Elements::Whole { most: ((1u32 << scheme.bits()) - 1) as f32 }, Scales::Float(float))
        }
        Mode::Mxfp4 => (Elements::E2m1, Scales::E8m0),
        Mode::Mxfp8 => (Elements::E4m3, Scales::E8m0),
        Mode::Nvfp4 => (Elements::E2m1, Scales::E4m3),
    }
}

/// Adding and taking it away rounds a number below 2^13 to multiples of 2^-9, halves to even.
const NINTHS: f32 = 12_582_912.0 / 512.0;
/// As [`NINTHS`], of numbers below 2^22 to whole ones.
const ROUND: f32 = 12_582_912.0;

/// The nearest e4m3 to a number that is not negative.
#[inline(always)]
fn e4m3(value: f32) -> f32 {
    let bits = value.to_bits();
    let normal = f32::from_bits((bits + 0x7_FFFF + (bits >> 20 & 1)) & 0xFFF0_0000);
    let small = (value + NINTHS) - NINTHS;
    let nearest = if value < 1.0 / 64.0 { small } else { normal };
    if nearest < 448.0 { nearest } else { 448.0 }
}

/// The nearest e2m1 to a number that is not negative.
#[inline(always)]
fn e2m1(value: f32) -> f32 {
    let whole = |value: f32| (value + ROUND) - ROUND;
    let value = if value < 6.0 { value } else { 6.0 };
    let (fine, middle, coarse) = (whole(value * 2.0) * 0.5, whole(value), whole(value * 0.5) * 2.0);
    let upper = if value < 4.0 { middle } else { coarse };
    if value < 2.0 { fine } else { upper }
}

impl Elements {
    /// The largest.
    pub(crate) const fn most(self) -> f32 {
        match self {
            Self::Whole { most } => most,
            Self::E2m1 => 6.0,
            Self::E4m3 => 448.0,
        }
    }

    /// The nearest elements to `(value - bias) * inverse`, for finite values; the fp modes have no bias.
    #[inline(always)]
    pub(super) fn nearest<const N: usize>(
        self,
        values: &[f32; N],
        inverse: &[f32; N],
        bias: &[f32; N],
    ) -> [f32; N] {
        let mut out = [0f32; N];
        match self {
            Self::Whole { most } => {
                for lane in 0..N {
                    out[lane] = code(values[lane], inverse[lane], bias[lane], most);
                }
            }
            Self::E2m1 => {
                for lane in 0..N {
                    let value = values[lane] * inverse[lane];
                    out[lane] = e2m1(value.abs()).copysign(value);
                }
            }
            Self::E4m3 => {
                for lane in 0..N {
                    let value = values[lane] * inverse[lane];
                    out[lane] = e4m3(value.abs()).copysign(value);
                }
            }
        }
        out
    }

    /// The code that is stored for an element.
    pub(super) fn stored(self, element: f32) -> u8 {
        match self {
            Self::Whole { .. } => element as u8,
            // Zero has no sign, as in `mx.quantize`.
            _ if element == 0.0 => 0,
            Self::E2m1 => E2M1.iter().position(|own| *own == element).unwrap_or(0) as u8,
            Self::E4m3 => e4m3_encode(element),
        }
    }
}

impl Scales {
    /// The nearest of these numbers to positive ones.
    #[inline(always)]
    pub(super) fn stored<const N: usize>(self, values: &mut [f32; N]) {
        match self {
            Self::Float(float) => stored(float, values),
            Self::E4m3 => {
                for value in values {
                    *value = e4m3(*value);
                }
            }
            Self::E8m0 => {
                for value in values {
                    let low = f32::from_bits(value.to_bits() & 0x7F80_0000);
                    *value = if *value < 1.5 * low { low } else { 2.0 * low };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mlx_format::fp::e4m3_decode;

    use super::*;

    fn nearest_of(all: &[f32], value: f32) -> f32 {
        *all.iter().min_by(|a, b| (value - **a).abs().total_cmp(&(value - **b).abs())).unwrap()
    }

    #[test]
    fn elements_and_scales_are_the_nearest() {
        let fours = &E2M1[..8];
        let eights: Vec<f32> = (0..0x7F).map(e4m3_decode).collect();
        let powers: Vec<f32> = (-40..40).map(|power| f32::powi(2.0, power)).collect();
        for step in 1..40_000 {
            // Between powers, with steps that are no multiples of any element's.
            let value = f32::exp2((step % 97) as f32 / 4.0 - 12.0) * (1.0 + step as f32 / 40_000.0);
            let distance = |nearest: f32| (value - nearest).abs();
            let [four] = Elements::E2m1.nearest(&[-value], &[1.0], &[0.0]);
            assert_eq!(distance(-four), distance(nearest_of(fours, value)), "{value} {four}");
            let [eight] = Elements::E4m3.nearest(&[value * 0.5], &[2.0], &[0.0]);
            assert_eq!(distance(eight), distance(nearest_of(&eights, value)), "{value} {eight}");
            for (scales, all) in [(Scales::E4m3, &eights), (Scales::E8m0, &powers)] {
                let mut scale = [value];
                scales.stored(&mut scale);
                assert_eq!(distance(scale[0]), distance(nearest_of(all, value)), "{value} {scale:?}");
            }
        }
    }

    #[test]
    fn every_element_has_its_code() {
        for code in (0..16u8).filter(|code| *code != 8) {
            assert_eq!(Elements::E2m1.stored(E2M1[code as usize]), code);
        }
        for code in (0..=255u8).filter(|code| code & 0x7F != 0x7F && *code != 0x80) {
            assert_eq!(Elements::E4m3.stored(e4m3_decode(code)), code);
        }
        assert_eq!([Elements::E2m1, Elements::E4m3].map(|elements| elements.stored(-0.0)), [0, 0]);
    }
}
