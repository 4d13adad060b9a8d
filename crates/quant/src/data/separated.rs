//! Tables as text (.csv, .tsv) with a row of column names.
//!
//! Quotes and line ends in cells are the crate `csv`'s matter. Cells are text: lists of messages stand in them as JSON,
//! and an empty cell is an absent one, as tables have a cell for every column.

use std::io::Read;

use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};

use super::document::{has_form, is_column, named};
use super::read::{LONGEST_ROW, Tally};
use super::rows::{Place, Sink, Source};
use super::sample::Portion;
use super::{DataError, Extent};

/// Ends a row that does not end: a quote that is never closed would take the whole file for a cell.
struct Bounded<R> {
    inner: R,
    /// What the row may still take.
    left: u64,
}

/// The most that is read ahead of a row.
const AHEAD: u64 = 1 << 16;

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        if read as u64 > self.left {
            return Err(std::io::Error::from(std::io::ErrorKind::FileTooLarge));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// Hands out the documents of a table with their numbers, counted from 1 below the row of names.
pub(super) fn documents(
    source: &Source,
    separator: u8,
    portion: Portion,
    tally: &Tally,
    sink: &mut Sink<'_>,
) -> Result<Extent, DataError> {
    let file = || source.input.file.clone();
    let reader = Bounded { inner: source.input.stream(tally)?, left: LONGEST_ROW };
    let mut reader =
        ReaderBuilder::new().delimiter(separator).buffer_capacity(AHEAD as usize).from_reader(reader);
    let failed = |error: csv::Error, place: String| match error.into_kind() {
        csv::ErrorKind::Io(error) if error.kind() == std::io::ErrorKind::FileTooLarge => {
            DataError::LongRow { file: file(), place, limit: LONGEST_ROW }
        }
        csv::ErrorKind::Io(error) => source.input.unread(&error),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            let reason = format!("{len} cells, where the first row has {expected_len} names");
            DataError::Separated { file: file(), place, reason }
        }
        other => DataError::Separated { file: file(), place, reason: format!("{other:?}") },
    };
    let heads = reader.byte_headers().map_err(|error| failed(error, "columns".to_owned()))?;
    let heads: Vec<String> =
        heads.iter().map(|name| String::from_utf8_lossy(name).trim().to_owned()).collect();
    if !has_form(|name| heads.iter().any(|head| head == name)) {
        let found = named(heads.iter().map(String::as_str));
        return Err(DataError::NoForm { file: file(), place: "columns".to_owned(), found });
    }
    let (mut row, mut number, mut bytes) = (ByteRecord::new(), 0, 0_u64);
    loop {
        number += 1;
        let place = Place::Number(number);
        reader.get_mut().left = LONGEST_ROW;
        if !reader.read_byte_record(&mut row).map_err(|error| failed(error, source.place(place)))? {
            return Ok(Extent::Whole);
        }
        if bytes >= portion.limit() {
            return Ok(Extent::Beginning);
        }
        let object = object(&heads, &row).map_err(|reason| DataError::Separated {
            file: file(),
            place: source.place(place),
            reason,
        })?;
        let document = source.document(object, place)?;
        bytes += document.bytes();
        sink(place, document)?;
    }
}

/// The cells that mean something, by their columns.
fn object(heads: &[String], row: &ByteRecord) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    for (head, cell) in heads.iter().zip(row).filter(|(head, _)| is_column(head)) {
        let cell = std::str::from_utf8(cell).map_err(|_| format!("{head} is not UTF-8"))?;
        if !cell.is_empty() {
            object.insert(head.clone(), cell.into());
        }
    }
    // An empty text is a text where there is no other.
    if !has_form(|name| object.contains_key(name)) && heads.iter().any(|head| head == "text") {
        object.insert("text".to_owned(), String::new().into());
    }
    Ok(object)
}
