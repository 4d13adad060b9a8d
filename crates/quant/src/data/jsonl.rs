//! Lines of JSON, one document each.

use serde_json::Value;

use super::DataError;
use super::document::Document;

/// The documents of a .jsonl file with their line numbers, counted from 1. Blank lines are skipped.
pub(super) fn documents(file: &str, bytes: &[u8]) -> Result<Vec<(usize, Document)>, DataError> {
    let mut documents = Vec::new();
    for (index, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let (file, line) = (|| file.to_owned(), index + 1);
        let text = std::str::from_utf8(bytes).map_err(|_| DataError::Utf8 { file: file(), line })?;
        if text.trim().is_empty() {
            continue;
        }
        let value = serde_json::from_str(text).map_err(|error| DataError::Json {
            file: file(),
            line,
            reason: without_line(&error),
        })?;
        let Value::Object(object) = value else {
            return Err(DataError::Json { file: file(), line, reason: "not an object".to_owned() });
        };
        let document = Document::from_object(object).map_err(|reason| DataError::Form {
            file: file(),
            place: format!("line {line}"),
            reason,
        })?;
        documents.push((line, document));
    }
    Ok(documents)
}

/// The parser's message with the column only: each line is parsed by itself, so it always speaks of line 1.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}
