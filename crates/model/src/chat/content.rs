//! Contents of messages: text, or a list of parts, whichever a template takes.
//!
//! Data has either, and templates take text, parts, or both; one that is given the other kind often says nothing, and
//! leaves the text out or prints the list. So each template is tried once: a known text is shown to it in both forms,
//! for each role, and what comes out tells which it takes. Text goes first where both do, because then nothing but the
//! text can be in the way (a template may have places for images).

use serde_json::{Value, json};

/// The text that is looked for.
const PROBE: &str = "ProbeOfThisTemplate";

/// Roles that templates write apart; others are taken as the user's.
const ROLES: [&str; 4] = ["user", "system", "assistant", "tool"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Parts,
}

/// Which form of content a template takes from each of [`ROLES`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Forms([Form; ROLES.len()]);

impl Forms {
    /// Tries a template. `render` gives what it makes of messages, nothing if it refuses them.
    pub(super) fn find<E>(mut render: impl FnMut(&[Value]) -> Result<Option<String>, E>) -> Result<Self, E> {
        let mut forms = [Form::Text; ROLES.len()];
        for (index, role) in ROLES.iter().enumerate() {
            let mut shows = |form: Form| -> Result<bool, E> {
                let messages = conversation(role, content(form, PROBE), &content(forms[0], "Hello"));
                Ok(render(&messages)?.is_some_and(|text| shown(&text, form)))
            };
            forms[index] = if shows(Form::Text)? {
                Form::Text
            } else if shows(Form::Parts)? {
                Form::Parts
            } else {
                forms[0]
            };
        }
        Ok(Self(forms))
    }

    /// Messages in the form that the template takes. Parts that are no text are dropped.
    pub(super) fn adapt(self, messages: &[Value]) -> Vec<Value> {
        messages.iter().map(|message| self.adapt_one(message)).collect()
    }

    fn adapt_one(self, message: &Value) -> Value {
        let mut message = message.clone();
        let role = message.get("role").and_then(Value::as_str);
        let role = if role == Some("developer") { Some("system") } else { role };
        let form = self.0[ROLES.iter().position(|known| Some(*known) == role).unwrap_or(0)];
        if let Some(given) = message.get_mut("content") {
            match (&*given, form) {
                (Value::Array(parts), Form::Text) => {
                    *given = parts.iter().filter_map(text_of).collect::<String>().into();
                }
                (Value::Array(parts), Form::Parts) => {
                    *given = parts.iter().filter_map(text_of).map(part).collect();
                }
                (Value::String(text), Form::Parts) => *given = content(Form::Parts, text),
                _ => {}
            }
        }
        message
    }
}

fn content(form: Form, text: &str) -> Value {
    match form {
        Form::Text => text.into(),
        Form::Parts => Value::Array(vec![part(text)]),
    }
}

fn part(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// The text of a part, if it is one of text.
fn text_of(part: &Value) -> Option<&str> {
    part.as_str().or_else(|| part.get("text")?.as_str())
}

/// A conversation that most templates take and in which a message of that role has that content.
fn conversation(role: &str, content: Value, hello: &Value) -> Vec<Value> {
    let user = json!({"role": "user", "content": hello});
    let message = json!({"role": role, "content": content});
    match role {
        "user" => vec![message],
        "system" => vec![message, user],
        "assistant" => vec![user, message],
        _ => {
            let call = json!({"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": {}}});
            let called = json!({"role": "assistant", "content": "", "tool_calls": [call]});
            let result =
                json!({"role": role, "content": content, "tool_call_id": "call00000", "name": "probe"});
            vec![user, called, result]
        }
    }
}

/// Whether the text came out. A list of parts that was printed as it is has quotes around it.
fn shown(text: &str, form: Form) -> bool {
    let printed = || ['"', '\''].iter().any(|quote| text.contains(&format!("{quote}{PROBE}")));
    text.contains(PROBE) && (form == Form::Text || !printed())
}
