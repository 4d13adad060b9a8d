//! Models and data from a hub on loopback, and models to it.
//!
//! Every command runs with a fake token; that it appears in no output and in no file is looked at after each test.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

#[path = "../common/mod.rs"]
mod common;

mod caches;
mod cards;
mod data;
mod download;
mod faults;
mod guide;
mod listing;
mod machine;
mod names;
mod place;
mod refusals;
mod stream;
mod upload;
