//! One document of a data set, in any of the forms that fine-tuning data comes in.

use std::borrow::Cow;

use mlx_quant_model::{Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

use super::messages::{self, kind};

/// What is done about a row that the chat template refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRefusal {
    /// It is left out and counted; the data are refused if that is most of them.
    #[default]
    LeaveOut,
    /// The data are refused.
    Stop,
}

/// The columns that mean something; others are ignored.
const COLUMNS: [&str; 15] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "tools",
    "conversations",
    "conversation",
    "system",
    "instruction",
    "input",
    "output",
    "response",
    "context",
    "question",
    "answer",
];

/// How many columns a message names.
const NAMED: usize = 12;

/// Whether a column of that name means something.
pub(super) fn is_column(name: &str) -> bool {
    COLUMNS.contains(&name)
}

/// Whether a row or table with these columns can hold documents.
pub(super) fn has_form(has: impl Fn(&str) -> bool) -> bool {
    const PAIRS: [[&str; 2]; 4] = [
        ["prompt", "completion"],
        ["instruction", "output"],
        ["instruction", "response"],
        ["question", "answer"],
    ];
    ["text", "messages", "conversations", "conversation"].into_iter().any(&has)
        || PAIRS.iter().any(|pair| pair.iter().all(|name| has(name)))
}

/// Names of columns, for messages; not all of them if they are many.
pub(super) fn named<'a>(columns: impl Iterator<Item = &'a str>) -> String {
    let shortened = |name: &str| match name.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    };
    let mut names: Vec<String> = columns.take(NAMED + 1).map(shortened).collect();
    if names.len() > NAMED {
        "...".clone_into(&mut names[NAMED]);
    }
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Why a row is no document.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Unfit {
    /// It has no form that is known; the columns it has.
    NoForm(String),
    /// A column is not what its name says.
    Column(String),
}

impl From<String> for Unfit {
    fn from(reason: String) -> Self {
        Self::Column(reason)
    }
}

/// A document before tokenization.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Text(Cow<'static, str>),
    /// Two texts: two turns of a conversation where the model has a chat template, else the two with what stands
    /// between them.
    Completion {
        prompt: String,
        between: &'static str,
        completion: String,
        tools: Option<Value>,
    },
    Messages {
        messages: Vec<Value>,
        tools: Option<Value>,
    },
}

impl Document {
    /// The document of a JSON object or a row. Where it has several forms, the order of precedence is mlx-lm's; forms
    /// that mlx-lm does not know come last.
    pub(super) fn from_object(mut object: Map<String, Value>) -> Result<Self, Unfit> {
        // Tables have a cell for every column: null is the same as absent.
        object.retain(|_, value| !value.is_null());
        if !has_form(|name| object.contains_key(name)) {
            return Err(Unfit::NoForm(named(object.keys().map(String::as_str))));
        }
        let mut take = |name: &str| object.remove(name);
        let tools = take("tools");
        let (prompt, completion) = (take("prompt"), take("completion"));
        if let (Some(prompt), Some(completion)) = (prompt, completion) {
            return Self::completion(prompt, completion, tools);
        }
        if let Some(given) = take("messages") {
            let messages = messages::checked("messages", given)?;
            return Ok(Self::Messages { messages, tools: messages::tools(tools)? });
        }
        if let Some(text) = take("text") {
            return Ok(Self::Text(Cow::Owned(string("text", text)?)));
        }
        let system = take("system");
        for name in ["conversations", "conversation"] {
            if let Some(turns) = take(name) {
                let messages = messages::checked(name, messages::from_turns(name, turns)?)?;
                let messages = messages::with_system(messages, system);
                return Ok(Self::Messages { messages, tools: messages::tools(tools)? });
            }
        }
        if let Some(instruction) = take("instruction")
            && let Some((name, answer)) =
                ["output", "response"].into_iter().find_map(|name| Some((name, take(name)?)))
        {
            let (mut prompt, completion) = (string("instruction", instruction)?, string(name, answer)?);
            for name in ["input", "context"] {
                let more = take(name).map_or(Ok(String::new()), |value| string(name, value))?;
                if !more.trim().is_empty() {
                    prompt = format!("{prompt}\n\n{more}");
                }
            }
            return Ok(Self::asked(prompt, completion, system));
        }
        if let (Some(Value::String(question)), Some(Value::String(answer))) =
            (take("question"), take("answer"))
        {
            return Ok(Self::asked(question, answer, system));
        }
        Err(Unfit::Column("question or answer is no string".to_owned()))
    }

    fn completion(prompt: Value, completion: Value, tools: Option<Value>) -> Result<Self, Unfit> {
        let tools = messages::tools(tools)?;
        match (prompt, completion) {
            (Value::String(prompt), Value::String(completion)) => {
                Ok(Self::Completion { prompt, between: "", completion, tools })
            }
            (prompt, completion) => {
                let mut messages = messages::spoken("prompt", "user", prompt)?;
                messages.extend(messages::spoken("completion", "assistant", completion)?);
                Ok(Self::Messages { messages, tools })
            }
        }
    }

    /// A question and its answer.
    fn asked(prompt: String, completion: String, system: Option<Value>) -> Self {
        match system {
            Some(Value::String(text)) if !text.trim().is_empty() => {
                let messages = turns(&prompt, &completion).to_vec();
                let messages = messages::with_system(messages, Some(text.into()));
                Self::Messages { messages, tools: None }
            }
            _ => Self::Completion { prompt, between: "\n", completion, tools: None },
        }
    }

    /// How much text it holds, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64,
            Self::Completion { prompt, completion, .. } => (prompt.len() + completion.len()) as u64,
            Self::Messages { messages, .. } => messages.iter().map(messages::bytes).sum(),
        }
    }

    /// The text that is tokenized.
    pub(super) fn render(&self, tokenizer: &Tokenizer) -> Result<Cow<'_, str>, TokenizerError> {
        Ok(match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Completion { prompt, completion, tools, .. } if tokenizer.has_chat_template() => {
                Cow::Owned(tokenizer.render_conversation(&turns(prompt, completion), tools.as_ref())?)
            }
            Self::Completion { prompt, between, completion, .. } => {
                Cow::Owned(format!("{prompt}{between}{completion}"))
            }
            Self::Messages { messages, tools } => {
                Cow::Owned(tokenizer.render_conversation(messages, tools.as_ref())?)
            }
        })
    }
}

fn turns(prompt: &str, completion: &str) -> [Value; 2] {
    [json!({"role": "user", "content": prompt}), json!({"role": "assistant", "content": completion})]
}

fn string(name: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("{name} is {}, not a string", kind(&other))),
    }
}
