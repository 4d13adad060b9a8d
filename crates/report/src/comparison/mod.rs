//! A comparison for people: a table for terminals, Markdown, and one page that needs nothing else. Each opens with what
//! to take, where it lies and how to run it.

mod canvas;
mod layers;
mod page;
mod plots;
mod rows;
mod style;

use std::fmt::Write as _;

use mlx_quant::compare::{Comparison, Verdict};

pub use self::page::comparison_html;
pub use self::plots::comparison_svg;
use self::rows::{made_on, quality_orders, table, verdict};
use crate::table::{facts, wrap};

/// Command lines for the entries of a comparison, in their order. Either list may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Makes the entry again.
    pub make: Vec<String>,
    /// Runs its model; `None` where the model was not kept.
    pub run: Vec<Option<String>>,
}

impl Commands {
    /// Where the model of a verdict lies and how it is run, or how it is made.
    fn after(&self, comparison: &Comparison, verdict: &Verdict) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        match &comparison.entries[verdict.take].model {
            Some(model) => lines.push(("model", model.clone())),
            None => lines.push(("model", "not kept".to_owned())),
        }
        if let Some(run) = self.run.get(verdict.take).cloned().flatten() {
            lines.push(("run", run));
        } else if let Some(make) = self.make.get(verdict.take) {
            lines.push(("make", make.clone()));
        }
        lines
    }
}

/// The verdict, then the table, best quality first, with the order below it.
pub fn comparison_table(comparison: &Comparison, commands: &Commands, width: usize) -> String {
    let mut text = String::new();
    for one in &comparison.rankings.verdicts {
        let _ = writeln!(text, "{}", wrap(&verdict(comparison, one), width, "  "));
        for (name, value) in commands.after(comparison, one) {
            // Whole, so that it can be copied.
            let _ = writeln!(text, "{name:<8} {value}");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "{}", wrap(&rows::facts(comparison), width, "  "));
    let _ = writeln!(text, "{}\n", table(comparison).fit(width));
    let mut lines: Vec<(String, String)> = quality_orders(comparison);
    lines.extend(made_on(comparison).into_iter().map(|place| ("times on".to_owned(), place)));
    let lines: Vec<(&str, String)> =
        lines.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    let _ = writeln!(text, "{}", facts(&lines, width));
    let _ = writeln!(text, "{}", wrap(LEGEND, width, ""));
    if !comparison.rankings.guide.is_empty() {
        let _ = writeln!(text, "\n{}", wrap(&comparison.rankings.guide, width, ""));
    }
    text.trim_end().to_owned()
}

/// What the signs mean.
const LEGEND: &str =
    "> better by more than two standard errors, window by window; ≈ within them, and of equal rank";

/// The same for model cards and issues.
pub fn comparison_markdown(comparison: &Comparison, commands: &Commands) -> String {
    let mut text = format!("## {}\n\n", rows::facts(comparison));
    for one in &comparison.rankings.verdicts {
        let _ = writeln!(text, "**{}.**\n", verdict(comparison, one));
        let lines = commands.after(comparison, one);
        for (name, value) in &lines {
            let _ = writeln!(text, "- {name}: `{value}`");
        }
        text.push('\n');
    }
    text.push_str(&table(comparison).markdown());
    text.push('\n');
    for (name, order) in quality_orders(comparison) {
        let name = name.replacen('q', "Q", 1);
        let _ = writeln!(text, "{name}: {order}.");
    }
    let (calibration, held_out) = (&comparison.calibration, &comparison.held_out);
    let short = |hash: &str| hash.get(..16).unwrap_or(hash).to_owned();
    let _ = writeln!(
        text,
        "\n{LEGEND}. Times on {}.\n\nKL(original || quantized) in nats a token over {} windows of {} tokens that no method has seen (data {}); \
         standard errors over windows. Calibration: {} windows of {} tokens (data {}). mlx-quant {}, {}.",
        made_on(comparison).join("; "),
        held_out.windows,
        held_out.sequence_length,
        short(&held_out.data_hash),
        calibration.windows,
        calibration.sequence_length,
        short(&calibration.data_hash),
        comparison.version,
        comparison.kernels,
    );
    if !comparison.rankings.guide.is_empty() {
        let _ = writeln!(text, "\n{}", comparison.rankings.guide);
    }
    text
}
