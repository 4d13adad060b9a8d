//! A table for terminals.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use mlx_quant::Evaluation;

use super::rows::{heads, rows, title};

/// A table without lines; columns from `right` on are aligned to the right.
pub fn plain_table(heads: &[&str], rows: Vec<Vec<String>>, right: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heads);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(right) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// The evaluation with a row for all data and, where it is several, one for each file.
pub fn table(evaluation: &Evaluation) -> String {
    format!("{}\n{}", title(evaluation), plain_table(&heads(evaluation), rows(evaluation), 1))
}
