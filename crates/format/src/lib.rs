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
mod packed;
mod scheme;

pub use dispatch::{dequantize, pack, quantize, simd_name, unpack};
pub use element::{FloatType, NonFinite};
pub use packed::{PackedMut, PackedRef};
pub use safetensors::Dtype;
pub use scheme::{Mode, Scheme, SchemeError};
