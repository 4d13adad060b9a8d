//! What checks of a model find.

use std::fmt;

use serde::Serialize;

/// Something that is wrong with a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Whether mlx_lm stops at it.
    pub fatal: bool,
    /// The tensor, layer, file or key.
    pub subject: String,
    /// What is wrong, and what comes of it.
    pub message: String,
}

/// What the checks have found so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) problems: Vec<Problem>,
    pub(super) notes: Vec<String>,
}

impl Findings {
    /// Something that mlx_lm stops at.
    pub(super) fn fatal(&mut self, subject: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem { fatal: true, subject: subject.into(), message: message.into() });
    }

    /// Something that mlx_lm does not notice.
    pub(super) fn warning(&mut self, subject: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem { fatal: false, subject: subject.into(), message: message.into() });
    }
}

/// An error without its hint.
pub(super) fn what(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    text.split_once("; hint: ").map_or(text.clone(), |(what, _)| what.to_owned())
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.message)
    }
}
