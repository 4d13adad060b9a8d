//! What methods would need, before anything is done.

use mlx_quant::forecast::{Forecast, Machine, Recommendation};

use crate::table::{Column, Table, wrap};
use crate::{bytes, duration};

/// What each method of a comparison would need, with its name, and all of them together.
pub fn foreseen<'f>(needs: impl IntoIterator<Item = (&'f str, &'f Forecast)>, width: usize) -> String {
    let columns = [
        Column::words("method"),
        Column::figures("bits/weight").leaving(1),
        Column::figures("size").leaving(2),
        Column::figures("time"),
        Column::figures("peak memory"),
    ];
    let mut seconds = 0.0;
    let row = |(name, needs): (&str, &Forecast)| {
        seconds += needs.seconds;
        vec![
            name.to_owned(),
            format!("{:.3}", needs.bits_per_weight),
            bytes(needs.bytes),
            duration(needs.seconds),
            bytes(needs.peak_memory),
        ]
    };
    let table = Table::new(columns, needs.into_iter().map(row).collect::<Vec<_>>()).fit(width);
    let together = format!("together at most {}; work that methods share is done once", duration(seconds));
    format!("{table}\n{}", wrap(&together, width, ""))
}

/// Every method that could be taken with what it needs, a star at the one to take, and why others are not possible.
pub fn recommendation(made: &Recommendation, width: usize) -> String {
    let columns = [
        Column::words("method"),
        Column::words("guide").leaving(1),
        Column::figures("bits/weight").leaving(3),
        Column::figures("size").leaving(4),
        Column::figures("time"),
        Column::figures("memory"),
        Column::figures("mlx-lm's memory").leaving(2),
    ];
    let rows = made.choices.iter().enumerate().map(|(at, choice)| {
        let needs = choice.forecast.as_ref();
        let cell = |of: &dyn Fn(&Forecast) -> String| needs.map_or_else(|| "-".to_owned(), of);
        let theirs = choice.mlx_lm.as_ref().map(|peer| peer.memory.map_or_else(|| "no".to_owned(), bytes));
        vec![
            format!("{}{}", choice.method, if made.pick == Some(at) { " *" } else { "" }),
            choice.when.to_owned(),
            cell(&|needs| format!("{:.3}", needs.bits_per_weight)),
            cell(&|needs| bytes(needs.bytes)),
            cell(&|needs| duration(needs.seconds)),
            cell(&|needs| bytes(needs.peak_memory)),
            theirs.unwrap_or_default(),
        ]
    });
    let mut text = Table::new(columns, rows).fit(width);
    for choice in &made.choices {
        if let Some(obstacle) = &choice.obstacle {
            text.push('\n');
            text.push_str(&wrap(&format!("{}: {obstacle}", choice.method), width, "  "));
        }
    }
    text
}

/// What a machine does in a second, and how much memory may be used of how much.
pub fn machine(machine: &Machine, may_use: u64, total: Option<u64>, width: usize) -> String {
    let text = format!(
        "this machine: {} threads, {:.0} GFLOP/s, disk {}/s read, {}/s written, {} of memory may be used{}",
        machine.threads,
        machine.products / 1e9,
        bytes(machine.read as u64),
        bytes(machine.write as u64),
        bytes(may_use),
        total.map_or_else(String::new, |total| format!(" of {}", bytes(total))),
    );
    wrap(&text, width, "  ")
}
