//! What must hold for any bytes, once for cargo-fuzz (`fuzz/`) and for tests on stable Rust (`tests/stable`).
//!
//! A body reads bytes as one kind of input that comes from outside. Every one of them promises that reading ends, in a value or in
//! an error that names the file and says what to do next: no panic, no gigabyte of memory, no endless time. What a body checks
//! beyond that stands at the body. It panics where a promise is broken, and [`attempt`] turns that into the end of the process; time and
//! memory are the runners' to watch.

mod chat;
mod checkpoint;
mod data;
mod guard;
mod kept;
mod recipe;
mod tokenizer;
mod work;

pub use chat::chat;
pub use checkpoint::{config, header, index, plan};
pub use data::{csv, jsonl, parquet};
pub use guard::attempt;
pub use kept::{kept_seeds, sensitivities, statistics};
pub use recipe::recipe;
pub use tokenizer::tokenizer;

/// A kind of input.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As the directory of its seeds is called.
    pub name: &'static str,
    /// Panics if the bytes break a promise.
    pub body: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 12] = [
    Target { name: "header", body: header },
    Target { name: "index", body: index },
    Target { name: "config", body: config },
    Target { name: "plan", body: plan },
    Target { name: "chat", body: chat },
    Target { name: "jsonl", body: jsonl },
    Target { name: "parquet", body: parquet },
    Target { name: "csv", body: csv },
    Target { name: "recipe", body: recipe },
    Target { name: "sensitivities", body: sensitivities },
    Target { name: "statistics", body: statistics },
    Target { name: "tokenizer", body: tokenizer },
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
