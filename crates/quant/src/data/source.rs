//! Where documents come from: built-in texts, a file, a directory of files.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use fs_err as fs;
use sha2::{Digest as _, Sha256};

use super::DataError;
use super::document::Document;
use super::jsonl;

/// Data for calibration or evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataSource {
    /// The built-in text for calibration (505 kB).
    BuiltinCalibration,
    /// The built-in text for evaluation (207 kB); no document is in both.
    BuiltinHeldOut,
    /// A .txt, .jsonl or .parquet file, or a directory of these, which are taken in the order of their names.
    Path(PathBuf),
    /// Files of these kinds, in their order.
    Files(Vec<PathBuf>),
}

/// One file before tokenization.
#[derive(Debug)]
pub(super) struct Source {
    /// File name, for results.
    pub(super) name: String,
    /// The path as given, for messages.
    pub(super) path: String,
    /// Of the file's bytes, lower-case hexadecimal.
    pub(super) sha256: String,
    /// What a document's number counts: line, row, document.
    pub(super) unit: &'static str,
    /// Documents with their numbers from 1.
    pub(super) documents: Vec<(usize, Document)>,
}

impl DataSource {
    /// Reads everything, one [`Source`] a file.
    pub(super) fn read(&self) -> Result<Vec<Source>, DataError> {
        match self {
            Self::BuiltinCalibration => Ok(vec![builtin("calibration.txt", mlx_quant_texts::CALIBRATION)]),
            Self::BuiltinHeldOut => Ok(vec![builtin("held_out.txt", mlx_quant_texts::HELD_OUT)]),
            Self::Path(path) => files(path)?.iter().map(|(path, kind)| read(path, *kind)).collect(),
            Self::Files(paths) => {
                let mut sources = Vec::new();
                for path in paths {
                    sources.extend(Self::Path(path.clone()).read()?);
                }
                Ok(sources)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Lines,
    Table,
}

impl Kind {
    fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "txt" => Some(Self::Text),
            "jsonl" => Some(Self::Lines),
            "parquet" => Some(Self::Table),
            _ => None,
        }
    }
}

fn builtin(name: &'static str, text: &'static str) -> Source {
    Source {
        name: name.to_owned(),
        path: format!("{name} (built in)"),
        sha256: hexadecimal(&Sha256::digest(text)),
        unit: "document",
        documents: vec![(1, Document::Text(Cow::Borrowed(text)))],
    }
}

/// The files that a path stands for, sorted. Hidden files of a directory and its subdirectories are left out.
fn files(path: &Path) -> Result<Vec<(PathBuf, Kind)>, DataError> {
    if !fs::metadata(path)?.is_dir() {
        let kind = Kind::of(path).ok_or_else(|| DataError::Kind { file: path.display().to_string() })?;
        return Ok(vec![(path.to_owned(), kind)]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if let Some(kind) = Kind::of(&entry.path())
            && !hidden
            && entry.path().is_file()
        {
            files.push((entry.path(), kind));
        }
    }
    if files.is_empty() {
        return Err(DataError::EmptyDirectory { directory: path.display().to_string() });
    }
    files.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(files)
}

fn read(path: &Path, kind: Kind) -> Result<Source, DataError> {
    let file = path.display().to_string();
    // A pipe or a device never ends.
    if !fs::metadata(path)?.is_file() {
        return Err(DataError::NotAFile { file });
    }
    let bytes = fs::read(path)?;
    let sha256 = hexadecimal(&Sha256::digest(&bytes));
    let (unit, documents) = match kind {
        Kind::Text => ("document", vec![(1, Document::Text(Cow::Owned(text(&file, without_mark(&bytes))?)))]),
        Kind::Lines => ("line", jsonl::documents(&file, without_mark(&bytes))?),
        Kind::Table => ("row", table(&file, bytes)?),
    };
    if documents.is_empty() {
        return Err(DataError::Empty { file });
    }
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(Source { name, path: file, sha256, unit, documents })
}

/// Without the byte order mark that some editors put in front.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// A whole file as one text, its line ends as Python reads them: a line feed each.
fn text(file: &str, bytes: &[u8]) -> Result<String, DataError> {
    let text = std::str::from_utf8(bytes).map_err(|error| DataError::Utf8 {
        file: file.to_owned(),
        line: bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count(),
    })?;
    Ok(if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text.to_owned() })
}

#[cfg(feature = "parquet")]
fn table(file: &str, bytes: Vec<u8>) -> Result<Vec<(usize, Document)>, DataError> {
    super::parquet::documents(file, bytes)
}

#[cfg(not(feature = "parquet"))]
fn table(file: &str, _: Vec<u8>) -> Result<Vec<(usize, Document)>, DataError> {
    Err(DataError::NoParquet { file: file.to_owned() })
}

/// Lower-case hexadecimal digits of bytes.
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
