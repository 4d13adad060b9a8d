//! Plain text: a whole file is one document, of a long file each piece that is read.

use std::borrow::Cow;
use std::io::Read as _;

use super::document::Document;
use super::kind::Packing;
use super::read::Tally;
use super::rows::{Place, Sink, Source};
use super::sample::{Portion, stretches};
use super::{DataError, Extent};

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
    let mut bytes = Vec::new();
    let reader = source.input.stream(tally)?;
    reader
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| source.input.unread(&error))?;
    let whole = bytes.len() as u64 <= limit;
    let end = if whole { bytes.len() } else { last_break(&bytes) };
    let text = text(&bytes[..end], |line| DataError::Utf8 { file: source.input.file.clone(), line })?;
    sink(Place::Number(1), Document::Text(Cow::Owned(text)))?;
    Ok(if whole { Extent::Whole } else { Extent::Beginning })
}

/// A piece at each of many places, from line to line where there are lines.
fn spread(source: &Source, bytes: u64, tally: &Tally, sink: &mut Sink<'_>) -> Result<Extent, DataError> {
    let mut piece = Vec::new();
    for stretch in stretches(source.input.size, bytes) {
        piece.clear();
        let reader = source.input.at(stretch.start)?;
        reader
            .take(stretch.bytes.min(stretch.end - stretch.start))
            .read_to_end(&mut piece)
            .map_err(|error| source.input.unread(&error))?;
        let start = if stretch.start == 0 { 0 } else { first_break(&piece) };
        let end = if stretch.end == source.input.size && piece.len() as u64 == stretch.end - stretch.start {
            piece.len()
        } else {
            last_break(&piece)
        };
        let Some(taken) = piece.get(start..end).filter(|taken| !taken.is_empty()) else { continue };
        let place = Place::Offset(stretch.start + start as u64);
        let text = text(taken, |line| match source.input.line_of(stretch.start + start as u64) {
            Ok(before) => DataError::Utf8 { file: source.input.file.clone(), line: before + line - 1 },
            Err(error) => error,
        })?;
        tally.add(taken);
        sink(place, Document::Text(Cow::Owned(text)))?;
    }
    Ok(Extent::Spread)
}

/// Where the first line of a piece begins, in its first half; else the first word, else the first character.
fn first_break(piece: &[u8]) -> usize {
    let half = &piece[..piece.len() / 2];
    let behind = |wanted: u8| half.iter().position(|byte| *byte == wanted).map(|at| at + 1);
    behind(b'\n')
        .or_else(|| behind(b' '))
        .unwrap_or_else(|| piece.iter().take_while(|byte| **byte & 0xc0 == 0x80).count())
}

/// Where the last line of a piece ends, in its second half; else the last word, else the last character.
fn last_break(piece: &[u8]) -> usize {
    let middle = piece.len() / 2;
    let behind =
        |wanted: u8| piece[middle..].iter().rposition(|byte| *byte == wanted).map(|at| middle + at + 1);
    // A word keeps the space in front of it, as tokens do.
    let word = || behind(b' ').map(|at| at - 1);
    behind(b'\n').or_else(word).unwrap_or_else(|| {
        let continued = piece.iter().rev().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
        let lead = piece.len().saturating_sub(continued + 1);
        let complete = std::str::from_utf8(&piece[lead..]).is_ok();
        if complete { piece.len() } else { lead }
    })
}

/// Bytes as text, their line ends as Python reads them: a line feed each. `not_utf8` gets the line of what is none.
fn text(bytes: &[u8], not_utf8: impl FnOnce(usize) -> DataError) -> Result<String, DataError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| not_utf8(bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count()))?;
    Ok(if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_between_lines_words_and_characters() {
        for (piece, expected) in [
            ("rest\none two\nthree\nfour", "one two\nthree\n"),
            ("st one two three four f", "one two three four"),
            ("onetwothree", "onetwothree"),
        ] {
            let piece = piece.as_bytes();
            assert_eq!(&piece[first_break(piece)..last_break(piece)], expected.as_bytes());
        }
        let text = "aé漢😀".repeat(9);
        for (start, end) in (0..text.len() / 2)
            .flat_map(|start| (text.len() / 2 + 9..=text.len()).map(move |end| (start, end)))
        {
            let piece = &text.as_bytes()[start..end];
            let taken = &piece[first_break(piece)..last_break(piece)];
            assert!(std::str::from_utf8(taken).is_ok() && taken.len() + 6 >= piece.len(), "{start} {end}");
        }
    }
}
