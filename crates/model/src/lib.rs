//! Language models as data, and one forward pass for all of them.
//!
//! [`arch`] knows what each model type's checkpoint holds and how its decoder is built, in the vocabulary of
//! [`decoder`]; [`Weights`] reads tensors as float32, one block at a time; [`Forward`] interprets the description with the
//! operations of an [`Engine`](mlx_quant_engine::Engine).

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

pub mod arch;
mod asked;
mod chat;
mod contained;
pub mod decoder;
mod end_of_turn;
mod error;
mod existing;
mod fit;
mod forward;
mod headers;
pub mod known;
mod matrix;
pub mod mixers;
mod names;
mod ops;
mod packing;
mod parameters;
mod pieces;
mod tied;
mod tokenizer;
mod tokenizer_error;
mod view;
mod weights;

pub use arch::Architecture;
pub use contained::{contained, is_contained};
pub use decoder::{Decoder, ExpectedTensor, Producer, Site};
pub use end_of_turn::{end_of_text, end_of_turn};
pub use error::SourceError;
pub use existing::{Existing, listed};
pub use fit::{Fault, Misfit, Misfits, without_numbers};
pub use forward::{Course, Forward, Progress, State, Stop, Tables, Tap};
pub use headers::expected_headers;
pub use names::{Heads, Named, SharedNames, Taken};
pub use packing::{Awq, Gptq, Group, Packing};
pub use parameters::{Parameters, Reader};
pub use tokenizer::Tokenizer;
pub use tokenizer_error::TokenizerError;
pub use view::{Change, ScatterError, StepError, View};
pub use weights::{PackedRows, Weights, WeightsError};
