//! Files of calibration and evaluation text.

use std::path::Path;

use mlx_quant::data::DataError;
use mlx_quant::{DataSource, Pick, Windows};
use serde_json::{Map, Value};

use crate::work::{VOCABULARY, assert_helps, byte_tokenizer, write};

/// Tokens a window.
const LENGTH: usize = 4;

const ALL: Pick = Pick::EvenlySpaced { windows: 0 };

/// A .jsonl file; by its first bytes also a .jsonl.gz, .jsonl.zst or .json. What is read is the same each time, and its tokens
/// are those of the texts.
///
/// # Panics
/// If they are not, or an error does not help.
pub fn jsonl(bytes: &[u8]) {
    let name = match bytes {
        [0x1f, 0x8b, ..] => "data.jsonl.gz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "data.jsonl.zst",
        [b'[', ..] => "data.json",
        _ => "data.jsonl",
    };
    let windows = read(name, bytes);
    if name == "data.jsonl"
        && let (Some(windows), Some(texts)) = (windows, texts(bytes))
    {
        assert_eq!(windows.sources[0].documents, texts.len());
        let mut expected: Vec<u32> = Vec::new();
        for text in &texts {
            let end = byte_tokenizer().end_of_text().expect("an end of text");
            if expected.last().is_some_and(|last| *last != end) {
                expected.push(end);
            }
            expected.extend(byte_tokenizer().encode(text).expect("every byte has a token"));
        }
        assert_eq!(windows.sources[0].tokens, expected.len());
        let found: Vec<u32> = windows.picked.iter().flat_map(|window| window.tokens.clone()).collect();
        assert_eq!(found, expected[..found.len()]);
    }
}

/// A .csv file.
///
/// # Panics
/// If an error does not help.
pub fn csv(bytes: &[u8]) {
    read("data.csv", bytes);
}

/// A .parquet file.
///
/// # Panics
/// If an error does not help.
pub fn parquet(bytes: &[u8]) {
    read("data.parquet", bytes);
}

fn read(name: &str, bytes: &[u8]) -> Option<Windows> {
    let path = write(name, bytes);
    let windows = match windows(&path) {
        Ok(windows) => windows,
        Err(error) => {
            assert_helps(&error, &path.display().to_string());
            return None;
        }
    };
    let [source] = &windows.sources[..] else { panic!("{} sources of one file", windows.sources.len()) };
    assert_eq!(source.name, name);
    assert!(source.documents > 0);
    assert_eq!(windows.picked.len(), source.tokens / LENGTH);
    assert_eq!((source.windows_total, source.windows_picked), (windows.picked.len(), windows.picked.len()));
    for window in &windows.picked {
        assert_eq!(window.tokens.len(), LENGTH);
        assert!(window.tokens.iter().all(|id| (*id as usize) < VOCABULARY));
    }
    Some(windows)
}

fn windows(path: &Path) -> Result<Windows, DataError> {
    Windows::read(&DataSource::Path(path.to_owned()), byte_tokenizer(), VOCABULARY, LENGTH, ALL)
}

/// The texts of lines that hold nothing else; read by the definition of the format alone.
fn texts(bytes: &[u8]) -> Option<Vec<String>> {
    let lines = std::str::from_utf8(bytes).ok()?.split('\n');
    let text = |line: &str| {
        let mut object: Map<String, Value> = serde_json::from_str(line).ok()?;
        let text = object.remove("text")?;
        (object.is_empty()).then_some(text.as_str()?.to_owned())
    };
    lines.filter(|line| !line.trim().is_empty()).map(text).collect()
}
