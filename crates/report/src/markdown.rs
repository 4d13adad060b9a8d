//! Markdown, for model cards and issues.

use std::fmt::Write as _;

use super::rows::{columns, difference, rows, title};
use super::table::Table;
use mlx_quant::Evaluation;

/// The evaluation as a heading, a table and a line that says how it was measured.
pub fn markdown(evaluation: &Evaluation) -> String {
    let mut text = format!("## {}\n\n", title(evaluation));
    text.push_str(&Table::new(columns(evaluation), rows(evaluation)).markdown());
    if let Some(difference) = difference(&evaluation.total) {
        let _ = write!(text, "\nThe {difference}.\n");
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
