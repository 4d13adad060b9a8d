//! One document of a data set, in any of the three forms that fine-tuning data comes in.

use std::borrow::Cow;

use mlx_quant_model::{Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

/// The columns that mean something; others are ignored.
#[cfg_attr(not(feature = "parquet"), allow(dead_code, reason = "only parquet files choose columns"))]
pub(super) const COLUMNS: [&str; 5] = ["text", "prompt", "completion", "messages", "tools"];

/// A document before tokenization.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Text(Cow<'static, str>),
    Completion { prompt: String, completion: String, tools: Option<Value> },
    Messages { messages: Vec<Value>, tools: Option<Value> },
}

impl Document {
    /// The document of a JSON object or a row. Where it has several forms, the order of precedence is mlx-lm's.
    /// Fails with a reason.
    pub(super) fn from_object(mut object: Map<String, Value>) -> Result<Self, String> {
        // Tables have a cell for every column: null is the same as absent.
        let mut take = |name: &str| object.remove(name).filter(|value| !value.is_null());
        let (prompt, completion) = (take("prompt"), take("completion"));
        let tools = take("tools");
        if let (Some(prompt), Some(completion)) = (prompt, completion) {
            let (prompt, completion) = (string("prompt", prompt)?, string("completion", completion)?);
            return Ok(Self::Completion { prompt, completion, tools });
        }
        if let Some(messages) = take("messages") {
            return Ok(Self::Messages { messages: checked(messages)?, tools });
        }
        if let Some(text) = take("text") {
            return Ok(Self::Text(Cow::Owned(string("text", text)?)));
        }
        Err("neither text, nor prompt and completion, nor messages".to_owned())
    }

    /// The text that is tokenized. A prompt with its completion is a conversation of two turns where the model has a
    /// chat template, else the two as they are.
    pub(super) fn render(&self, tokenizer: &Tokenizer) -> Result<Cow<'_, str>, TokenizerError> {
        Ok(match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Completion { prompt, completion, tools } if tokenizer.has_chat_template() => {
                let turns = [
                    json!({"role": "user", "content": prompt}),
                    json!({"role": "assistant", "content": completion}),
                ];
                Cow::Owned(tokenizer.render_chat(&turns, tools.as_ref(), false)?)
            }
            Self::Completion { prompt, completion, .. } => Cow::Owned(format!("{prompt}{completion}")),
            Self::Messages { messages, tools } => {
                Cow::Owned(tokenizer.render_chat(messages, tools.as_ref(), false)?)
            }
        })
    }
}

fn string(name: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("{name} is {}, not a string", kind(&other))),
    }
}

fn checked(messages: Value) -> Result<Vec<Value>, String> {
    let Value::Array(messages) = messages else {
        return Err(format!("messages is {}, not a list", kind(&messages)));
    };
    if messages.is_empty() {
        return Err("messages is empty".to_owned());
    }
    for (index, message) in messages.iter().enumerate() {
        let Value::Object(fields) = message else {
            return Err(format!("message {index} is {}, not an object", kind(message)));
        };
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(format!("message {index} has no role"));
        }
        match fields.get("content") {
            Some(Value::String(_) | Value::Array(_) | Value::Null) => {}
            Some(other) => {
                return Err(format!("content of message {index} is {}, not a string", kind(other)));
            }
            None if fields.contains_key("tool_calls") => {}
            None => return Err(format!("message {index} has no content")),
        }
    }
    Ok(messages)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
