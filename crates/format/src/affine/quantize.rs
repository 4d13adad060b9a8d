//! The vectorised affine quantizer.
//!
//! Rows are walked in tiles of 16 groups: extremes per group, then the parameters of all 16 groups side by
//! side (their three divisions would otherwise stall every group), then codes and packing. All arithmetic is
//! lane-wise IEEE float32 in the order of the reference, so every instruction set gives the same bits.

use pulp::Simd;

use super::{EPS, pack};
use crate::element::{Element, all_finite};
use crate::{NonFinite, PackedMut, Scheme};

/// Groups handled side by side.
const TILE: usize = 16;
/// Largest group size.
const MAX_GROUP: usize = 128;
/// 1.5 * 2^23: adding it to a float32 below 2^22 rounds to an integer, halves to even, into the low bits.
const ROUND: f32 = 12_582_912.0;
/// Largest and smallest element of a group of finite values; its length is a multiple of the vector's.
#[inline(always)]
fn extremes<S: Simd>(simd: S, group: &[f32]) -> (f32, f32) {
    let (vectors, _) = S::as_simd_f32s(group);
    let (mut hi, mut lo) = (vectors[0], vectors[0]);
    for vector in &vectors[1..] {
        hi = simd.max_f32s(hi, *vector);
        lo = simd.min_f32s(lo, *vector);
    }
    (simd.reduce_max_f32s(hi), simd.reduce_min_f32s(lo))
}

/// Steps 2 to 4 of the module's arithmetic for 16 groups at once.
#[inline(always)]
fn parameters(
    hi: &[f32; TILE],
    lo: &[f32; TILE],
    n: f32,
    scales: &mut [f32; TILE],
    biases: &mut [f32; TILE],
) {
    for i in 0..TILE {
        let (hi, lo) = (hi[i], lo[i]);
        let step = (hi - lo) / n;
        let step = if step < EPS { EPS } else { step };
        let negative = lo.abs() > hi.abs();
        let scale = if negative { step } else { -step };
        let edge = if negative { lo } else { hi };
        let q0 = (edge / scale).round_ties_even();
        let plain = q0 == 0.0;
        let refined = edge / q0;
        scales[i] = if plain { scale } else { refined };
        biases[i] = if plain { 0.0 } else { edge };
    }
}

/// Step 5 for one group of finite values: the quotient is clamped before it is rounded, which is the same.
#[inline(always)]
fn encode(group: &[f32], scale: f32, bias: f32, n: f32, codes: &mut [u8]) {
    for (codes, values) in codes.as_chunks_mut::<32>().0.iter_mut().zip(group.as_chunks::<32>().0) {
        for (code, value) in codes.iter_mut().zip(values) {
            let quotient = (value - bias) / scale;
            let quotient = if quotient > 0.0 { quotient } else { 0.0 };
            let quotient = if quotient < n { quotient } else { n };
            *code = (quotient + ROUND).to_bits() as u8;
        }
    }
}

/// Asks for the cache lines of a later tile; the hardware's own prefetching stops at every page.
#[inline(always)]
fn prefetch(bytes: &[u8], start: usize, length: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(ahead) = bytes.get(start..(start + length).min(bytes.len())) {
        for line in ahead.chunks(64) {
            // SAFETY: SSE is part of x86-64, and a prefetch has no effect on memory.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast());
            };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, start, length);
}

/// Whole groups of `weights` (dtype E) into `out`. A group with NaN or infinity is handled by the reference
/// if `allow_nonfinite`, else it ends the call.
#[inline(always)]
pub(crate) fn quantize<S: Simd, E: Element, const BITS: u32>(
    simd: S,
    scheme: Scheme,
    weights: &[u8],
    out: PackedMut<'_>,
    allow_nonfinite: bool,
) -> Result<(), NonFinite> {
    let group = scheme.group_size();
    let size = E::FLOAT.size();
    let n = ((1u32 << BITS) - 1) as f32;
    let mut values = [0f32; TILE * MAX_GROUP];
    let mut codes = [0u8; TILE * MAX_GROUP];
    let (mut hi, mut lo) = ([0f32; TILE], [0f32; TILE]);
    let (mut scales, mut biases) = ([0f32; TILE], [0f32; TILE]);
    let packed_group = group * BITS as usize / 8;

    let all = weights;
    for (tile, weights) in weights.chunks(TILE * group * size).enumerate() {
        prefetch(all, (tile + 2) * TILE * group * size, TILE * group * size);
        let groups = weights.len() / (group * size);
        let values = &mut values[..groups * group];
        E::widen(weights, values);
        let first = tile * TILE;
        let out_scales = &mut out.scales[first * size..][..groups * size];
        let out_biases = &mut out.biases[first * size..][..groups * size];
        let out_weight = &mut out.weight[first * packed_group..][..groups * packed_group];
        // One bit keeps the sign of the first zero (see the reference), which lanes do not.
        if BITS == 1 || !all_finite(values) {
            if !allow_nonfinite && let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(NonFinite { element: first * group + at, value: values[at] });
            }
            let out = PackedMut { weight: out_weight, scales: out_scales, biases: out_biases };
            super::quantize_reference(scheme, E::FLOAT, weights, out);
            continue;
        }
        for (i, group) in values.chunks_exact(group).enumerate() {
            (hi[i], lo[i]) = extremes(simd, group);
        }
        parameters(&hi, &lo, n, &mut scales, &mut biases);
        let codes = &mut codes[..groups * group];
        for (i, (group, codes)) in values.chunks_exact(group).zip(codes.chunks_exact_mut(group)).enumerate() {
            encode(group, scales[i], biases[i], n, codes);
        }
        pack::pack::<BITS>(codes, out_weight);
        E::narrow(&scales[..groups], out_scales);
        E::narrow(&biases[..groups], out_biases);
    }
    Ok(())
}
