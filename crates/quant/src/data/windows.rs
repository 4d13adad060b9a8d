//! Token windows: the unit of calibration and evaluation.

use sha2::{Digest as _, Sha256};

use super::digest::{hexadecimal, update};
use super::{DataReport, Pick, SourceInfo};

/// One window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which source, an index into [`Windows::sources`].
    pub source: usize,
    /// Which window of that source.
    pub index: usize,
    /// Ids, `sequence_length` of them, the tokenizer's beginning-of-text token first if it has one.
    pub tokens: Vec<u32>,
}

/// The windows that are used, and where they came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens a window.
    pub sequence_length: usize,
    /// How they were picked.
    pub pick: Pick,
    /// The windows, in the order of the pick.
    pub picked: Vec<Window>,
    /// All sources.
    pub sources: Vec<SourceInfo>,
    /// SHA-256 of all tokens of all sources, lower-case hexadecimal. With `sequence_length` and `pick` it determines
    /// every window, whatever the files are called.
    pub data_hash: String,
}

impl Windows {
    /// SHA-256 over all tokens of the windows, lower-case hexadecimal.
    pub fn tokens_hash(&self) -> String {
        let mut hash = Sha256::new();
        self.picked.iter().for_each(|window| update(&mut hash, &window.tokens));
        hexadecimal(&hash.finalize())
    }

    /// Some of these windows, in their order: a share of the data for a purpose of its own.
    ///
    /// # Panics
    /// If the range lies outside.
    #[must_use]
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let picked = self.picked[range].to_vec();
        let mut sources = self.sources.clone();
        for (index, source) in sources.iter_mut().enumerate() {
            source.windows_picked = picked.iter().filter(|window| window.source == index).count();
        }
        Self { picked, sources, ..self.clone() }
    }

    /// What is written into provenance and results.
    pub fn report(&self) -> DataReport<'_> {
        DataReport {
            sequence_length: self.sequence_length,
            windows: self.picked.len(),
            pick: self.pick,
            data_hash: &self.data_hash,
            sources: &self.sources,
        }
    }
}
