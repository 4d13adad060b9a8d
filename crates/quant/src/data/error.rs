//! Everything that can be wrong with calibration or evaluation data.

use mlx_quant_model::TokenizerError;

/// What is read, for messages.
const KINDS: &str = ".txt, .jsonl, .json, .csv, .tsv or .parquet";

/// Data that cannot be used; found before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum DataError {
    #[error("{0}; hint: check that --data names a file or directory that exists and that you may read")]
    Io(String),
    #[error("{file} is not a plain file; hint: give a {KINDS} file, or a directory of these")]
    NotAFile { file: String },
    #[error(
        "{file} is no kind of data that is known; hint: give a {KINDS} file (packed too: .gz, .zst), or a directory of these"
    )]
    Kind { file: String },
    #[error("directory {directory} holds no {KINDS} files; hint: give the directory that holds them itself")]
    EmptyDirectory { directory: String },
    #[error("{file}, line {line}: not UTF-8; hint: convert the file, for example with iconv")]
    Utf8 { file: String, line: usize },
    #[error("{file}, {place}: {reason}; hint: each line is one JSON object, such as {{\"text\": \"...\"}}")]
    Json { file: String, place: String, reason: String },
    #[error(
        "{file}, {place}: {reason}; hint: a .json file is a list of objects, such as [{{\"text\": \"...\"}}]; is all of it there?"
    )]
    List { file: String, place: String, reason: String },
    #[error(
        "{file}, {place}: {reason}; hint: the first row names the columns, and cells with separators, quotes or line ends stand in quotes; or write the file as .jsonl"
    )]
    Separated { file: String, place: String, reason: String },
    #[error(
        "{file}, {place}: more than {} MiB without an end; hint: is this a file of documents? split the row, or give the file as .txt", limit >> 20
    )]
    LongRow { file: String, place: String, limit: u64 },
    #[error("{file} cannot be unpacked: {reason}; hint: the file is damaged or not whole, fetch it again")]
    Packed { file: String, reason: String },
    #[error(
        "{file}, {place}: {reason}; hint: give a text, a prompt and a completion, or messages with role and content"
    )]
    Form { file: String, place: String, reason: String },
    #[error(
        "{file}, {place}: neither text, nor prompt and completion, nor messages, nor conversations, nor instruction and output; hint: the columns found are {found}; give the one that holds the documents one of these names"
    )]
    NoForm { file: String, place: String, found: String },
    #[error("{file}, {place}: {error}")]
    Tokenizer { file: String, place: String, error: TokenizerError },
    #[error(
        "{file}, {place}: the model's chat template refuses the row (and in all {left_out} of {rows}): {reason}; hint: is the data made for such a model? look at the roles, their order, and content"
    )]
    LeftOut { file: String, left_out: usize, rows: usize, place: String, reason: String },
    #[error(
        "{file}: {reason}; hint: the file is damaged or of a kind that is not read, write it anew, or as .jsonl"
    )]
    Parquet { file: String, reason: String },
    #[error(
        "{file}: this build does not read .parquet; hint: build with `--features parquet`, or convert the file to .jsonl"
    )]
    NoParquet { file: String },
    #[error(
        "the text holds a single window: nothing is left to judge steps on; hint: give more text or a shorter --sequence-length"
    )]
    OneWindow,
    #[error(
        "{file}, line {line}: {reason}; hint: each line is one JSON object: {{\"question\": \"...\", \"choices\": [\"...\", \"...\"], \"answer\": 0}}, where answer counts choices from 0"
    )]
    Question { file: String, line: usize, reason: String },
    #[error("{0}; hint: --suite takes a .jsonl file of questions, which exists and which you may read")]
    Suite(String),
    #[error("{file} holds no questions; hint: is this the right file? each line is one JSON object")]
    NoQuestions { file: String },
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
