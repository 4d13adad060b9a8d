//! All tokens of a data set.

use mlx_quant_model::Tokenizer;
use sha2::{Digest as _, Sha256};

use super::digest::{hexadecimal, update};
use super::document::OnRefusal;
use super::pick::{evenly_spaced, sampled};
use super::rows::Source;
use super::sample::{Demand, Portion};
use super::source::Builtin;
use super::tokenized::{Tokenized, encode};
use super::{DataError, DataSource, Extent, Pick, SourceInfo, Window, Windows};

/// All tokens of a data set, or of the sample that windows need, source by source. Windows are cut from it by address,
/// so that any window can be had without the ones before it.
#[derive(Clone, Debug)]
pub struct Corpus {
    sources: Vec<Tokens>,
    prefix: Vec<u32>,
    data_hash: String,
}

/// One tokenized file; `info` lacks what depends on the windows.
#[derive(Clone, Debug)]
struct Tokens {
    path: String,
    info: SourceInfo,
    ids: Vec<u32>,
}

impl Corpus {
    /// Reads and tokenizes all of a data set for a model with `vocabulary` token ids. Rows that the chat template
    /// refuses are left out.
    ///
    /// Documents of one source follow each other with the tokenizer's end-of-text token between them, if it has one.
    ///
    /// # Errors
    /// [`DataError`] if a file cannot be read or understood, has tokens that the model does not know, or mostly rows
    /// that the chat template refuses.
    pub fn read(data: &DataSource, tokenizer: &Tokenizer, vocabulary: usize) -> Result<Self, DataError> {
        let everything = Demand { sequence_length: 2, pick: Pick::EvenlySpaced { windows: 0 } };
        Self::sample(data, tokenizer, vocabulary, everything, OnRefusal::LeaveOut)
    }

    /// The same of as much of the data as windows take: all of it up to 64 MiB of text, of more a part (8 MiB of text,
    /// or what the windows need), which is a function of the files' sizes and of the demand.
    pub(super) fn sample(
        data: &DataSource,
        tokenizer: &Tokenizer,
        vocabulary: usize,
        demand: Demand,
        on_refusal: OnRefusal,
    ) -> Result<Self, DataError> {
        let prefix = tokenizer.prefix().to_vec();
        let sources = match data.builtin() {
            Some(builtin) => vec![tokenized(builtin, tokenizer)?],
            None => read_files(&data.files()?, tokenizer, demand, on_refusal)?,
        };
        let mut hash = Sha256::new();
        update(&mut hash, &prefix);
        for source in &sources {
            if let Some(id) = prefix.iter().chain(&source.ids).find(|id| **id as usize >= vocabulary) {
                return Err(DataError::Vocabulary { file: source.path.clone(), id: *id, vocabulary });
            }
            update(&mut hash, &source.ids);
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
            windows_total: totals[index],
            windows_picked: addresses.iter().filter(|(of, _)| *of == index).count(),
            ..source.info.clone()
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
}

/// A built-in text as tokens.
fn tokenized(builtin: Builtin, tokenizer: &Tokenizer) -> Result<Tokens, DataError> {
    let path = format!("{} (built in)", builtin.name);
    let size = builtin.text.len() as u64;
    match encode(&builtin.document(), tokenizer) {
        Ok(ids) => {
            let made = Tokenized {
                ids,
                documents: 1,
                bytes_read: size,
                sha256: builtin.sha256(),
                ..Tokenized::default()
            };
            Ok(Tokens::new(builtin.name.to_owned(), path, size, made, None))
        }
        Err(error) => Err(DataError::Tokenizer { file: path, place: "document 1".to_owned(), error }),
    }
}

fn read_files(
    files: &[Source],
    tokenizer: &Tokenizer,
    demand: Demand,
    on_refusal: OnRefusal,
) -> Result<Vec<Tokens>, DataError> {
    let sizes = sizes(files, demand.whole(files.len()))?;
    let portions = demand.portions(&sizes);
    let sampled = portions.iter().map(|portion| portion.limit()).fold(0, u64::saturating_add);
    let stride = demand.sequence_length.saturating_sub(tokenizer.prefix().len()).max(1);
    let mut sources = Vec::new();
    for (file, portion) in files.iter().zip(portions) {
        let needed = demand.enough(portion.limit(), sampled).saturating_mul(stride);
        let made = read_enough(file, portion, needed, demand, tokenizer, on_refusal)?;
        let name = file.input.path.file_name().unwrap_or(file.input.path.as_os_str());
        let first = made.first_left_out.as_ref().map(|(place, why)| format!("{}: {why}", file.place(*place)));
        let (name, path) = (name.to_string_lossy().into_owned(), file.input.file.clone());
        sources.push(Tokens::new(name, path, file.input.size, made, first));
    }
    Ok(sources)
}

/// How much text each file holds, in bytes. Packed files are measured only as long as it is open whether all fits.
fn sizes(files: &[Source], whole: u64) -> Result<Vec<u64>, DataError> {
    let mut total = 0_u64;
    let size = |file: &Source| {
        let size = file.size(if whole == u64::MAX { 0 } else { whole.saturating_sub(total) })?;
        total = total.saturating_add(size);
        Ok(size)
    };
    files.iter().map(size).collect()
}

/// Reads a portion of a file, and more where it does not hold the tokens that are needed: rows may be left out, and
/// text may be a small part of them.
fn read_enough(
    file: &Source,
    mut portion: Portion,
    needed: usize,
    demand: Demand,
    tokenizer: &Tokenizer,
    on_refusal: OnRefusal,
) -> Result<Tokenized, DataError> {
    let mut made = file.read(portion, tokenizer, on_refusal)?;
    if let Portion::All { at_most } = portion
        && made.extent != Extent::Whole
    {
        // It turned out to hold more than its size promised.
        portion = demand.portions(&[at_most.saturating_add(1)])[0];
        made = file.read(portion, tokenizer, on_refusal)?;
    }
    while made.extent != Extent::Whole && made.ids.len() < needed {
        portion = Portion::Sample { bytes: portion.limit().saturating_mul(4) };
        let before = made.ids.len();
        made = file.read(portion, tokenizer, on_refusal)?;
        if made.ids.len() <= before {
            break;
        }
    }
    Ok(made)
}

impl Tokens {
    fn new(name: String, path: String, size: u64, made: Tokenized, first_left_out: Option<String>) -> Self {
        let info = SourceInfo {
            name,
            sha256: made.sha256,
            documents: made.documents,
            tokens: made.ids.len(),
            windows_total: 0,
            windows_picked: 0,
            extent: made.extent,
            bytes_read: made.bytes_read.min(size),
            bytes_total: size,
            rows_left_out: made.left_out,
            first_left_out,
        };
        Self { path, info, ids: made.ids }
    }
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
