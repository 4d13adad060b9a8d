//! The vectorised microscaling quantizer.
//!
//! Two facts make it plain lane-wise code. Division by a power of two is exact, so mx elements are products
//! with its inverse, and rounding them to T could only change values that code to zero anyway. And for
//! |x| <= 8 the nearest e2m1 value with ties to the lower code is a count of thresholds passed (the distances
//! involved are exact in all three dtypes near a threshold). What falls outside goes to the reference.

use super::codes::{E4M3, NV_RANGE, e4m3_encode};
use super::reference::quantize_reference;
use crate::affine::pack;
use crate::element::Element;
use crate::{FloatType, Mode, NonFinite, PackedMut};

/// Largest magnitude as float32 bits; 0x7F800000 or more if any value is not finite.
#[inline(always)]
fn magnitude_bits(group: &[f32]) -> u32 {
    group.iter().map(|v| v.to_bits() & 0x7FFF_FFFF).fold(0, u32::max)
}

/// Nearest e2m1 code for |x| <= 8.
#[inline(always)]
fn e2m1_encode(x: f32) -> u8 {
    let a = x.abs();
    let passed = |threshold: f32| u32::from(a > threshold);
    let code =
        passed(0.25) + passed(0.75) + passed(1.25) + passed(1.75) + passed(2.5) + passed(3.5) + passed(5.0);
    let sign = if code > 0 { x.to_bits() >> 28 & 8 } else { 0 };
    (code | sign) as u8
}

fn nonfinite(group: &[f32], first: usize) -> NonFinite {
    let at = group.iter().position(|v| !v.is_finite()).unwrap_or(0);
    NonFinite { element: first + at, value: group[at] }
}

/// mxfp4 (`BITS` 4) or mxfp8 (8) of whole groups of 32.
#[inline(always)]
pub(crate) fn mx<E: Element, const BITS: u32>(
    weights: &[u8],
    out: PackedMut<'_>,
    allow_nonfinite: bool,
) -> Result<(), NonFinite> {
    let (mode, largest) = if BITS == 4 { (Mode::Mxfp4, 6.0) } else { (Mode::Mxfp8, 448.0) };
    let (mut group, mut codes) = ([0f32; 32], [0u8; 32]);
    let packed = out.weight.chunks_exact_mut(4 * BITS as usize);
    let raws = weights.chunks_exact(32 * E::FLOAT.size());
    for (index, ((raw, weight), scale)) in raws.zip(packed).zip(&mut *out.scales).enumerate() {
        E::widen(raw, &mut group);
        let amax = magnitude_bits(&group);
        if amax >= 0x7F80_0000 && !allow_nonfinite {
            return Err(nonfinite(&group, index * 32));
        }
        let mut t = [f32::from_bits(amax) / largest];
        E::round(&mut t);
        let bits = t[0].to_bits();
        // Zero has scale 1; a subnormal or non-finite t is the reference's.
        if bits != 0 && !(1 << 23..0x7F80_0000).contains(&bits) {
            let out = PackedMut { weight, scales: std::slice::from_mut(scale), biases: &mut [] };
            quantize_reference(mode, E::FLOAT, raw, out, None);
            continue;
        }
        let exponent = if bits == 0 { 127 } else { (bits >> 23) + u32::from(bits & 0x7F_FFFF != 0) };
        let inverse = f32::from_bits((254 - exponent) << 23);
        *scale = exponent as u8;
        if BITS == 4 {
            for (code, value) in codes.iter_mut().zip(&group) {
                *code = e2m1_encode(value * inverse);
            }
            pack::pack::<4>(&codes, weight);
        } else {
            for (code, value) in weight.iter_mut().zip(&group) {
                *code = e4m3_encode(value * inverse);
            }
        }
    }
    Ok(())
}

/// Rounds to E where the result decides an e2m1 code, that is for values that are normal in E.
#[inline(always)]
fn round_normal<E: Element>(value: f32) -> f32 {
    let dropped = match E::FLOAT {
        FloatType::F32 => return value,
        FloatType::F16 => 13,
        FloatType::Bf16 => 16,
    };
    let bits = value.to_bits();
    f32::from_bits((bits + ((1 << (dropped - 1)) - 1) + (bits >> dropped & 1)) & !((1 << dropped) - 1))
}

/// nvfp4 of whole groups of 16.
#[inline(always)]
pub(crate) fn nv<E: Element>(
    weights: &[u8],
    out: PackedMut<'_>,
    global: Option<f32>,
    allow_nonfinite: bool,
) -> Result<(), NonFinite> {
    let spread = global.map_or(1.0, |global| NV_RANGE / global);
    let (mut group, mut codes) = ([0f32; 16], [0u8; 16]);
    let raws = weights.chunks_exact(16 * E::FLOAT.size());
    for (index, ((raw, weight), scale)) in
        raws.zip(out.weight.chunks_exact_mut(8)).zip(&mut *out.scales).enumerate()
    {
        E::widen(raw, &mut group);
        let amax = magnitude_bits(&group);
        if amax >= 0x7F80_0000 && !allow_nonfinite {
            return Err(nonfinite(&group, index * 16));
        }
        let mut t = [f32::from_bits(amax) / 6.0];
        E::round(&mut t);
        let byte = e4m3_encode(t[0] * spread);
        let mut decoded = [E4M3[byte as usize]];
        E::round(&mut decoded);
        let decoded = decoded[0];
        // Codes of a group without scale, of non-finite values and beyond |x| = 8 are the reference's.
        let largest = f32::from_bits(amax) / decoded * spread;
        if !(decoded > 0.0 && largest < 7.9 && spread.is_finite()) {
            let out = PackedMut { weight, scales: std::slice::from_mut(scale), biases: &mut [] };
            quantize_reference(Mode::Nvfp4, E::FLOAT, raw, out, global);
            continue;
        }
        *scale = byte;
        for (code, value) in codes.iter_mut().zip(&group) {
            *code = e2m1_encode(round_normal::<E>(value / decoded) * spread);
        }
        pack::pack::<4>(&codes, weight);
    }
    Ok(())
}
