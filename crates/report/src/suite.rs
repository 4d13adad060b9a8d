//! Answers to multiple-choice questions.

use std::fmt::Write as _;

use mlx_quant::evaluate::suite::{Accuracy, SuiteEvaluation};

use crate::numbers::with_error;
use crate::table::{Column, Table, wrap};

fn columns() -> Vec<Column> {
    vec![
        Column::words("model"),
        Column::figures("acc"),
        Column::figures("acc_norm").leaving(2),
        Column::figures("acc_bytes").leaving(1),
    ]
}

fn percent(share: f64, error: Option<f64>) -> String {
    format!("{} %", with_error(share * 100.0, error.map(|error| error * 100.0), 1))
}

fn rows(suite: &SuiteEvaluation) -> Vec<Vec<String>> {
    let row = |name: &str, accuracy: &Accuracy| {
        vec![
            name.to_owned(),
            percent(accuracy.acc, accuracy.acc_stderr),
            percent(accuracy.acc_norm, accuracy.acc_norm_stderr),
            percent(accuracy.acc_bytes, accuracy.acc_bytes_stderr),
        ]
    };
    let reference = suite.beside.as_ref().map(|beside| row("reference", &beside.reference));
    [row("model", &suite.model)].into_iter().chain(reference).collect()
}

fn title(suite: &SuiteEvaluation) -> String {
    format!("{}: {} questions, {} answers", suite.name, suite.questions, suite.choices)
}

/// What the model's answers are beside the reference's, in a sentence; nothing without a reference.
fn beside(suite: &SuiteEvaluation) -> Option<String> {
    let beside = suite.beside.as_ref()?;
    let points = |share: f64, error: Option<f64>| {
        let sign = if share >= 0.0 { "+" } else { "" };
        format!("{sign}{}", with_error(share * 100.0, error.map(|error| error * 100.0), 1))
    };
    Some(format!(
        "model and reference choose the same answer to {} of the questions (acc_norm: {}); accuracy {} points, acc_norm {} (paired over questions)",
        percent(beside.agreement, beside.agreement_stderr),
        percent(beside.agreement_norm, beside.agreement_norm_stderr),
        points(beside.acc_difference, beside.acc_difference_stderr),
        points(beside.acc_norm_difference, beside.acc_norm_difference_stderr),
    ))
}

/// The answers for terminals: a row for the model and one for its reference.
pub fn suite_table(suite: &SuiteEvaluation, width: usize) -> String {
    let table = Table::new(columns(), rows(suite)).fit(width);
    let mut text = format!("{}\n{table}", wrap(&title(suite), width, "  "));
    if let Some(beside) = beside(suite) {
        text.push('\n');
        text.push_str(&wrap(&beside, width, "  "));
    }
    text
}

/// The answers as Markdown, to follow [`markdown`](crate::markdown()).
pub fn suite_markdown(suite: &SuiteEvaluation) -> String {
    let mut text = format!("\n### {}\n\n", title(suite));
    text.push_str(&Table::new(columns(), rows(suite)).markdown());
    if let Some(beside) = beside(suite) {
        let _ = write!(text, "\nOf both: {beside}.\n");
    }
    let hash = suite.sha256.get(..16).unwrap_or(&suite.sha256);
    let _ = write!(
        text,
        "\nScored as lm-evaluation-harness scores: log-likelihood of each answer behind its question (acc), divided by its characters (acc_norm) or bytes (acc_bytes); standard errors over questions; file {hash}.\n"
    );
    text
}
