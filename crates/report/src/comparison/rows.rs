//! What tables of a comparison show, and the words around them.

use std::fmt::Write as _;

use mlx_quant::compare::{Comparison, Entry, Verdict};
use mlx_quant::evaluate::reading;

use super::style::method;
use crate::table::{Column, Table};
use crate::{bytes, duration, weights, with_error};

/// Columns with the order in which they leave, and whether a phone shows them.
const COLUMNS: [(Column, bool); 11] = [
    (Column::words("method"), true),
    (Column::figures("bits"), false),
    (Column::figures("rank").leaving(7), false),
    (Column::figures("KL, nats/token"), true),
    (Column::figures("p99").leaving(2), false),
    (Column::figures("top-1").leaving(4), false),
    (Column::figures("perplexity").leaving(3), false),
    (Column::figures("bits/weight").leaving(5), false),
    (Column::figures("size").leaving(6), true),
    (Column::figures("time"), true),
    (Column::figures("memory").leaving(1), false),
];
/// The column that only several widths need.
const WIDTH: usize = 1;

/// Widths, the narrowest first.
pub(super) fn widths(comparison: &Comparison) -> Vec<u32> {
    comparison.rankings.verdicts.iter().map(|verdict| verdict.bits).collect()
}

/// What was compared, in a line.
pub(super) fn facts(comparison: &Comparison) -> String {
    format!(
        "{} ({}, {}, {}, perplexity {:.3})",
        comparison.model,
        comparison.model_type,
        weights(comparison.parameters),
        bytes(comparison.model_bytes),
        comparison.reference_perplexity
    )
}

/// Entries as they stand in tables: by width, and within a width best quality first.
pub(super) fn in_order(comparison: &Comparison) -> impl Iterator<Item = (usize, &Entry)> {
    comparison.rankings.quality.iter().map(|ranked| (ranked.entry, &comparison.entries[ranked.entry]))
}

/// Columns of this comparison, each with whether a phone shows it.
pub(super) fn columns(comparison: &Comparison) -> Vec<(Column, bool)> {
    let several = widths(comparison).len() > 1;
    let shown = |(at, column): (usize, (Column, bool))| {
        // On a phone a width takes the place of the time.
        let phone = column.1 || (several && at == WIDTH);
        (at != WIDTH || several).then_some((column.0, phone && !(several && column.0.head == "time")))
    };
    COLUMNS.into_iter().enumerate().filter_map(shown).collect()
}

/// Cells of all rows.
pub(super) fn rows(comparison: &Comparison) -> Vec<Vec<String>> {
    let several = widths(comparison).len() > 1;
    let row = |(index, entry): (usize, &Entry)| {
        let (total, against) = (&entry.evaluation.total, entry.against());
        let percent = |share: f64| share * 100.0;
        let time = duration(entry.seconds);
        let mut cells = vec![method(&entry.recipe).to_owned()];
        cells.extend(several.then(|| entry.bits.to_string()));
        cells.extend([
            comparison.rankings.quality_of(index).to_string(),
            with_error(against.kl_mean, against.kl_stderr, 4),
            format!("{:.3}", against.kl_p99),
            format!("{} %", with_error(percent(against.top1), against.top1_stderr.map(percent), 2)),
            format!("{:.3}", total.perplexity),
            format!("{:.3}", entry.bits_per_weight),
            bytes(entry.bytes),
            // Of what was interrupted only the last part was timed.
            if entry.resumed { format!("over {time}") } else { time },
            entry.peak_memory.map_or_else(|| "?".to_owned(), bytes),
        ]);
        cells
    };
    in_order(comparison).map(row).collect()
}

/// All of it.
pub(super) fn table(comparison: &Comparison) -> Table {
    let columns: Vec<Column> = columns(comparison).into_iter().map(|(column, _)| column).collect();
    Table::new(columns, rows(comparison))
}

/// `Take gptq: KL 0.0546 (noticeable in hard tasks), 42 % below basic at the same size, 8.27 s; next awq: ...`.
pub(super) fn verdict(comparison: &Comparison, verdict: &Verdict) -> String {
    let entry = |at: usize| &comparison.entries[at];
    let name = |at: usize| method(&entry(at).recipe);
    let taken = entry(verdict.take);
    let mut text = match widths(comparison).len() {
        0 | 1 => format!("Take {}", name(verdict.take)),
        _ => format!("At {} bits take {}", verdict.bits, name(verdict.take)),
    };
    let _ = write!(text, ": KL {:.4} ({})", taken.kl(), reading(taken.kl()).words);
    if let Some(share) = verdict.below_basic {
        let side = if share < 0.0 { "above" } else { "below" };
        let _ = write!(text, ", {:.0} % {side} basic at the same size", share.abs() * 100.0);
    }
    let _ = write!(text, ", {}", duration(taken.seconds));
    if let Some(next) = verdict.next {
        let (kl, time) = (entry(next).kl(), duration(entry(next).seconds));
        let equal = if verdict.next_is_equal { ", equal within error" } else { "" };
        let _ = write!(text, "; next {}: KL {kl:.4}{equal}, {time}", name(next));
    }
    if let Some(faster) = verdict.faster {
        let _ = write!(
            text,
            "; fastest of those that are equal within error: {}, {}",
            name(faster),
            duration(entry(faster).seconds)
        );
    }
    text
}

/// `a > b ≈ c`: `≈` where two are equal within two standard errors of their difference.
pub(super) fn quality_order(comparison: &Comparison, bits: u32) -> String {
    let mut text = String::new();
    let mut before = None;
    for ranked in comparison.rankings.quality.iter().filter(|ranked| ranked.bits == bits) {
        if let Some(before) = before {
            text.push_str(if ranked.rank == before { " ≈ " } else { " > " });
        }
        text.push_str(method(&comparison.entries[ranked.entry].recipe));
        before = Some(ranked.rank);
    }
    text
}

/// `quality`, or `quality, 3 bits` where there are several widths, each with its order.
pub(super) fn quality_orders(comparison: &Comparison) -> Vec<(String, String)> {
    let widths = widths(comparison);
    let named = |bits: u32| match widths.len() {
        1 => "quality".to_owned(),
        _ => format!("quality, {bits} bits"),
    };
    widths.iter().map(|bits| (named(*bits), quality_order(comparison, *bits))).collect()
}

/// Processor, threads and engine that times belong to; of several the methods that were made there.
pub(super) fn made_on(comparison: &Comparison) -> Vec<String> {
    let mut places: Vec<(&mlx_quant::compare::MadeOn, Vec<&str>)> = Vec::new();
    for entry in &comparison.entries {
        match places.iter_mut().find(|(place, _)| **place == entry.made_on) {
            Some((_, names)) => names.push(&entry.name),
            None => places.push((&entry.made_on, vec![&entry.name])),
        }
    }
    let several = places.len() > 1;
    let line = |(place, names): (&mlx_quant::compare::MadeOn, Vec<&str>)| {
        let processor = place.processor.as_deref().unwrap_or("a processor that the system does not name");
        let threads = if place.threads == 1 { "thread" } else { "threads" };
        let of = if several { format!(" ({})", names.join("; ")) } else { String::new() };
        format!("{processor}, {} {threads}, engine {}{of}", place.threads, place.engine)
    };
    places.into_iter().map(line).collect()
}
