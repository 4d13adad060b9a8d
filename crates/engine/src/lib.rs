//! Tensors and what is done with them.
//!
//! [`Engine`] is one trait with two kinds of operations. *Elementary* ones (map, combine, arrange, reduce, multiply,
//! rows) every engine must have. *Coarse* ones (a linear layer, a norm, attention, a Gram matrix) have a form that is
//! made of elementary ones; an engine overrides those for which it has something faster. So a new engine gives right
//! results as soon as it has the elementary operations, and becomes fast one operation at a time.
//!
//! [`Tensor`] is a handle: a shape, and a buffer that lies where its engine put it. Above this crate nobody looks into
//! a buffer or depends on what computes. A tensor that was made of a variable remembers how it was made;
//! [`Tensor::gradients`] follows that back.
//!
//! There are three engines: [`Cpu`] (fused operations, faer's products, one thread a call), [`Plain`] (slow and obvious:
//! the reference of the test suite in `tests/`, which runs over all engines) and, with the feature `gpu`, `gpu::Gpu`
//! (graphics cards, through Vulkan or Metal).

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
#[cfg(feature = "gpu")]
pub mod gpu;
mod gram;
mod learning;
mod losses;
mod operators;
mod plain;
pub mod rounding;
mod routing;
pub mod running;
mod second_order;
mod settings;
mod shape;
pub mod slopes;
mod tape;
mod tensor;
mod usage;
mod views;

pub use cpu::{Cpu, PARTS};
pub use elementary::{Buffer, Combine, Map, Reduce};
pub use engine::{Device, Engine};
pub use error::{Error, Result};
pub use gram::{Factor, Gram, GramSum};
pub use learning::{Learning, LearningStart, LearningState};
pub use losses::{Candidates, Labels, Likeliest};
pub use plain::Plain;
pub use routing::{Groups, Selection};
pub use second_order::SecondOrder;
pub use settings::{
    Activation, AdamInputs, AdamStep, AttentionSettings, Codes, GridSlopes, Held, Notebook, Observed,
    Pairing, Precision, Unit, by_group,
};
pub use shape::{Axis, IntoShape, LAST, REST, View};
pub use tape::{Gradients, Pull};
pub use tensor::Tensor;
pub use usage::{Capacity, MemoryUse, Spent};

/// The CPU engine.
pub fn cpu() -> Device {
    Device::new(Cpu::default())
}

/// The engine of a graphics card.
///
/// # Errors
/// If there is no such adapter, or it cannot be opened; the message says what to do.
#[cfg(feature = "gpu")]
pub fn gpu(choice: &gpu::AdapterChoice) -> Result<Device> {
    Ok(Device::new(gpu::Gpu::open(choice)?))
}

/// The reference: the engine that tests compare the others with.
pub fn plain() -> Device {
    Device::new(Plain)
}
