//! An evaluation for terminals.

use mlx_quant::Evaluation;

use crate::rows::{columns, difference, rows, title};
use crate::table::{Table, wrap};

/// The evaluation with a row for all data and, where it is several, one for each file; against a reference also what
/// the model loses of its perplexity.
pub fn table(evaluation: &Evaluation, width: usize) -> String {
    let table = Table::new(columns(evaluation), rows(evaluation)).fit(width);
    let mut text = format!("{}\n{table}", wrap(&title(evaluation), width, "  "));
    if let Some(difference) = difference(&evaluation.total) {
        text.push('\n');
        text.push_str(&wrap(&difference, width, "  "));
    }
    text
}
