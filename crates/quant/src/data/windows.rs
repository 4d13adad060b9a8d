//! Token windows: the unit of calibration and evaluation.

use mlx_quant_model::Tokenizer;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::pick::{evenly_spaced, sampled};
use super::source::{Source, hexadecimal};
use super::{DataError, DataSource, Pick};

/// All tokens of a data set, source by source. Windows are cut from it by address, so that any window can be had
/// without the ones before it.
#[derive(Clone, Debug)]
pub struct Corpus {
    sources: Vec<Tokens>,
    prefix: Vec<u32>,
    data_hash: String,
}

/// One tokenized file.
#[derive(Clone, Debug)]
struct Tokens {
    name: String,
    path: String,
    sha256: String,
    documents: usize,
    ids: Vec<u32>,
}

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

/// Where windows came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// File name.
    pub name: String,
    /// Of the file's bytes, lower-case hexadecimal.
    pub sha256: String,
    /// How many documents it holds.
    pub documents: usize,
    /// How many tokens all of them have, separators included.
    pub tokens: usize,
    /// How many windows could be taken.
    pub windows_total: usize,
    /// How many were.
    pub windows_picked: usize,
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

/// What is written into provenance and results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataReport<'a> {
    /// Tokens a window.
    pub sequence_length: usize,
    /// How many windows are used.
    pub windows: usize,
    /// How they were picked.
    pub pick: Pick,
    /// See [`Windows::data_hash`].
    pub data_hash: &'a str,
    /// All sources.
    pub sources: &'a [SourceInfo],
}

impl Corpus {
    /// Reads and tokenizes a data set for a model with `vocabulary` token ids.
    ///
    /// Documents of one source follow each other with the tokenizer's end-of-text token between them, if it has one.
    ///
    /// # Errors
    /// [`DataError`] if a file cannot be read or understood, or has tokens that the model does not know.
    pub fn read(data: &DataSource, tokenizer: &Tokenizer, vocabulary: usize) -> Result<Self, DataError> {
        let prefix = tokenizer.prefix().to_vec();
        let mut hash = Sha256::new();
        update(&mut hash, &prefix);
        let mut sources = Vec::new();
        for source in data.read()? {
            let documents = source.documents.len();
            let ids = tokenize(&source, tokenizer)?;
            let Source { name, path, sha256, .. } = source;
            if let Some(id) = prefix.iter().chain(&ids).find(|id| **id as usize >= vocabulary) {
                return Err(DataError::Vocabulary { file: path, id: *id, vocabulary });
            }
            update(&mut hash, &ids);
            sources.push(Tokens { name, path, sha256, documents, ids });
        }
        Ok(Self { sources, prefix, data_hash: hexadecimal(&hash.finalize()) })
    }

    /// What stands in front of each window: the beginning-of-text token, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// How many windows each source has.
    ///
    /// # Errors
    /// If `sequence_length` is below 2, or a source is shorter than a window.
    pub fn windows_total(&self, sequence_length: usize) -> Result<Vec<usize>, DataError> {
        let stride = self.stride(sequence_length)?;
        let total = |source: &Tokens| match source.ids.len() / stride {
            0 => Err(DataError::TooShort {
                file: source.path.clone(),
                found: source.ids.len(),
                needed: stride,
            }),
            windows => Ok(windows),
        };
        self.sources.iter().map(total).collect()
    }

    /// Picks windows of `sequence_length` tokens.
    ///
    /// # Errors
    /// If `sequence_length` is below 2, or a source is shorter than a window.
    pub fn windows(&self, sequence_length: usize, pick: Pick) -> Result<Windows, DataError> {
        let totals = self.windows_total(sequence_length)?;
        let addresses = match pick {
            Pick::EvenlySpaced { windows } => {
                let of_source = |(source, total): (usize, &usize)| {
                    evenly_spaced(*total, windows).into_iter().map(move |index| (source, index))
                };
                totals.iter().enumerate().flat_map(of_source).collect()
            }
            Pick::Sampled { windows, seed } => {
                let drawn = sampled(totals.iter().sum(), windows, seed);
                drawn.into_iter().map(|place| address(&totals, place)).collect::<Vec<_>>()
            }
        };
        let picked = addresses
            .iter()
            .map(|&(source, index)| self.window(source, index, sequence_length))
            .collect::<Result<Vec<_>, _>>()?;
        let info = |(index, source): (usize, &Tokens)| SourceInfo {
            name: source.name.clone(),
            sha256: source.sha256.clone(),
            documents: source.documents,
            tokens: source.ids.len(),
            windows_total: totals[index],
            windows_picked: addresses.iter().filter(|(of, _)| *of == index).count(),
        };
        Ok(Windows {
            sequence_length,
            pick,
            picked,
            sources: self.sources.iter().enumerate().map(info).collect(),
            data_hash: self.data_hash.clone(),
        })
    }

    /// Tokens of text a window.
    fn stride(&self, sequence_length: usize) -> Result<usize, DataError> {
        if sequence_length < 2 {
            return Err(DataError::SequenceLength(sequence_length));
        }
        Ok(sequence_length - self.prefix.len())
    }

    fn window(&self, source: usize, index: usize, sequence_length: usize) -> Result<Window, DataError> {
        let stride = self.stride(sequence_length)?;
        let text = &self.sources[source].ids[index * stride..(index + 1) * stride];
        Ok(Window { source, index, tokens: [&self.prefix, text].concat() })
    }
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

    /// Reads a data set and picks windows: [`Corpus::read`] and [`Corpus::windows`] in one.
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
        if sequence_length < 2 {
            return Err(DataError::SequenceLength(sequence_length));
        }
        Corpus::read(data, tokenizer, vocabulary)?.windows(sequence_length, pick)
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

fn tokenize(source: &Source, tokenizer: &Tokenizer) -> Result<Vec<u32>, DataError> {
    let mut ids: Vec<u32> = Vec::new();
    for (number, document) in &source.documents {
        // A template may have written the end of the text out already.
        if let Some(end) = tokenizer.end_of_text()
            && ids.last().is_some_and(|last| *last != end)
        {
            ids.push(end);
        }
        let text = document.render(tokenizer);
        let encoded =
            text.and_then(|text| tokenizer.encode(&text)).map_err(|error| DataError::Tokenizer {
                file: source.path.clone(),
                place: format!("{} {number}", source.unit),
                error,
            })?;
        ids.extend(encoded);
    }
    Ok(ids)
}

/// Source and window of a place in the row of all windows of all sources.
fn address(totals: &[usize], mut place: usize) -> (usize, usize) {
    let mut source = 0;
    while place >= totals[source] {
        place -= totals[source];
        source += 1;
    }
    (source, place)
}

fn update(hash: &mut Sha256, ids: &[u32]) {
    hash.update((ids.len() as u64).to_le_bytes());
    for id in ids {
        hash.update(id.to_le_bytes());
    }
}
