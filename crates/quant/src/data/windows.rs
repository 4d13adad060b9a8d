//! Token windows: the unit of calibration and evaluation.

use mlx_quant_model::Tokenizer;
use sha2::{Digest as _, Sha256};

use super::sample::Demand;
use super::source::hexadecimal;
use super::{Corpus, DataError, DataReport, DataSource, OnRefusal, Pick, SourceInfo};

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

    /// Reads as much of a data set as the windows need, and picks them. Data sets of up to 64 MiB of text are read
    /// whole and have the windows of [`Corpus::read`] and [`Corpus::windows`]; of larger ones a part is read
    /// ([`SourceInfo::extent`]). Rows that the chat template refuses are left out.
    ///
    /// # Errors
    /// As these two.
    pub fn read(
        data: &DataSource,
        tokenizer: &Tokenizer,
        vocabulary: usize,
        sequence_length: usize,
        pick: Pick,
    ) -> Result<Self, DataError> {
        Self::read_with(data, tokenizer, vocabulary, sequence_length, pick, OnRefusal::LeaveOut)
    }

    /// As [`Windows::read`], with a word on rows that the chat template refuses.
    ///
    /// # Errors
    /// As [`Windows::read`], and for the first such row with [`OnRefusal::Stop`].
    pub fn read_with(
        data: &DataSource,
        tokenizer: &Tokenizer,
        vocabulary: usize,
        sequence_length: usize,
        pick: Pick,
        on_refusal: OnRefusal,
    ) -> Result<Self, DataError> {
        if sequence_length < 2 {
            return Err(DataError::SequenceLength(sequence_length));
        }
        let demand = Demand { sequence_length, pick };
        Corpus::sample(data, tokenizer, vocabulary, demand, on_refusal)?.windows(sequence_length, pick)
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

/// Adds a list of ids to a hash, with its length.
pub(super) fn update(hash: &mut Sha256, ids: &[u32]) {
    hash.update((ids.len() as u64).to_le_bytes());
    for id in ids {
        hash.update(id.to_le_bytes());
    }
}
