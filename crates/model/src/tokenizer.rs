//! Text to token ids: a model's own tokenizer, read from its directory.
//!
//! Calibration and evaluation are only worth something if the ids are the ones that the model was trained with, so the
//! work is left to Hugging Face's own `tokenizers` crate and only `tokenizer.json` is read. What stands around
//! it in Python (special tokens by name, BOS or not, chat template) comes from the small files beside it and is
//! interpreted here as transformers does.

use std::borrow::Cow;

use mlx_format::checkpoint::{Directory, DirectoryError};
use serde_json::{Map, Value};

use crate::chat::ChatTemplate;

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// The special tokens that have a name.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

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
        "chat template of {file} does not come to an end ({reason}); hint: the template is damaged or hostile, get it from the model's makers"
    )]
    Runaway { file: String, reason: String },
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    directory: String,
    prefix: Vec<u32>,
    end_of_text: Option<u32>,
    highest_id: u32,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and the small files beside it.
    ///
    /// # Errors
    /// If there is no `tokenizer.json`, or one of the files is no such file.
    pub fn load(directory: &Directory) -> Result<Self, TokenizerError> {
        let Some(bytes) = directory.read(TOKENIZER)? else {
            return Err(missing(directory)?);
        };
        let damaged = |file: &str, reason: String| TokenizerError::Damaged {
            file: directory.display_file(file),
            reason,
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| damaged(TOKENIZER, error.to_string()))?;
        // Some files carry the settings of their makers' last call; a text is never cut or filled up here.
        inner.with_truncation(None).map_err(|error| damaged(TOKENIZER, error.to_string()))?;
        inner.with_padding(None);

        let settings = read_object(directory, SETTINGS)?;
        let special = named_tokens(&settings, &read_object(directory, SPECIAL)?);
        let id_of =
            |name: &str| special.get(name).and_then(Value::as_str).and_then(|it| inner.token_to_id(it));
        let (bos, end_of_text) = (id_of("bos_token"), id_of("eos_token"));
        let prefix = match (settings.get("add_bos_token"), settings.get("add_eos_token")) {
            (None, None) => post_processor_prefix(&inner, bos)?,
            // Named in the settings, they take the place of the post-processor in tokenizer.json.
            (wanted, _) => bos.filter(|_| wanted == Some(&Value::Bool(true))).into_iter().collect(),
        };
        let highest_id = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let chat = template_source(directory, &settings)?
            .map(|(file, source)| ChatTemplate::new(directory.display_file(file), &source, special));
        Ok(Self { inner, directory: directory.display().into_owned(), prefix, end_of_text, highest_id, chat })
    }

    /// The ids of a text, without any that the tokenizer would put around it. Special tokens that are written out
    /// in the text are recognised.
    ///
    /// # Errors
    /// If the tokenizer knows no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.inner, text, false)
    }

    /// What the tokenizer puts in front of every text: the beginning-of-text token, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The end-of-text token, if there is one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// The highest id that [`Tokenizer::encode`] can return.
    pub fn highest_id(&self) -> u32 {
        self.highest_id
    }

    /// Whether messages can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// Messages (objects with `role` and `content`) as one text with special tokens written out, ready for
    /// [`Tokenizer::encode`]. `tools` is handed to the template as it is; `add_generation_prompt` asks for the
    /// opening of the assistant's next turn at the end.
    ///
    /// # Errors
    /// If the model has no chat template, the template refuses the messages, or rendering exceeds its budget of
    /// work and memory.
    pub fn render_chat(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let chat = self
            .chat
            .as_ref()
            .ok_or_else(|| TokenizerError::NoChatTemplate { directory: self.directory.clone() })?;
        chat.render(messages, tools, add_generation_prompt)
    }
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
    match inner.encode_fast(text, special) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(error) => Err(TokenizerError::Encode { bytes: text.len(), reason: error.to_string() }),
    }
}

/// The beginning-of-text token, if the post-processor puts it in front of a text.
fn post_processor_prefix(
    inner: &tokenizers::Tokenizer,
    bos: Option<u32>,
) -> Result<Vec<u32>, TokenizerError> {
    let ids = encode(inner, "a", true)?;
    Ok(bos.filter(|bos| ids.len() > 1 && ids[0] == *bos).into_iter().collect())
}

fn missing(directory: &Directory) -> Result<TokenizerError, TokenizerError> {
    let others = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt"];
    let files = directory.files()?;
    let found = files.iter().find(|file| others.contains(&file.as_str()) || file.ends_with(".tiktoken"));
    Ok(TokenizerError::Missing {
        directory: directory.display().into_owned(),
        found: found.map_or_else(String::new, |file| format!(" (its {file} is not read)")),
    })
}

/// A file of one JSON object; empty if it does not exist.
pub(crate) fn read_object(directory: &Directory, file: &str) -> Result<Map<String, Value>, TokenizerError> {
    let Some(bytes) = directory.read(file)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Damaged {
        file: directory.display_file(file),
        reason: error.to_string(),
    })
}

/// Named special tokens as plain strings; tokenizer_config.json wins over special_tokens_map.json.
pub(crate) fn named_tokens(
    settings: &Map<String, Value>,
    special: &Map<String, Value>,
) -> Map<String, Value> {
    let mut tokens = Map::new();
    for name in NAMED {
        let content = [settings, special].into_iter().find_map(|map| {
            let token = map.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str())
        });
        if let Some(content) = content {
            tokens.insert(name.to_owned(), Value::from(content));
        }
    }
    tokens
}

/// The chat template and the file it stands in: chat_template.jinja, else tokenizer_config.json's `chat_template`, a
/// string or a list of `{name, template}` of which `default` is taken.
pub(crate) fn template_source(
    directory: &Directory,
    settings: &Map<String, Value>,
) -> Result<Option<(&'static str, String)>, TokenizerError> {
    if let Some(bytes) = directory.read(TEMPLATE)? {
        let source = match bytes {
            Cow::Borrowed(bytes) => std::str::from_utf8(bytes).map(str::to_owned),
            Cow::Owned(bytes) => String::from_utf8(bytes).map_err(|error| error.utf8_error()),
        };
        let source = source.map_err(|error| TokenizerError::Damaged {
            file: directory.display_file(TEMPLATE),
            reason: error.to_string(),
        })?;
        return Ok(Some((TEMPLATE, source)));
    }
    let source = match settings.get("chat_template") {
        Some(Value::Array(named)) => named
            .iter()
            .find(|it| it.get("name") == Some(&Value::from("default")))
            .and_then(|it| it.get("template")),
        other => other,
    };
    Ok(source.and_then(Value::as_str).map(|source| (SETTINGS, source.to_owned())))
}
