//! Run-time choice of instruction set, dtype, mode and width.
//!
//! The kernels are plain loops marked `inline(always)`; [`pulp`] compiles each of them once per instruction
//! set (baseline, AVX2, AVX-512, NEON) and picks at run time. Rust never contracts to fused multiply-add by
//! itself, so the choice changes speed and not one bit.

use pulp::{Arch, WithSimd};

use crate::affine::pack::with_bits;
use crate::element::{Bf16, Element, F16, F32};
use crate::{FloatType, Mode, NonFinite, PackedMut, PackedRef, Scheme, affine, fp};

struct Quantize<'a> {
    scheme: Scheme,
    float: FloatType,
    weights: &'a [u8],
    out: PackedMut<'a>,
    allow_nonfinite: bool,
}

impl WithSimd for Quantize<'_> {
    type Output = Result<(), NonFinite>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> Self::Output {
        match self.float {
            FloatType::F32 => quantize_element::<S, F32>(simd, self),
            FloatType::F16 => quantize_element::<S, F16>(simd, self),
            FloatType::Bf16 => quantize_element::<S, Bf16>(simd, self),
        }
    }
}

#[inline(always)]
fn quantize_element<S: pulp::Simd, E: Element>(simd: S, task: Quantize<'_>) -> Result<(), NonFinite> {
    let Quantize { scheme, weights, out, allow_nonfinite, .. } = task;
    match scheme.mode() {
        Mode::Affine => with_bits!(scheme.bits(), BITS => {
            affine::quantize::quantize::<S, E, BITS>(simd, scheme, weights, out, allow_nonfinite)
        }),
        Mode::Mxfp4 => fp::quantize::mx::<E, 4>(weights, out, allow_nonfinite),
        Mode::Mxfp8 => fp::quantize::mx::<E, 8>(weights, out, allow_nonfinite),
        Mode::Nvfp4 => fp::quantize::nv::<E>(weights, out, None, allow_nonfinite),
    }
}

struct Dequantize<'a> {
    scheme: Scheme,
    float: FloatType,
    packed: PackedRef<'a>,
    out: &'a mut [u8],
}

impl WithSimd for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        match self.float {
            FloatType::F32 => dequantize_element::<F32>(self),
            FloatType::F16 => dequantize_element::<F16>(self),
            FloatType::Bf16 => dequantize_element::<Bf16>(self),
        }
    }
}

#[inline(always)]
fn dequantize_element<E: Element>(task: Dequantize<'_>) {
    let Dequantize { scheme, packed, out, .. } = task;
    match scheme.mode() {
        Mode::Affine => {
            with_bits!(scheme.bits(), BITS => affine::dequantize::dequantize::<E, BITS>(scheme, packed, out));
        }
        mode => fp::dequantize::<E>(mode, packed, out),
    }
}

fn check_lengths(scheme: Scheme, float: FloatType, elements: usize, columns: usize, packed: [usize; 3]) {
    assert!(scheme.divides(columns), "{columns} columns do not divide into {scheme}");
    assert!(elements.is_multiple_of(columns), "{elements} elements are no whole rows of {columns}");
    let rows = elements / columns;
    let scales = rows * scheme.scale_bytes(columns, float);
    let expected = [rows * scheme.words(columns) * 4, scales, if scheme.has_biases() { scales } else { 0 }];
    assert_eq!(packed, expected, "bytes of weight, scales, biases for {rows} rows of {columns} at {scheme}");
}

/// Quantizes whole rows on this thread.
///
/// `weights` holds rows of `columns` elements of dtype `float`; lengths of `out` as [`PackedMut`] says.
/// Equal to `mx.quantize(w, group_size, bits, mode)` of MLX 0.32.4 on CPU.
///
/// # Errors
/// [`NonFinite`] at the first NaN or infinity; with `allow_nonfinite` those groups are stored as MLX stores
/// them on x86-64 instead: affine ones decode to NaN, those of the fp modes to something wrong but finite.
///
/// # Panics
/// If the lengths do not fit together.
pub fn quantize(
    scheme: Scheme,
    float: FloatType,
    columns: usize,
    weights: &[u8],
    out: PackedMut<'_>,
    allow_nonfinite: bool,
) -> Result<(), NonFinite> {
    let lengths = [out.weight.len(), out.scales.len(), out.biases.len()];
    check_lengths(scheme, float, weights.len() / float.size(), columns, lengths);
    Arch::new().dispatch(Quantize { scheme, float, weights, out, allow_nonfinite })
}

/// Packs codes of whole rows (every one below `2^bits`) into the words of an affine scheme.
///
/// # Panics
/// If `out` does not hold as many bytes as the codes take.
pub fn pack(scheme: Scheme, codes: &[u8], out: &mut [u8]) {
    assert!(codes.len().is_multiple_of(32) && out.len() * 8 == codes.len() * scheme.bits() as usize);
    Arch::new().dispatch(Pack { bits: scheme.bits(), codes, out });
}

struct Pack<'a> {
    bits: u32,
    codes: &'a [u8],
    out: &'a mut [u8],
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        with_bits!(self.bits, BITS => affine::pack::pack::<BITS>(self.codes, self.out));
    }
}

/// Inverse of [`pack`].
///
/// # Panics
/// If `codes` does not hold as many codes as there are.
pub fn unpack(scheme: Scheme, packed: &[u8], codes: &mut [u8]) {
    assert!(codes.len().is_multiple_of(32) && packed.len() * 8 == codes.len() * scheme.bits() as usize);
    Arch::new().dispatch(Unpack { bits: scheme.bits(), packed, codes });
}

struct Unpack<'a> {
    bits: u32,
    packed: &'a [u8],
    codes: &'a mut [u8],
}

impl WithSimd for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        with_bits!(self.bits, BITS => affine::pack::unpack::<BITS>(self.packed, self.codes));
    }
}

/// Decodes whole rows on this thread into dtype `float` (the dtype of affine scales and biases; free for the
/// fp modes). Equal to `mx.dequantize` of MLX 0.32.4 on CPU.
///
/// # Panics
/// If the lengths do not fit together.
pub fn dequantize(scheme: Scheme, float: FloatType, columns: usize, packed: PackedRef<'_>, out: &mut [u8]) {
    let lengths = [packed.weight.len(), packed.scales.len(), packed.biases.len()];
    check_lengths(scheme, float, out.len() / float.size(), columns, lengths);
    Arch::new().dispatch(Dequantize { scheme, float, packed, out });
}

/// The instruction set that the kernels run with on this machine, for reports.
pub fn simd_name() -> &'static str {
    struct Name;
    impl WithSimd for Name {
        type Output = &'static str;
        fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
            match S::F32_LANES {
                16 => "AVX-512",
                8 => "AVX2",
                4 => "128-bit",
                _ => "scalar",
            }
        }
    }
    Arch::new().dispatch(Name)
}
