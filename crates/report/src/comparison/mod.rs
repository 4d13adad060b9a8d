//! A comparison for people: a table for terminals, Markdown, and one page that needs nothing else.

mod layers;
mod page;
mod plots;
mod rows;

use std::fmt::Write as _;

use mlx_quant::compare::Comparison;

pub use self::page::comparison_html;
pub use self::plots::size_plot;
use self::rows::{HEADS, facts, quality_order, rows, speed_order};
use crate::plain_table;

/// The table, best quality first, with both orders below it.
pub fn comparison_table(comparison: &Comparison) -> String {
    let rows = rows(comparison).into_iter().map(Vec::from).collect();
    format!(
        "{}\n{}\n\nquality  {}\nspeed    {}\n{}",
        facts(comparison),
        plain_table(&HEADS, rows, 1),
        quality_order(comparison),
        speed_order(comparison),
        comparison.rankings.guide
    )
    .trim_end()
    .to_owned()
}

/// The same for model cards and issues.
pub fn comparison_markdown(comparison: &Comparison) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = format!("## {}\n\n", facts(comparison));
    text.push_str(&line(&HEADS.map(str::to_owned)));
    text.push_str(&line(&HEADS.map(|head| if head == HEADS[0] { "---" } else { "---:" }.to_owned())));
    for row in rows(comparison) {
        text.push_str(&line(&row.map(|cell| cell.replace('|', "\\|"))));
    }
    let _ = write!(text, "\nQuality: {}. Speed: {}.", quality_order(comparison), speed_order(comparison));
    if !comparison.rankings.guide.is_empty() {
        let _ = write!(text, " {}", comparison.rankings.guide);
    }
    let (calibration, held_out) = (&comparison.calibration, &comparison.held_out);
    let short = |hash: &str| hash.get(..16).unwrap_or(hash).to_owned();
    let _ = writeln!(
        text,
        "\n\nKL(original || quantized) in nats a token over {} windows of {} tokens that no method has seen (data {}); standard errors over \
         windows. Calibration: {} windows of {} tokens (data {}). mlx-quant {}, {}.",
        held_out.windows,
        held_out.sequence_length,
        short(&held_out.data_hash),
        calibration.windows,
        calibration.sequence_length,
        short(&calibration.data_hash),
        comparison.version,
        comparison.kernels,
    );
    text
}
