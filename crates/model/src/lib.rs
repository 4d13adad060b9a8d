//! Language models as data, and one forward pass for all of them.
//!
//! [`arch`] knows what each model type's checkpoint holds and how its decoder is built, in the vocabulary of
//! [`decoder`]; [`Weights`] reads tensors as float32, one block at a time; [`Forward`] interprets the description with the
//! operations of [`ops`].

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

pub mod arch;
mod chat;
pub mod decoder;
mod error;
mod existing;
mod expected;
mod forward;
mod headers;
pub mod mixers;
mod names;
pub mod ops;
mod parameters;
mod pieces;
mod tokenizer;
mod view;
mod weights;

pub use arch::Architecture;
pub use decoder::{Decoder, Producer, Site};
pub use error::SourceError;
pub use existing::Existing;
pub use expected::ExpectedTensor;
pub use forward::{Course, Forward, Progress, State, Stop, Tap};
pub use headers::expected_headers;
pub use names::Named;
pub use parameters::{Parameters, Reader};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use view::{ScatterError, StepError, View};
pub use weights::{PackedRows, Weights, WeightsError};
