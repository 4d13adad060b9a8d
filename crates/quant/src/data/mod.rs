//! Calibration and evaluation data: files to documents to token windows.
//!
//! Windows are addressed, not streamed: window i of a source is the same tokens for everyone who reads the same data,
//! and which windows are used is a function of few numbers ([`Pick`]). So workers can take any share of them, a cache
//! knows what it holds by [`Windows::data_hash`], and results name exactly what they were measured on.
//!
//! Data sets may be larger than memory: rows pass one by one, and only as much is read as the windows need
//! (`sample.rs`).
//!
//! Sources stay apart by file, because results are reported by file too.

mod corpus;
mod digest;
mod document;
mod error;
#[cfg(feature = "parquet")]
mod footer;
mod kind;
mod lines;
mod mend;
mod messages;
#[cfg(feature = "parquet")]
mod pages;
#[cfg(feature = "parquet")]
mod parquet;
mod pick;
mod provenance;
mod read;
mod rows;
mod sample;
mod separated;
mod shares;
mod source;
mod suite;
mod text;
mod tokenized;
mod values;
mod windows;

pub use corpus::Corpus;
pub use digest::hexadecimal;
pub use document::OnRefusal;
pub use error::DataError;
pub use kind::DataFile;
pub use pick::Pick;
pub(crate) use pick::permutation;
pub use provenance::{DataReport, Extent, SourceInfo};
pub use shares::{CALIBRATION_WINDOWS, Shares, Split, TrainingShares, VALIDATION_WINDOWS};
pub use source::DataSource;
pub use suite::{Choice, Question, Suite};
pub use windows::{Window, Windows};

#[cfg(test)]
mod tests;
