//! Lines of JSON, one document each.

use std::io::BufRead;

use serde_json::Value;

use super::document::Document;
use super::mend;
use super::read::Tally;
use super::rows::{Place, Sink, Source};
use super::sample::{Portion, stretches};
use super::{DataError, Extent};
use crate::data::kind::Packing;

/// Hands out the documents of a .jsonl file with their line numbers, counted from 1. Blank lines are skipped.
pub(super) fn documents(
    source: &Source,
    portion: Portion,
    tally: &Tally,
    sink: &mut Sink<'_>,
) -> Result<Extent, DataError> {
    match portion {
        Portion::Sample { bytes } if source.input.packing == Packing::None => {
            spread(source, bytes, tally, sink)
        }
        _ => from_beginning(source, portion.limit(), tally, sink),
    }
}

fn from_beginning(
    source: &Source,
    limit: u64,
    tally: &Tally,
    sink: &mut Sink<'_>,
) -> Result<Extent, DataError> {
    let mut reader = source.input.stream(tally)?;
    let (mut line, mut number, mut bytes) = (Vec::new(), 0, 0_u64);
    loop {
        number += 1;
        let place = Place::Number(number);
        if !source.input.line(&mut *reader, &mut line, || source.place(place))? {
            return Ok(Extent::Whole);
        }
        if bytes >= limit {
            return Ok(Extent::Beginning);
        }
        if let Some(document) = document(source, &line, place)? {
            bytes += document.bytes();
            sink(place, document)?;
        }
    }
}

/// Some lines at each of many places. A line belongs to the stretch in which it begins.
fn spread(source: &Source, bytes: u64, tally: &Tally, sink: &mut Sink<'_>) -> Result<Extent, DataError> {
    let mut line = Vec::new();
    let mut all = 0;
    for stretch in stretches(source.input.size, bytes) {
        if all >= bytes {
            break;
        }
        // From the byte before, which may be the line feed in front of a line that begins here.
        let mut at = stretch.start.saturating_sub(1);
        let mut reader = source.input.at(at)?;
        if stretch.start > 0 {
            let Some(skipped) =
                skip_line(&mut reader, stretch.end - at).map_err(|error| source.input.unread(&error))?
            else {
                continue;
            };
            at += skipped;
        }
        let mut taken = 0;
        while at < stretch.end && taken < stretch.bytes {
            let place = Place::Offset(at);
            if !source.input.line(&mut reader, &mut line, || source.place(place))? {
                break;
            }
            tally.add(&line);
            at += line.len() as u64;
            if let Some(document) = document(source, &line, place)? {
                taken += document.bytes();
                sink(place, document)?;
            }
        }
        all += taken;
    }
    Ok(Extent::Spread)
}

/// Goes behind the next line feed; nothing if it is not within `limit` bytes.
fn skip_line(reader: &mut impl BufRead, limit: u64) -> std::io::Result<Option<u64>> {
    let mut skipped = 0;
    while skipped < limit {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
        let length = end.unwrap_or(buffer.len());
        reader.consume(length);
        skipped += length as u64;
        if end.is_some() {
            return Ok(Some(skipped));
        }
    }
    Ok(None)
}

/// The document of a line, if it is not blank.
fn document(source: &Source, line: &[u8], place: Place) -> Result<Option<Document>, DataError> {
    let Ok(text) = std::str::from_utf8(line) else {
        return Err(source.not_utf8(place));
    };
    if text.trim().is_empty() {
        return Ok(None);
    }
    let broken = |reason: String| DataError::Json {
        file: source.input.file.clone(),
        place: source.place(place),
        reason,
    };
    match mend::parse(text).map_err(|error| broken(without_line(&error)))? {
        Value::Object(object) => source.document(object, place).map(Some),
        _ => Err(broken("not an object".to_owned())),
    }
}

/// The parser's message with the column only: each line is parsed by itself, so it always speaks of line 1.
pub(super) fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}
