//! Which files are data, by their names.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::DataError;

/// How documents stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// All of it one document.
    Text,
    /// A JSON object a line.
    Lines,
    /// A JSON list of objects.
    List,
    /// A table as text, with what stands between its columns.
    Separated(u8),
    /// A Parquet file.
    Table,
}

impl Form {
    /// What the number of a document counts.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Text => "document",
            Self::Lines => "line",
            Self::List | Self::Separated(_) | Self::Table => "row",
        }
    }
}

/// What a file is packed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The kind of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) form: Form,
    pub(super) packing: Packing,
}

impl Kind {
    pub(super) fn of(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let (name, packing) = match name.rsplit_once('.')? {
            (name, "gz") => (name, Packing::Gzip),
            (name, "zst") => (name, Packing::Zstd),
            _ => (name.as_str(), Packing::None),
        };
        let form = match name.rsplit_once('.')?.1 {
            "txt" => Form::Text,
            "jsonl" | "ndjson" => Form::Lines,
            "json" => Form::List,
            "csv" => Form::Separated(b','),
            "tsv" => Form::Separated(b'\t'),
            "parquet" if packing == Packing::None => Form::Table,
            _ => return None,
        };
        Some(Self { form, packing })
    }
}

/// How likely a file is to be the data of the directory or repository that it stands in, by its name alone; the
/// likeliest is greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DataFile {
    /// A .json file that usually says something about data or a model, such as dataset_infos.json.
    Metadata,
    /// A .txt file: data, or prose about data.
    Prose,
    /// Any other .json file: data, or settings of some program.
    Json,
    /// A .csv or .tsv file.
    Separated,
    /// A .jsonl or .parquet file.
    Rows,
}

impl DataFile {
    /// What a file of that name is; nothing if it is of no kind that is read. Packed files (.gz, .zst) are as what is
    /// in them.
    pub fn of(name: &str) -> Option<Self> {
        Some(match Kind::of(name)?.form {
            Form::Text => Self::Prose,
            Form::List if is_metadata(name) => Self::Metadata,
            Form::List => Self::Json,
            Form::Separated(_) => Self::Separated,
            Form::Lines | Form::Table => Self::Rows,
        })
    }
}

/// Files that `datasets`, `transformers` and others write beside data.
fn is_metadata(name: &str) -> bool {
    const STEMS: [&str; 14] = [
        "added_tokens",
        "chat_template",
        "config",
        "dataset_dict",
        "dataset_info",
        "dataset_infos",
        "generation_config",
        "index",
        "metadata",
        "package",
        "special_tokens_map",
        "state",
        "tokenizer",
        "tokenizer_config",
    ];
    let name = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    STEMS.contains(&name.split('.').next().unwrap_or_default())
}

/// Orders .json files behind all others.
fn json_rank(likely: DataFile) -> u8 {
    match likely {
        DataFile::Metadata => 0,
        DataFile::Json => 1,
        DataFile::Prose | DataFile::Separated | DataFile::Rows => 2,
    }
}

/// The files that a path stands for, sorted. Of a directory these are its .txt, .jsonl, .csv, .tsv and .parquet files;
/// .json files only if there is nothing else, because most of them are settings. Hidden files and subdirectories are
/// left out.
pub(super) fn files(path: &Path) -> Result<Vec<(PathBuf, Kind)>, DataError> {
    let name_of = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !fs::metadata(path)?.is_dir() {
        let kind =
            Kind::of(&name_of(path)).ok_or_else(|| DataError::Kind { file: path.display().to_string() })?;
        return Ok(vec![(path.to_owned(), kind)]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let name = name_of(&path);
        if let (Some(kind), Some(likely)) = (Kind::of(&name), DataFile::of(&name))
            && !name.starts_with('.')
            && path.is_file()
        {
            files.push((path, kind, likely));
        }
    }
    // Rather anything than .json, rather any .json than metadata.
    let best = files.iter().map(|(.., likely)| json_rank(*likely)).max();
    files.retain(|(.., likely)| Some(json_rank(*likely)) == best);
    if files.is_empty() {
        return Err(DataError::EmptyDirectory { directory: path.display().to_string() });
    }
    let mut files: Vec<_> = files.into_iter().map(|(path, kind, _)| (path, kind)).collect();
    files.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_names() {
        let kind = |form, packing| Some(Kind { form, packing });
        for (name, expected) in [
            ("a.txt", kind(Form::Text, Packing::None)),
            ("A.JSONL", kind(Form::Lines, Packing::None)),
            ("a.b.ndjson", kind(Form::Lines, Packing::None)),
            ("a.JSONL.GZ", kind(Form::Lines, Packing::Gzip)),
            ("a.json.zst", kind(Form::List, Packing::Zstd)),
            ("a.tsv.gz", kind(Form::Separated(b'\t'), Packing::Gzip)),
            ("a.csv", kind(Form::Separated(b','), Packing::None)),
            ("a.parquet", kind(Form::Table, Packing::None)),
            ("a.parquet.gz", None),
            ("a.gz", None),
            ("txt", None),
            ("a.tar.gz", None),
            ("a.pdf", None),
        ] {
            assert_eq!(Kind::of(name), expected, "{name}");
        }
        for (name, expected) in [
            ("data/train.json", Some(DataFile::Json)),
            ("data/dataset_infos.json", Some(DataFile::Metadata)),
            ("State.JSON", Some(DataFile::Metadata)),
            ("metadata.jsonl", Some(DataFile::Rows)),
            ("model.safetensors", None),
        ] {
            assert_eq!(DataFile::of(name), expected, "{name}");
        }
        assert!(DataFile::Rows > DataFile::Separated && DataFile::Json > DataFile::Metadata);
    }
}
