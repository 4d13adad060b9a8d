//! Where documents come from: built-in texts, a file, a directory of files.

use std::borrow::Cow;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::DataError;
use super::digest::hexadecimal;
use super::document::Document;
use super::kind::files;
use super::read::Input;
use super::rows::Source;

/// Data for calibration or evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataSource {
    /// The built-in text for calibration (505 kB).
    BuiltinCalibration,
    /// The built-in text for evaluation (207 kB); no document is in both.
    BuiltinHeldOut,
    /// A .txt, .jsonl, .json, .csv, .tsv or .parquet file, or a directory of these, which are taken in the order of
    /// their names. Text files may be packed (.gz, .zst).
    Path(PathBuf),
    /// Files of these kinds, in their order.
    Files(Vec<PathBuf>),
}

/// A built-in text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Builtin {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
}

impl Builtin {
    pub(super) fn document(self) -> Document {
        Document::Text(Cow::Borrowed(self.text))
    }

    pub(super) fn sha256(self) -> String {
        hexadecimal(&Sha256::digest(self.text))
    }
}

impl DataSource {
    /// The built-in text that it stands for, if any.
    pub(super) fn builtin(&self) -> Option<Builtin> {
        match self {
            Self::BuiltinCalibration => {
                Some(Builtin { name: "calibration.txt", text: mlx_quant_texts::CALIBRATION })
            }
            Self::BuiltinHeldOut => Some(Builtin { name: "held_out.txt", text: mlx_quant_texts::HELD_OUT }),
            Self::Path(_) | Self::Files(_) => None,
        }
    }

    /// The files that it stands for; none for a built-in text.
    pub(super) fn files(&self) -> Result<Vec<Source>, DataError> {
        let paths = match self {
            Self::BuiltinCalibration | Self::BuiltinHeldOut => &[][..],
            Self::Path(path) => std::slice::from_ref(path),
            Self::Files(paths) => paths,
        };
        let mut sources = Vec::new();
        for path in paths {
            for (path, kind) in files(path)? {
                sources.push(Source { input: Input::new(&path, kind.packing)?, form: kind.form });
            }
        }
        Ok(sources)
    }
}
