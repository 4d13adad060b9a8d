//! Tensors and what is done with them.
//!
//! [`Engine`] is one trait with two kinds of operations. *Elementary* ones (map, combine, arrange, reduce, multiply, rows) are what an
//! engine must have. *Coarse* ones (a linear layer, a norm, attention, a Gram matrix) are made of the elementary ones where
//! an engine has nothing better ([`plain`]); an engine overrides those that matter to it. So a new engine is right from
//! its first day and becomes fast operation by operation.
//!
//! [`Tensor`] is a handle: a shape and a buffer that lives where its engine put it. Above this crate nobody looks into
//! the buffer or knows what computes. [`Tensor::gradients`] goes back along the tape, which is the tensors themselves: each
//! remembers what it was made of, if a variable was among it.
//!
//! Engines: [`cpu`] (fused operations, faer's products, one thread a call) and [`plain`] (slow and obvious, the reference of the test
//! suite in `tests/`, which runs over all of them).

#![allow(
    clippy::inline_always,
    reason = "a loop gets the instruction set of its caller only where it is inlined"
)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

mod cpu;
mod elementary;
mod engine;
mod error;
pub mod exp;
mod gram;
mod operators;
mod plain;
pub mod rounding;
mod routing;
mod settings;
mod shape;
mod tape;
mod tensor;
mod views;

pub use cpu::{Cpu, PARTS};
pub use cpu::{running, slopes};
pub use elementary::{Buffer, Combine, Map, Reduce};
pub use engine::{Device, Engine};
pub use error::{Error, Result};
pub use gram::{Factor, Gram, GramSum};
pub use plain::Plain;
pub use routing::{Groups, Selection};
pub use settings::{Activation, AttentionSettings, Codes, Notebook, Observed, Pairing, by_group};
pub use shape::{Axis, IntoShape, LAST, REST, View};
pub use tape::{Gradients, Pull};
pub use tensor::Tensor;

/// The CPU engine.
pub fn cpu() -> Device {
    Device::new(Cpu)
}

/// The engine that the tests hold the others against.
pub fn plain() -> Device {
    Device::new(Plain)
}
