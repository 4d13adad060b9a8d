//! Markdown, for model cards and issues.

use std::fmt::Write as _;

use super::rows::{heads, rows, title};
use mlx_quant::Evaluation;

/// The evaluation as a heading, a table and a line that says how it was measured.
pub fn markdown(evaluation: &Evaluation) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let escaped = |cell: String| cell.replace('|', "\\|");
    let heads = heads(evaluation);
    let mut text = format!("## {}\n\n", title(evaluation));
    text.push_str(&line(heads.iter().map(|&head| head.to_owned()).collect()));
    text.push_str(&line(heads.iter().map(|_| "---".to_owned()).collect()));
    for row in rows(evaluation) {
        text.push_str(&line(row.into_iter().map(escaped).collect()));
    }
    let hash = evaluation.data_hash.get(..16).unwrap_or(&evaluation.data_hash);
    let _ = write!(
        text,
        "\nNon-overlapping windows of {} tokens; standard errors over windows; data {hash}; mlx-quant {}, {}.\n",
        evaluation.sequence_length,
        env!("CARGO_PKG_VERSION"),
        evaluation.subject.kernels,
    );
    text
}
