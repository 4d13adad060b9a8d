//! Text to token ids: a model's own tokenizer, read from its directory.
//!
//! Calibration and evaluation are only worth something if the ids are the ones that the model was trained with, so the
//! work is left to Hugging Face's own `tokenizers` crate and only `tokenizer.json` is read. What stands around
//! it in Python (special tokens by name, BOS or not, chat template) comes from the small files beside it and is
//! interpreted here as transformers does.

use mlx_format::checkpoint::Directory;
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::TokenizerError;
use crate::chat::ChatTemplate;
use crate::contained::contained;
use crate::pieces::pieces;

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";
const LEGACY: &str = "chat_template.json";
const ADDITIONAL: &str = "additional_chat_templates";

/// The special tokens that have a name.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    directory: String,
    prefix: Vec<u32>,
    end_of_text: Option<u32>,
    highest_id: u32,
    chat: Option<ChatTemplate>,
    tool_use: Option<ChatTemplate>,
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
        let mut inner = contained(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|reason| damaged(TOKENIZER, reason))?
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
        let Templates { default, tool_use } = templates(directory, &settings)?;
        let chat = |(file, source): (String, String)| ChatTemplate::new(file, &source, special.clone());
        Ok(Self {
            inner,
            directory: directory.display().into_owned(),
            prefix,
            end_of_text,
            highest_id,
            chat: default.map(chat),
            tool_use: tool_use.map(chat),
        })
    }

    /// The ids of a text, without any that the tokenizer would put around it. Special tokens that are written out
    /// in the text are recognised. Long texts are tokenized in pieces on all cores, with the same ids.
    ///
    /// # Errors
    /// If the tokenizer knows no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let whole = |text: &str| encode(&self.inner, text, false);
        let pieces = pieces(text, whole)?;
        if let [text] = pieces[..] {
            return whole(text);
        }
        let ids: Vec<_> = pieces.into_par_iter().map(whole).collect::<Result<_, _>>()?;
        Ok(ids.concat())
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
    /// [`Tokenizer::encode`]. Messages and `tools` are handed to the template as they are, with tools to the one that
    /// the model has for these (`tool_use`), if any; `add_generation_prompt` asks for the opening of the assistant's
    /// next turn at the end.
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
        self.template(tools)?.render(messages, tools, add_generation_prompt)
    }

    /// A conversation of a data set as one text: [`Tokenizer::render_chat`] with contents in the form that the template
    /// takes. Parts (`[{"type": "text", "text": ...}]`) are joined where it wants text, text becomes a part where it
    /// wants parts, and parts that are no text (images) are dropped.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`].
    pub fn render_conversation(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
    ) -> Result<String, TokenizerError> {
        self.template(tools)?.render_adapted(messages, tools)
    }

    fn template(&self, tools: Option<&Value>) -> Result<&ChatTemplate, TokenizerError> {
        let special = self.tool_use.as_ref().filter(|_| tools.is_some());
        special
            .or(self.chat.as_ref())
            .ok_or_else(|| TokenizerError::NoChatTemplate { directory: self.directory.clone() })
    }
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
    match contained(|| inner.encode_fast(text, special)) {
        Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
        Ok(Err(error)) => Err(TokenizerError::Encode { bytes: text.len(), reason: error.to_string() }),
        Err(reason) => Err(TokenizerError::Encode { bytes: text.len(), reason }),
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

/// The chat templates of a model, each with the file that it stands in.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    pub(crate) default: Option<(String, String)>,
    /// For conversations with tools.
    tool_use: Option<(String, String)>,
}

/// As transformers finds them: chat_template.jinja, else `chat_template` in tokenizer_config.json, else in
/// chat_template.json (of a processor); beside these additional_chat_templates/NAME.jinja.
pub(crate) fn templates(
    directory: &Directory,
    settings: &Map<String, Value>,
) -> Result<Templates, TokenizerError> {
    let mut found = Templates { default: read_text(directory, TEMPLATE)?, tool_use: None };
    if found.default.is_none() {
        found = named_templates(directory.display_file(SETTINGS), settings);
    }
    if found.default.is_none() {
        let others = named_templates(directory.display_file(LEGACY), &read_object(directory, LEGACY)?);
        found = Templates { default: others.default, tool_use: found.tool_use.or(others.tool_use) };
    }
    if let Directory::Path(path) = directory
        && let Ok(additional) = Directory::open(&path.join(ADDITIONAL))
        && let Some(template) = read_text(&additional, "tool_use.jinja")?
    {
        found.tool_use = Some(template);
    }
    Ok(found)
}

/// A template file with its name for messages.
fn read_text(directory: &Directory, file: &str) -> Result<Option<(String, String)>, TokenizerError> {
    let Some(bytes) = directory.read(file)? else { return Ok(None) };
    let name = directory.display_file(file);
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Some((name, text.to_owned()))),
        Err(error) => Err(TokenizerError::Damaged { file: name, reason: error.to_string() }),
    }
}

/// `chat_template` of a JSON file: a string, or a list of `{name, template}`.
fn named_templates(file: String, object: &Map<String, Value>) -> Templates {
    let template = |name: &str| {
        let source = match object.get("chat_template")? {
            Value::Array(named) => named.iter().find(|it| it["name"] == name)?.get("template")?,
            other if name == "default" => other,
            _ => return None,
        };
        Some((file.clone(), source.as_str()?.to_owned()))
    };
    Templates { default: template("default"), tool_use: template("tool_use") }
}
