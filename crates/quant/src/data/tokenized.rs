//! Rows of a file on their way to tokens.
//!
//! Rows arrive one by one and are rendered and tokenized a batch at a time, on all cores, so that neither the rows nor
//! their text are ever in memory together. Ids are the same as one by one.

use mlx_quant_model::{Tokenizer, TokenizerError};
use rayon::prelude::*;

use super::document::{Document, OnRefusal};
use super::kind::Form;
use super::read::{Input, Tally};
use super::rows::{Place, Sink, Source};
use super::sample::Portion;
use super::{DataError, Extent, lines, separated, text, values};

/// Text of a batch in bytes.
const BATCH: u64 = 2 << 20;

/// Rows of a batch.
const BATCH_ROWS: usize = 4096;

/// The longest reason that is reported, in characters.
const LONGEST_REASON: usize = 200;

impl Source {
    /// How much text it holds, in bytes; a number beyond `limit` if it is more than that.
    pub(super) fn size(&self, limit: u64) -> Result<u64, DataError> {
        match self.form {
            Form::Table => table_size(&self.input),
            _ => self.input.unpacked_size(limit),
        }
    }

    fn rows(&self, portion: Portion, tally: &Tally, sink: &mut Sink<'_>) -> Result<Extent, DataError> {
        match self.form {
            Form::Text => text::documents(self, portion, tally, sink),
            Form::Lines => lines::documents(self, portion, tally, sink),
            Form::List => values::documents(self, portion, tally, sink),
            Form::Separated(separator) => separated::documents(self, separator, portion, tally, sink),
            Form::Table => table(self, portion, tally, sink),
        }
    }

    /// Reads and tokenizes a portion of the file.
    pub(super) fn read(
        &self,
        portion: Portion,
        tokenizer: &Tokenizer,
        on_refusal: OnRefusal,
    ) -> Result<Tokenized, DataError> {
        let tally = Tally::default();
        let mut pump = Pump {
            source: self,
            tokenizer,
            on_refusal,
            batch: Vec::new(),
            bytes: 0,
            made: Tokenized::default(),
        };
        let mut extent = self.rows(portion, &tally, &mut |place, document| pump.push(place, document))?;
        pump.flush()?;
        let mut made = pump.made;
        made.bytes_read = tally.bytes();
        made.sha256 = tally.sha256();
        // Not of tables, of which some bytes are read twice.
        if extent == Extent::Spread && self.form != Form::Table && made.bytes_read >= self.input.size {
            extent = Extent::Whole;
        }
        made.extent = extent;
        if made.documents + made.left_out == 0 {
            return Err(DataError::Empty { file: self.input.file.clone() });
        }
        if let Some((place, reason)) = &made.first_left_out
            && made.left_out > made.documents
        {
            return Err(DataError::LeftOut {
                file: self.input.file.clone(),
                left_out: made.left_out,
                rows: made.left_out + made.documents,
                place: self.place(*place),
                reason: reason.clone(),
            });
        }
        Ok(made)
    }
}

/// A file as tokens.
#[derive(Debug, Default)]
pub(super) struct Tokenized {
    /// Tokens of all documents, with the end-of-text token between them.
    pub(super) ids: Vec<u32>,
    pub(super) documents: usize,
    /// Rows that the chat template refused.
    pub(super) left_out: usize,
    /// The first of them, and why.
    pub(super) first_left_out: Option<(Place, String)>,
    /// Bytes of the file that were read.
    pub(super) bytes_read: u64,
    /// Their SHA-256.
    pub(super) sha256: String,
    pub(super) extent: Extent,
}

struct Pump<'a> {
    source: &'a Source,
    tokenizer: &'a Tokenizer,
    on_refusal: OnRefusal,
    batch: Vec<(Place, Document)>,
    /// Text in the batch.
    bytes: u64,
    made: Tokenized,
}

impl Pump<'_> {
    fn push(&mut self, place: Place, document: Document) -> Result<(), DataError> {
        self.bytes += document.bytes();
        self.batch.push((place, document));
        if self.bytes >= BATCH || self.batch.len() >= BATCH_ROWS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let tokenizer = self.tokenizer;
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        // Rendering is the smaller part, and a thread for templates has a large stack: one will do.
        let mut texts = Vec::new();
        for (place, document) in &batch {
            match document.render(tokenizer) {
                Ok(text) => texts.push((*place, text)),
                Err(TokenizerError::Template { reason, .. }) if self.on_refusal == OnRefusal::LeaveOut => {
                    self.made.left_out += 1;
                    self.made.first_left_out.get_or_insert_with(|| (*place, one_line(&reason)));
                }
                Err(error) => return Err(self.failed(*place, error)),
            }
        }
        let encoded: Vec<_> = texts.par_iter().map(|(_, text)| tokenizer.encode(text)).collect();
        for ((place, _), ids) in texts.iter().zip(encoded) {
            self.append(&ids.map_err(|error| self.failed(*place, error))?);
        }
        Ok(())
    }

    fn failed(&self, place: Place, error: TokenizerError) -> DataError {
        DataError::Tokenizer { file: self.source.input.file.clone(), place: self.source.place(place), error }
    }

    fn append(&mut self, ids: &[u32]) {
        // A template may have written the end of the text out already.
        if let Some(end) = self.tokenizer.end_of_text()
            && self.made.ids.last().is_some_and(|last| *last != end)
        {
            self.made.ids.push(end);
        }
        self.made.ids.extend_from_slice(ids);
        self.made.documents += 1;
    }
}

/// The tokens of a document.
pub(super) fn encode(document: &Document, tokenizer: &Tokenizer) -> Result<Vec<u32>, TokenizerError> {
    tokenizer.encode(&document.render(tokenizer)?)
}

/// A reason for reports: templates raise whatever they like.
fn one_line(reason: &str) -> String {
    let mut line: String = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(LONGEST_REASON) {
        line.truncate(end);
        line.push_str("...");
    }
    line
}

#[cfg(feature = "parquet")]
fn table(source: &Source, portion: Portion, tally: &Tally, sink: &mut Sink<'_>) -> Result<Extent, DataError> {
    super::parquet::documents(source, portion, tally, sink)
}

#[cfg(feature = "parquet")]
fn table_size(input: &Input) -> Result<u64, DataError> {
    super::parquet::text_size(input)
}

#[cfg(not(feature = "parquet"))]
fn table(source: &Source, _: Portion, _: &Tally, _: &mut Sink<'_>) -> Result<Extent, DataError> {
    Err(DataError::NoParquet { file: source.input.file.clone() })
}

#[cfg(not(feature = "parquet"))]
fn table_size(input: &Input) -> Result<u64, DataError> {
    Err(DataError::NoParquet { file: input.file.clone() })
}
