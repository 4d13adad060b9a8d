//! Why there is no text to tokens: a tokenizer or a chat template that cannot be used.

use mlx_format::checkpoint::DirectoryError;

/// A model without a usable tokenizer, or messages that its chat template does not take.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TokenizerError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(
        "{directory} has no tokenizer.json{found}; hint: copy tokenizer.json from the model's repository, or make one with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..)"
    )]
    Missing { directory: String, found: String },
    #[error("{file}: {reason}; hint: the file is damaged or newer than this program, download it again")]
    Damaged { file: String, reason: String },
    #[error("text of {bytes} bytes does not become tokens: {reason}; hint: is the tokenizer.json complete?")]
    Encode { bytes: usize, reason: String },
    #[error(
        "{directory} has no chat template, which messages need; hint: use data with text or prompt and completion, or put a chat_template.jinja into the model's directory"
    )]
    NoChatTemplate { directory: String },
    #[error(
        "chat template of {file}: {reason}; hint: check that the messages are as this model expects them (roles, their order, content)"
    )]
    Template { file: String, reason: String },
    #[error(
        "chat template of {file} is no template: {reason}; hint: the file is damaged or of a kind that is not known here, get it from the model's makers"
    )]
    Syntax { file: String, reason: String },
    #[error("chat template of {file} was not rendered ({reason}); hint: is there memory left? try again")]
    Thread { file: String, reason: String },
    #[error(
        "chat template of {file} does not come to an end ({reason}); hint: the template is damaged or hostile, get it from the model's makers"
    )]
    Runaway { file: String, reason: String },
}
