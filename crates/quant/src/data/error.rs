//! Everything that can be wrong with calibration or evaluation data.

use mlx_quant_model::TokenizerError;

/// Data that cannot be used; found before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum DataError {
    #[error("{0}; hint: check that --data names a file or directory that exists and that you may read")]
    Io(String),
    #[error(
        "{file} is not a plain file; hint: give a .txt, .jsonl or .parquet file, or a directory of these"
    )]
    NotAFile { file: String },
    #[error(
        "{file} is no kind of data that is known; hint: give a .txt, .jsonl or .parquet file, or a directory of these"
    )]
    Kind { file: String },
    #[error(
        "directory {directory} holds no .txt, .jsonl or .parquet files; hint: give the directory that holds them itself"
    )]
    EmptyDirectory { directory: String },
    #[error("{file}, line {line}: not UTF-8; hint: convert the file, for example with iconv")]
    Utf8 { file: String, line: usize },
    #[error(
        "{file}, line {line}: {reason}; hint: each line is one JSON object, such as {{\"text\": \"...\"}}"
    )]
    Json { file: String, line: usize, reason: String },
    #[error(
        "{file}, {place}: {reason}; hint: give a text, a prompt and a completion, or messages with role and content"
    )]
    Form { file: String, place: String, reason: String },
    #[error("{file}, {place}: {error}")]
    Tokenizer { file: String, place: String, error: TokenizerError },
    #[error(
        "{file}: {reason}; hint: the file is damaged or of a kind that is not read, write it anew, or as .jsonl"
    )]
    Parquet { file: String, reason: String },
    #[error(
        "{file}: this build does not read .parquet; hint: build with the feature parquet, or convert the file to .jsonl"
    )]
    NoParquet { file: String },
    #[error("{file} holds no text; hint: is this the right file?")]
    Empty { file: String },
    #[error(
        "{file} has {found} tokens, one window needs {needed}; hint: use a shorter --sequence-length, or more text"
    )]
    TooShort { file: String, found: usize, needed: usize },
    #[error(
        "{file}: token {id} is beyond the model's vocabulary of {vocabulary}; hint: tokenizer.json belongs to another model, or was extended without the weights"
    )]
    Vocabulary { file: String, id: u32, vocabulary: usize },
    #[error(
        "windows of {0} tokens leave nothing to predict; hint: use a --sequence-length of 2 or more, such as 512"
    )]
    SequenceLength(usize),
}

impl From<std::io::Error> for DataError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}
