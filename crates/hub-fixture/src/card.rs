//! What the hub thinks of model cards, which a test decides.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::call::object;

/// What is wrong with a card. Without errors it is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why it is refused.
    pub errors: Vec<String>,
    /// What could be better.
    pub warnings: Vec<String>,
}

type Rule = Box<dyn Fn(&str) -> Verdict + Send>;

/// The rule by which cards are judged; without one all are taken.
#[derive(Default)]
pub(crate) struct Rules(Mutex<Option<Rule>>);

impl Rules {
    pub(crate) fn set(&self, rule: impl Fn(&str) -> Verdict + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(rule));
    }

    pub(crate) fn judge(&self, card: &str) -> Verdict {
        let rule = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rule.as_ref().map_or_else(Verdict::default, |rule| rule(card))
    }
}

/// The answer to a client that asks before it commits.
pub(crate) fn validate(rules: &Rules, body: &Bytes) -> Result<Answer, Answer> {
    let body = object(body)?;
    let (Some("model" | "dataset" | "space"), Some(card)) =
        (body["repoType"].as_str(), body["content"].as_str())
    else {
        return Err(Answer::error(400, "", "\"repoType\" and \"content\" are required"));
    };
    let verdict = rules.judge(card);
    let list = |messages: &[String]| -> Vec<Value> {
        messages.iter().map(|message| json!({ "message": message })).collect()
    };
    let mut answer =
        Answer::json(&json!({ "errors": list(&verdict.errors), "warnings": list(&verdict.warnings) }));
    if !verdict.errors.is_empty() {
        answer.status = Answer::new(400).status;
    }
    Ok(answer)
}

/// Refuses a commit with a card that is refused.
pub(crate) fn check(rules: &Rules, path: &str, content: &[u8]) -> Result<(), Answer> {
    if path != "README.md" {
        return Ok(());
    }
    match rules.judge(&String::from_utf8_lossy(content)).errors.first() {
        Some(error) => Err(Answer::error(400, "", &format!("Invalid metadata in README.md. {error}"))),
        None => Ok(()),
    }
}
