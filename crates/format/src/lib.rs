//! The MLX quantized model format: arithmetic, packing and checkpoint files.
//!
//! Everything works on little-endian bytes, any alignment, any number of whole rows at once, so that a
//! converter can stream a memory-mapped checkpoint through it. No tensor engine, no network, no terminal.
//!
//! * [`quantize`] and [`dequantize`]: bit for bit what `mx.quantize` and `mx.dequantize` compute on MLX's CPU
//!   backend, on the thread that calls. Rows are independent, so that a program may spread them over threads.
//! * [`affine`] and [`fp`]: the arithmetic, written out; their module docs are the specification.
//! * [`checkpoint`]: reading and writing directories of safetensors files.
#![allow(
    clippy::inline_always,
    reason = "kernels must inline into the function that pulp compiles per instruction set"
)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

pub mod affine;
pub mod checkpoint;
mod dispatch;
mod element;
pub mod fp;
mod scheme;

pub use dispatch::{dequantize, pack, quantize, simd_name, unpack};
pub use element::FloatType;
pub use safetensors::Dtype;
pub use scheme::{Mode, Scheme, SchemeError};

/// Where the packed form of some rows goes. For `rows` rows of `columns` elements:
/// `weight` has `rows * scheme.words(columns) * 4` bytes (uint32 words, little-endian), `scales` and `biases`
/// `rows * scheme.scale_bytes(columns, float)`; `biases` is empty for the fp modes.
#[derive(Debug)]
pub struct PackedMut<'a> {
    /// Packed codes.
    pub weight: &'a mut [u8],
    /// One scale per group.
    pub scales: &'a mut [u8],
    /// One bias per group, affine only.
    pub biases: &'a mut [u8],
}

/// The packed form of some rows; lengths as in [`PackedMut`].
#[derive(Clone, Copy, Debug)]
pub struct PackedRef<'a> {
    /// Packed codes.
    pub weight: &'a [u8],
    /// One scale per group.
    pub scales: &'a [u8],
    /// One bias per group, affine only.
    pub biases: &'a [u8],
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
