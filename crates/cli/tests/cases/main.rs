//! Checkpoints and texts as people really have them: what goes out is right, or it is refused before any work.
//!
//! Each test stands for a kind of fault that public reports speak of, with several instances; `given` holds the cases that the
//! project collected, the others add more of each kind.

#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

#[path = "../common/mod.rs"]
mod common;

mod files;
mod given;
mod model;
mod settings;
mod undescribed;
mod whole;
