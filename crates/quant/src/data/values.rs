//! The values of a JSON file one after the other, without the file in memory.
//!
//! A .json file of documents is a list of objects, an object in which a list of objects stands (`{"data": [...]}`), or
//! objects after each other (lines of JSON under that name). Which it is has to be known before the first row, so the
//! first value is looked at twice.

use std::io::BufRead;

use serde_json::Value;

use super::document::is_column;
use super::lines::without_line;
use super::mend;
use super::read::{LONGEST_ROW, Tally};
use super::rows::{Place, Sink, Source};
use super::sample::Portion;
use super::{DataError, Extent};

/// How much of a file is looked at to find its shape.
const SURVEYED: u64 = LONGEST_ROW;

/// Why a value could not be had.
#[derive(Debug)]
pub(super) enum Stop {
    Io(std::io::Error),
    /// It is longer than [`LONGEST_ROW`].
    Long,
    /// The file is no such JSON.
    Broken(String),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Where the rows of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One after the other.
    Bare,
    /// In a list.
    List,
    /// In the list under that key of an object, which is JSON text with its quotes.
    Under(Vec<u8>),
}

/// Hands out the documents of a .json file with their numbers, counted from 1.
pub(super) fn documents(
    source: &Source,
    portion: Portion,
    tally: &Tally,
    sink: &mut Sink<'_>,
) -> Result<Extent, DataError> {
    let failed = |stop: Stop, place: String| {
        let file = source.input.file.clone();
        match stop {
            Stop::Io(error) => source.input.unread(&error),
            Stop::Long => DataError::LongRow { file, place, limit: LONGEST_ROW },
            Stop::Broken(reason) => DataError::List { file, place, reason },
        }
    };
    let begin = |stop| failed(stop, "beginning".to_owned());
    let shape = Values::new(&mut *source.input.stream(&Tally::default())?).shape().map_err(begin)?;
    let mut reader = source.input.stream(tally)?;
    let mut values = Values::new(&mut *reader);
    values.enter(&shape).map_err(begin)?;
    let (mut row, mut number, mut bytes) = (Vec::new(), 0, 0_u64);
    loop {
        number += 1;
        let place = Place::Number(number);
        let broken = |reason: String| failed(Stop::Broken(reason), source.place(place));
        if !values.row(&shape, number == 1, &mut row).map_err(|stop| failed(stop, source.place(place)))? {
            // What stands behind the list of an object belongs to the file too.
            std::io::copy(&mut reader, &mut std::io::sink()).map_err(|error| source.input.unread(&error))?;
            return Ok(Extent::Whole);
        }
        if bytes >= portion.limit() {
            return Ok(Extent::Beginning);
        }
        let Ok(text) = std::str::from_utf8(&row) else {
            return Err(broken("not UTF-8".to_owned()));
        };
        match mend::parse(text).map_err(|error| broken(without_line(&error)))? {
            Value::Object(object) => {
                let document = source.document(object, place)?;
                bytes += document.bytes();
                sink(place, document)?;
            }
            _ => return Err(broken("not an object".to_owned())),
        }
    }
}

/// Reads values.
pub(super) struct Values<'a> {
    reader: &'a mut dyn BufRead,
    /// Bytes read so far.
    read: u64,
}

impl<'a> Values<'a> {
    pub(super) fn new(reader: &'a mut dyn BufRead) -> Self {
        Self { reader, read: 0 }
    }

    /// The next byte that is no white space, which stays unread.
    pub(super) fn peek(&mut self) -> Result<Option<u8>, Stop> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let found = buffer.get(blank).copied();
            self.reader.consume(blank);
            self.read += blank as u64;
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Reads the next byte that is no white space; it must be `expected`.
    fn expect(&mut self, expected: u8) -> Result<(), Stop> {
        match self.peek()? {
            Some(byte) if byte == expected => {
                self.reader.consume(1);
                self.read += 1;
                Ok(())
            }
            found => Err(Stop::Broken(unexpected(char::from(expected), found))),
        }
    }

    /// Reads a value into `value`, whatever was in it before.
    pub(super) fn value(&mut self, value: &mut Vec<u8>) -> Result<(), Stop> {
        value.clear();
        let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
        let first = self.peek()?.ok_or_else(|| Stop::Broken(unexpected('{', None)))?;
        let scalar = !matches!(first, b'{' | b'[' | b'"');
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return if scalar { Ok(()) } else { Err(Stop::Broken("the file ends inside it".to_owned())) };
            }
            let mut taken = 0;
            let mut ended = false;
            for byte in buffer {
                if scalar && (byte.is_ascii_whitespace() || matches!(byte, b',' | b']' | b'}')) {
                    ended = true;
                    break;
                }
                taken += 1;
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                }
                if !scalar && depth == 0 && !in_string {
                    ended = true;
                    break;
                }
            }
            value.extend_from_slice(&buffer[..taken]);
            self.reader.consume(taken);
            self.read += taken as u64;
            if value.len() as u64 > LONGEST_ROW {
                return Err(Stop::Long);
            }
            if ended {
                return if value.is_empty() {
                    Err(Stop::Broken(unexpected('{', Some(first))))
                } else {
                    Ok(())
                };
            }
        }
    }

    /// Goes to the first row.
    pub(super) fn enter(&mut self, shape: &Shape) -> Result<(), Stop> {
        match shape {
            Shape::Bare => Ok(()),
            Shape::List => self.expect(b'['),
            Shape::Under(wanted) => {
                self.expect(b'{')?;
                let mut key = Vec::new();
                loop {
                    self.value(&mut key)?;
                    self.expect(b':')?;
                    if key == *wanted {
                        return self.expect(b'[');
                    }
                    self.value(&mut key)?;
                    self.expect(b',')?;
                }
            }
        }
    }

    /// Reads a row into `row`; false behind the last one.
    pub(super) fn row(&mut self, shape: &Shape, first: bool, row: &mut Vec<u8>) -> Result<bool, Stop> {
        match (shape, self.peek()?) {
            (Shape::Bare, None) => return Ok(false),
            (Shape::Bare, _) => {}
            (_, Some(b']')) => {
                self.expect(b']')?;
                // What follows is looked at only as far as it decides whether all was read.
                return if *shape == Shape::List { self.end().map(|()| false) } else { Ok(false) };
            }
            (_, Some(b',')) if !first => self.expect(b',')?,
            (_, found) if !first => return Err(Stop::Broken(unexpected(',', found))),
            _ => {}
        }
        self.value(row)?;
        Ok(true)
    }

    fn end(&mut self) -> Result<(), Stop> {
        match self.peek()? {
            None => Ok(()),
            Some(byte) => Err(Stop::Broken(format!("{:?} behind the end of the list", char::from(byte)))),
        }
    }

    /// Finds out where the rows are. Broken files are taken as bare values, so that reading these tells what is wrong.
    pub(super) fn shape(&mut self) -> Result<Shape, Stop> {
        match self.peek()? {
            Some(b'[') => Ok(Shape::List),
            Some(b'{') => match self.list_of_objects() {
                Ok(found) => Ok(found.map_or(Shape::Bare, Shape::Under)),
                Err(Stop::Io(error)) => Err(Stop::Io(error)),
                Err(Stop::Long | Stop::Broken(_)) => Ok(Shape::Bare),
            },
            _ => Ok(Shape::Bare),
        }
    }

    /// The key of an object's first list of objects, unless the object is a document itself.
    fn list_of_objects(&mut self) -> Result<Option<Vec<u8>>, Stop> {
        self.expect(b'{')?;
        let (mut found, mut key) = (None, Vec::new());
        while self.peek()? != Some(b'}') && self.read < SURVEYED {
            self.value(&mut key)?;
            if std::str::from_utf8(&key).is_ok_and(|key| is_column(key.trim_matches('"'))) {
                return Ok(None);
            }
            self.expect(b':')?;
            if self.peek()? == Some(b'[') {
                self.expect(b'[')?;
                if found.is_none() && self.peek()? == Some(b'{') {
                    found = Some(key.clone());
                }
                if !self.skip_list()? {
                    return Ok(found);
                }
            } else {
                self.value(&mut key)?;
            }
            if self.peek()? == Some(b',') {
                self.expect(b',')?;
            }
        }
        Ok(found)
    }

    /// Goes behind the end of a list in which it is; false if that is too far away.
    fn skip_list(&mut self) -> Result<bool, Stop> {
        let mut item = Vec::new();
        loop {
            match self.peek()? {
                Some(b']') => return self.expect(b']').map(|()| true),
                Some(b',') => self.expect(b',')?,
                None => return Ok(false),
                _ => self.value(&mut item)?,
            }
            if self.read >= SURVEYED {
                return Ok(false);
            }
        }
    }
}

fn unexpected(expected: char, found: Option<u8>) -> String {
    match found {
        Some(byte) => format!("{:?} where {expected:?} was expected", char::from(byte)),
        None => format!("the file ends where {expected:?} was expected"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> Shape {
        Values::new(&mut text.as_bytes()).shape().unwrap()
    }

    fn rows(text: &str) -> Result<Vec<String>, Stop> {
        let shape = shape(text);
        // Two bytes at a time, so that every state is carried over.
        let mut reader = std::io::BufReader::with_capacity(2, text.as_bytes());
        let mut values = Values::new(&mut reader);
        values.enter(&shape)?;
        let (mut rows, mut row) = (Vec::new(), Vec::new());
        while values.row(&shape, rows.is_empty(), &mut row)? {
            rows.push(String::from_utf8(row.clone()).unwrap());
        }
        Ok(rows)
    }

    #[test]
    fn shapes_are_found() {
        let under = |key: &str| Shape::Under(key.as_bytes().to_vec());
        for (text, expected) in [
            ("", Shape::Bare),
            (" \n[", Shape::List),
            (r#"{"text": "x"}"#, Shape::Bare),
            (r#"{"messages": [{"role": "user"}]}"#, Shape::Bare),
            (r#"{"images": [{"path": "x"}], "messages": []} {"#, Shape::Bare),
            (r#"{"version": [1, {}], "data": [ {"text": 1}], "n": 1}"#, under("\"data\"")),
            (r#"{"a": {"data": [{}]}, "rows": [{"text": "}]"}, {}"#, under("\"rows\"")),
            (r#"{"a": []}"#, Shape::Bare),
        ] {
            assert_eq!(shape(text), expected, "{text}");
        }
    }

    #[test]
    fn rows_are_cut_out() {
        for (text, expected) in [
            ("[]", &[][..]),
            (
                r#" [{"a": "]}\""} , {"b": [1, {"c": 2}]},3, null ] "#,
                &[r#"{"a": "]}\""}"#, r#"{"b": [1, {"c": 2}]}"#, "3", "null"],
            ),
            (
                "{\"text\": \"\\\\\"}\n{\"b\":\n1}{\"c\":2} 5",
                &["{\"text\": \"\\\\\"}", "{\"b\":\n1}", "{\"c\":2}", "5"],
            ),
            (
                r#"{"n": 1, "m": [2], "data": [{"x": 1},{"x": 2}], "more": [{}]}"#,
                &[r#"{"x": 1}"#, r#"{"x": 2}"#],
            ),
        ] {
            assert_eq!(rows(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn broken_files_end_with_a_word() {
        for (text, expected) in [
            (r#"[{"a": 1}"#, "ends where ','"),
            (r#"[{"a": 1"#, "ends inside"),
            (r#"[{"a": 1} {"b"#, "'{' where ','"),
            (r#"[{"a": 1},]"#, "']' where '{'"),
            (r#"[{"a": 1}] x"#, "behind the end"),
            ("[,]", "',' where '{'"),
        ] {
            let Err(Stop::Broken(reason)) = rows(text) else { panic!("{text}") };
            assert!(reason.contains(expected), "{text}: {reason}");
        }
    }
}
