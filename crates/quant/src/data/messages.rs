//! Conversations as data sets hold them, brought into the form that chat templates expect.
//!
//! Tables hold nested values as JSON text, or pad every struct of a column with nulls for the fields that other rows
//! have. A template asks `'tool_calls' in message` and iterates over what it finds, so padding has to go. `content`
//! alone may be null: of a message that only calls tools.

use serde_json::{Map, Value, json};

use super::mend;

/// What other programs call the roles.
const ROLES: [(&str, &str); 11] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("model", "assistant"),
    ("bard", "assistant"),
    ("bot", "assistant"),
    ("function_call", "assistant"),
    ("function", "tool"),
    ("observation", "tool"),
];

/// Messages of a column, each an object with a role and a content.
pub(super) fn checked(name: &str, messages: Value) -> Result<Vec<Value>, String> {
    let messages = match parsed(messages, Value::is_array) {
        Value::Array(messages) => messages,
        other => return Err(format!("{name} is {}, not a list", kind(&other))),
    };
    if messages.is_empty() {
        return Err(format!("{name} is empty"));
    }
    messages.into_iter().enumerate().map(|(index, message)| one(index, message)).collect()
}

fn one(index: usize, message: Value) -> Result<Value, String> {
    let mut fields = match parsed(message, Value::is_object) {
        Value::Object(fields) => fields,
        other => return Err(format!("message {index} is {}, not an object", kind(&other))),
    };
    fields.retain(|name, value| name == "content" || !value.is_null());
    fields.values_mut().for_each(strip);
    if !fields.get("role").is_some_and(Value::is_string) {
        return Err(format!("message {index} has no role"));
    }
    match fields.get("content") {
        Some(Value::String(_) | Value::Null) => {}
        Some(Value::Array(parts)) => {
            if let Some(at) = parts.iter().position(|part| !part.is_object() && !part.is_string()) {
                let found = kind(&parts[at]);
                return Err(format!("part {at} of content of message {index} is {found}, not an object"));
            }
        }
        Some(other) => return Err(format!("content of message {index} is {}, not a string", kind(other))),
        None if fields.contains_key("tool_calls") => {}
        None => return Err(format!("message {index} has no content")),
    }
    parse_calls(&mut fields);
    Ok(Value::Object(fields))
}

/// Arguments of calls that are JSON text, as templates expect them. Other text stays.
fn parse_calls(message: &mut Map<String, Value>) {
    if let Some(calls) = message.get_mut("tool_calls") {
        *calls = parsed(calls.take(), Value::is_array);
        for call in calls.as_array_mut().into_iter().flatten() {
            parse_arguments(call);
            call.get_mut("function").into_iter().for_each(parse_arguments);
        }
    }
    message.get_mut("function_call").into_iter().for_each(parse_arguments);
}

fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.get_mut("arguments") {
        *arguments = parsed(arguments.take(), Value::is_object);
    }
}

/// Tools of a row; nothing where there are none.
pub(super) fn tools(tools: Option<Value>) -> Result<Option<Value>, String> {
    let Some(tools) = tools else { return Ok(None) };
    let mut tools = match tools {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => {
            mend::parse(&text).map_err(|error| format!("tools is text that is no JSON ({error})"))?
        }
        mut tools => {
            strip(&mut tools);
            tools
        }
    };
    if tools.is_object() {
        tools = Value::Array(vec![tools]);
    }
    let tools = match tools {
        Value::Array(tools) => tools,
        Value::Null => return Ok(None),
        other => return Err(format!("tools is {}, not a list", kind(&other))),
    };
    let tool = |(index, tool)| match parsed(tool, Value::is_object) {
        tool @ Value::Object(_) => Ok(tool),
        other => Err(format!("tool {index} is {}, not an object", kind(&other))),
    };
    let tools = tools.into_iter().enumerate().map(tool).collect::<Result<Vec<_>, _>>()?;
    Ok(if tools.is_empty() { None } else { Some(Value::Array(tools)) })
}

/// A side of prompt and completion as messages: a text of that role, or a list of messages.
pub(super) fn spoken(name: &str, role: &str, given: Value) -> Result<Vec<Value>, String> {
    match given {
        Value::String(text) => Ok(vec![json!({"role": role, "content": text})]),
        Value::Array(messages) if messages.is_empty() => Err(format!("{name} is a list of no messages")),
        messages @ Value::Array(_) => checked(name, messages).map_err(|reason| format!("{name}: {reason}")),
        other => Err(format!("{name} is {}, not a string", kind(&other))),
    }
}

/// Turns of `from` and `value` as messages; messages stay as they are.
pub(super) fn from_turns(name: &str, turns: Value) -> Result<Value, String> {
    let mut turns = match parsed(turns, Value::is_array) {
        Value::Array(turns) => turns,
        other => return Err(format!("{name} is {}, not a list", kind(&other))),
    };
    for turn in &mut turns {
        if let Value::Object(fields) = turn
            && let Some(from) = fields.get("from").and_then(Value::as_str)
            && !fields.get("role").is_some_and(Value::is_string)
        {
            let from = from.to_owned();
            let lower = from.to_lowercase();
            let role = ROLES.iter().find(|(name, _)| *name == lower).map_or(from.as_str(), |(_, role)| role);
            let mut message = Map::from_iter([("role".to_owned(), Value::from(role))]);
            if let Some(said) = fields.remove("value").or_else(|| fields.remove("content")) {
                message.insert("content".to_owned(), said);
            }
            *turn = Value::Object(message);
        }
    }
    Ok(Value::Array(turns))
}

/// A conversation with the text of its column `system` in front, if it does not begin with one itself.
pub(super) fn with_system(mut messages: Vec<Value>, system: Option<Value>) -> Vec<Value> {
    if let Some(Value::String(system)) = system
        && !system.trim().is_empty()
        && messages.first().is_some_and(|first| first["role"] != "system")
    {
        messages.insert(0, json!({"role": "system", "content": system}));
    }
    messages
}

/// How much text a value holds, in bytes.
pub(super) fn bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(bytes).sum(),
        Value::Object(fields) => fields.values().map(bytes).sum(),
        _ => 0,
    }
}

/// What JSON text stands for, if it is text and stands for what is wanted; else the value itself.
fn parsed(value: Value, wanted: fn(&Value) -> bool) -> Value {
    let text = match &value {
        Value::String(text) if text.trim_start().starts_with(['[', '{']) => text,
        _ => return value,
    };
    mend::parse(text).ok().filter(wanted).unwrap_or(value)
}

/// Removes null fields at every depth.
fn strip(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(strip),
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(strip);
        }
        _ => {}
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
