//! Where windows came from, for results and for people.

use serde::{Deserialize, Serialize};

use super::Pick;
use crate::numbers::bytes;

/// Which part of a file was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// All of it.
    #[default]
    Whole,
    /// Some of it at many places, spread evenly.
    Spread,
    /// Its beginning.
    Beginning,
}

/// A file that windows came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// File name.
    pub name: String,
    /// Of the bytes that were read, lower-case hexadecimal.
    pub sha256: String,
    /// How many documents were read.
    pub documents: usize,
    /// How many tokens all of them have, separators included.
    pub tokens: usize,
    /// How many windows could be taken.
    pub windows_total: usize,
    /// How many were.
    pub windows_picked: usize,
    /// Which part of the file was read.
    #[serde(default)]
    pub extent: Extent,
    /// How many bytes these are.
    #[serde(default)]
    pub bytes_read: u64,
    /// Size of the file in bytes.
    #[serde(default)]
    pub bytes_total: u64,
    /// Rows that the chat template refused; no window has them.
    #[serde(default)]
    pub rows_left_out: usize,
    /// Where the first of them stands, and why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_left_out: Option<String>,
}

impl SourceInfo {
    /// What of the file was read, in words; nothing if it was read whole.
    pub fn part_read(&self) -> Option<String> {
        let how = match self.extent {
            Extent::Whole => return None,
            Extent::Spread => "evenly spaced",
            Extent::Beginning => "from its beginning",
        };
        Some(format!("read {} of {}, {how}", bytes(self.bytes_read), bytes(self.bytes_total)))
    }

    /// Which rows were left out, in words; nothing if none was.
    pub fn left_out(&self) -> Option<String> {
        let first = self.first_left_out.as_ref()?;
        let rows = self.documents + self.rows_left_out;
        Some(format!("{} of {rows} rows left out: {first}", self.rows_left_out))
    }
}

/// What is written into provenance and results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataReport<'a> {
    /// Tokens a window.
    pub sequence_length: usize,
    /// How many windows are used.
    pub windows: usize,
    /// How they were picked.
    pub pick: Pick,
    /// See [`super::Windows::data_hash`].
    pub data_hash: &'a str,
    /// All sources.
    pub sources: &'a [SourceInfo],
}
