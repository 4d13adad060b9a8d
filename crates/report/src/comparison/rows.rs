//! What tables of a comparison show.

use mlx_quant::compare::{Comparison, Entry};

use crate::{bytes, duration, weights, with_error};

/// Heads of the columns.
pub(super) const HEADS: [&str; 11] = [
    "method",
    "quality",
    "KL, nats/token",
    "p99",
    "top-1",
    "perplexity",
    "bits/weight",
    "size",
    "speed",
    "time",
    "memory",
];

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

/// Entries as they stand in tables: best quality first.
pub(super) fn in_order(comparison: &Comparison) -> impl Iterator<Item = (usize, &Entry)> {
    comparison.rankings.quality.iter().map(|ranked| (ranked.entry, &comparison.entries[ranked.entry]))
}

/// Cells of all rows.
pub(super) fn rows(comparison: &Comparison) -> Vec<[String; 11]> {
    let row = |(index, entry): (usize, &Entry)| {
        let (total, against) = (&entry.evaluation.total, entry.against());
        let percent = |share: f64| share * 100.0;
        let time = duration(entry.seconds);
        [
            entry.name.clone(),
            comparison.rankings.quality_of(index).to_string(),
            with_error(against.kl_mean, against.kl_stderr, 4),
            format!("{:.3}", against.kl_p99),
            format!("{} %", with_error(percent(against.top1), against.top1_stderr.map(percent), 2)),
            format!("{:.3}", total.perplexity),
            format!("{:.3}", entry.bits_per_weight),
            bytes(entry.bytes),
            comparison.rankings.speed_of(index).to_string(),
            if entry.resumed { format!("{time} (resumed)") } else { time },
            entry.peak_memory.map_or_else(|| "?".to_owned(), bytes),
        ]
    };
    in_order(comparison).map(row).collect()
}

/// `a > b ≈ c`: `≈` where the difference is within two standard errors.
pub(super) fn quality_order(comparison: &Comparison) -> String {
    let mut text = String::new();
    for ranked in &comparison.rankings.quality {
        if ranked.rank > 1 {
            text.push_str(if ranked.apart { " > " } else { " ≈ " });
        }
        text.push_str(&comparison.entries[ranked.entry].name);
    }
    text
}

/// `a > b`, fastest first.
pub(super) fn speed_order(comparison: &Comparison) -> String {
    let names = comparison.rankings.speed.iter().map(|index| comparison.entries[*index].name.as_str());
    names.collect::<Vec<_>>().join(" > ")
}
