//! Chat templates: Jinja programs that come with a model and turn messages into its text.
//!
//! They are other people's programs, so they get a budget of steps and memory ([`FUEL`]) and of time ([`DEADLINE`]),
//! see no file, no clock and no environment, and can do nothing but return text. What they find is what transformers
//! gives them: `trim_blocks` and `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a `tojson` without
//! HTML escapes, Python's string and dictionary methods, `{% generation %}`.
//!
//! `strftime_now` tells [`TODAY`] whatever the day: data must give the same tokens on every day.

mod content;
mod environment;
mod to_json;
mod worker;

use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use minijinja::value::{Serde, Value as Item};
use minijinja::{ErrorKind, context};
use serde_json::{Map, Value};

use self::content::Forms;
use self::worker::Worker;
use crate::TokenizerError;

/// The budget of one rendering, beside [`MESSAGE_FUEL`] for each message and 4 for each of their bytes. About one is
/// used by a step of the template and one by 64 bytes of text made; real templates need hundreds a message.
const FUEL: u64 = 500_000;

/// See [`FUEL`].
const MESSAGE_FUEL: u64 = 2_000;

/// The time of one rendering, thousands of times what one takes. Not everything costs fuel: a list that holds
/// itself twice, sixty times over, is small to build and endless to print or compare.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the engine says of a macro that calls itself without end.
const TOO_DEEP: &str = "recursion limit exceeded";

/// A chat template with the special tokens it may name.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    file: String,
    source: Arc<str>,
    special: Map<String, Value>,
    deadline: Duration,
    /// Threads that have it compiled and wait; as many as ever rendered at once.
    idle: Mutex<Vec<Worker>>,
    /// Which contents it takes; why it cannot be tried, if it does not come to an end.
    forms: OnceLock<Result<Forms, String>>,
}

impl ChatTemplate {
    /// `file` is for messages.
    pub(crate) fn new(file: String, source: &str, special: Map<String, Value>) -> Self {
        Self {
            file,
            source: environment::without_generation(source).into(),
            special,
            deadline: DEADLINE,
            idle: Mutex::default(),
            forms: OnceLock::new(),
        }
    }

    /// As [`ChatTemplate::render`], with contents in the form that the template takes.
    pub(crate) fn render_adapted(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
    ) -> Result<String, TokenizerError> {
        let forms = self.forms.get_or_init(|| {
            Forms::find(|messages| match self.render(messages, None, false) {
                Ok(text) => Ok(Some(text)),
                Err(TokenizerError::Runaway { reason, .. }) => Err(reason),
                Err(_) => Ok(None),
            })
        });
        match forms {
            Ok(forms) => self.render(&forms.adapt(messages), tools, false),
            Err(reason) => Err(TokenizerError::Runaway { file: self.file.clone(), reason: reason.clone() }),
        }
    }

    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let bytes = messages.iter().chain(tools).map(size_of_value).sum::<u64>();
        let fuel = FUEL + MESSAGE_FUEL * messages.len() as u64 + 4 * bytes;
        let context = context! {
            messages => Serde(messages),
            tools => tools.map(Serde),
            documents => (),
            add_generation_prompt,
            ..Item::from(Serde(&self.special))
        };
        let file = || self.file.clone();
        let worker = match self.idle().pop() {
            Some(worker) => worker,
            None => Worker::start(Arc::clone(&self.source))
                .map_err(|error| TokenizerError::Thread { file: file(), reason: error.to_string() })?,
        };
        // One that exceeded the deadline is left behind.
        let answer = match worker.render(context, fuel, self.deadline) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                let reason = format!("stopped after {} seconds", self.deadline.as_secs_f32());
                return Err(TokenizerError::Runaway { file: file(), reason });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(TokenizerError::Thread { file: file(), reason: "its thread ended".to_owned() });
            }
        };
        self.idle().push(worker);
        answer.map_err(|error| {
            let (file, reason) = (file(), error.to_string());
            match error.kind() {
                _ if error.detail() == Some(TOO_DEEP) => TokenizerError::Runaway { file, reason },
                ErrorKind::OutOfFuel => TokenizerError::Runaway { file, reason },
                ErrorKind::SyntaxError => TokenizerError::Syntax { file, reason },
                _ => TokenizerError::Template { file, reason },
            }
        })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Worker>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size_of_value(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(size_of_value).sum::<u64>() + 1,
        Value::Object(map) => {
            map.iter().map(|(key, it)| key.len() as u64 + size_of_value(it)).sum::<u64>() + 1
        }
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_costs_no_fuel_ends_by_the_clock() {
        for template in [
            "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s ~ '' }}",
            "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        ] {
            let mut chat = ChatTemplate::new("file".to_owned(), template, Map::new());
            chat.deadline = Duration::from_millis(200);
            let error = chat.render(&[], None, false).expect_err(template);
            assert!(matches!(error, TokenizerError::Runaway { .. }), "{template}: {error}");
        }
    }
}
