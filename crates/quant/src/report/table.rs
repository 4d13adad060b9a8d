//! A table for terminals.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::rows::{heads, rows, title};
use crate::Evaluation;

/// The evaluation with a row for all data and, where it is several, one for each file.
pub fn table(evaluation: &Evaluation) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heads(evaluation));
    table.add_rows(rows(evaluation));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{}\n{}", title(evaluation), table.trim_fmt())
}
