//! Rows of a file: where they stand, and who takes them.

use serde_json::{Map, Value};

use super::DataError;
use super::document::{Document, Unfit};
use super::kind::Form;
use super::read::Input;

/// Where a row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Its number, from 1.
    Number(usize),
    /// The first byte of its line: lines before it were not counted.
    Offset(u64),
}

/// Takes rows.
pub(super) type Sink<'a> = dyn FnMut(Place, Document) -> Result<(), DataError> + 'a;

/// A data file.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) input: Input,
    pub(super) form: Form,
}

impl Source {
    /// A place in words.
    pub(super) fn place(&self, place: Place) -> String {
        match place {
            Place::Number(number) => format!("{} {number}", self.form.unit()),
            Place::Offset(offset) => match self.input.line_of(offset) {
                Ok(line) => format!("line {line}"),
                Err(_) => format!("byte {offset}"),
            },
        }
    }

    /// The error for a line or row of a text file that is not UTF-8.
    pub(super) fn not_utf8(&self, place: Place) -> DataError {
        let line = match place {
            Place::Number(number) => number,
            Place::Offset(offset) => self.input.line_of(offset).unwrap_or(0),
        };
        DataError::Utf8 { file: self.input.file.clone(), line }
    }

    /// The document of a row.
    pub(super) fn document(&self, object: Map<String, Value>, place: Place) -> Result<Document, DataError> {
        Document::from_object(object).map_err(|unfit| {
            let (file, place) = (self.input.file.clone(), self.place(place));
            match unfit {
                Unfit::NoForm(found) => DataError::NoForm { file, place, found },
                Unfit::Column(reason) => DataError::Form { file, place, reason },
            }
        })
    }
}
