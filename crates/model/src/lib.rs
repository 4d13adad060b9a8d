//! Language models as data, and one forward pass for all of them.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

pub mod arch;
mod chat;
mod error;
mod existing;
mod names;
mod tokenizer;
mod view;

pub use arch::Architecture;
pub use error::SourceError;
pub use existing::Existing;
pub use names::Named;
pub use tokenizer::{Tokenizer, TokenizerError};
pub use view::{StepError, View};
