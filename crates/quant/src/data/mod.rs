//! Calibration and evaluation data: files to documents to token windows.
//!
//! Windows are addressed, not streamed: window i of a source is the same tokens for everyone who reads the same data, and
//! which windows are used is a function of few numbers ([`Pick`]). So workers can take any share of them, a cache
//! knows what it holds by [`Windows::data_hash`], and results name exactly what they were measured on.
//!
//! Sources stay apart by file, because results are reported by file too.

mod document;
mod error;
mod jsonl;
#[cfg(feature = "parquet")]
mod parquet;
mod pick;
mod source;
mod windows;

pub use error::DataError;
pub use pick::Pick;
pub(crate) use pick::permutation;
pub use source::DataSource;
pub use source::hexadecimal;
pub use windows::{Corpus, DataReport, SourceInfo, Window, Windows};

#[cfg(test)]
mod tests;
