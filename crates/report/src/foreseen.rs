//! What methods would need, before anything is done.

use mlx_quant::forecast::{Choice, Forecast, Machine, Recommendation};

use crate::table::{Column, Table, wrap};
use crate::{bytes, duration, rate};

/// What each method of a comparison would need, with its name, and all of them together.
pub fn foreseen<'f>(needs: impl IntoIterator<Item = (&'f str, &'f Forecast)>, width: usize) -> String {
    let columns = [
        Column::words("method"),
        Column::figures("bits/weight").leaving(1),
        Column::figures("size").leaving(2),
        Column::figures("time"),
        Column::figures("peak memory"),
    ];
    let needs: Vec<(&str, &Forecast)> = needs.into_iter().collect();
    let cards = needs.iter().any(|(_, needs)| needs.card_memory.is_some());
    let columns = columns.into_iter().chain(cards.then_some(Column::figures("on the card")));
    let columns: Vec<Column> = columns.collect();
    let mut seconds = 0.0;
    let row = |(name, needs): (&str, &Forecast)| {
        seconds += needs.seconds;
        let mut cells = vec![
            name.to_owned(),
            format!("{:.3}", needs.bits_per_weight),
            bytes(needs.bytes),
            duration(needs.seconds),
            bytes(needs.peak_memory),
        ];
        let card = needs.card_memory.map_or_else(|| "-".to_owned(), |card| bytes(card.peak));
        cells.extend(cards.then_some(card));
        cells
    };
    let table = Table::new(columns, needs.into_iter().map(row).collect::<Vec<_>>()).fit(width);
    let together = format!("together at most {}; work that methods share is done once", duration(seconds));
    format!("{table}\n{}", wrap(&together, width, ""))
}

/// A KL that is expected: the range between the models that were measured.
fn expected(choice: &Choice) -> String {
    let digits = |kl: f64| match kl {
        _ if kl >= 10.0 => format!("{kl:.0}"),
        _ if kl >= 1.0 => format!("{kl:.1}"),
        _ if kl >= 0.1 => format!("{kl:.2}"),
        _ => format!("{kl:.3}"),
    };
    match choice.expected_kl {
        Some(kl) if kl.high < 0.01 => "<0.01".to_owned(),
        Some(kl) if digits(kl.low) == digits(kl.high) => format!("~{}", digits(kl.low)),
        Some(kl) => format!("~{}-{}", digits(kl.low), digits(kl.high)),
        None => "?".to_owned(),
    }
}

/// Size, time and memory of a choice, as far as they are known.
fn needs(choice: &Choice) -> [String; 3] {
    let cell = |of: &dyn Fn(&Forecast) -> String| choice.forecast.as_ref().map_or_else(|| "-".to_owned(), of);
    [
        cell(&|needs| bytes(needs.bytes)),
        cell(&|needs| duration(needs.seconds)),
        cell(&|needs| bytes(needs.peak_memory)),
    ]
}

/// What to do now, within an hour and overnight; a star at the advice.
pub fn advice(made: &Recommendation, width: usize) -> String {
    let columns = [
        Column::words("when"),
        Column::words("method"),
        Column::figures("expected KL"),
        Column::figures("size").leaving(1),
        Column::figures("time"),
        Column::figures("memory").leaving(2),
    ];
    let rows = made.rows.iter().enumerate().map(|(at, row)| {
        let when = format!("{}{}", row.when, if made.pick == Some(at) { " *" } else { "" });
        let Some(choice) = &row.choice else {
            let nothing = ["nothing", "", "", "", ""].map(str::to_owned);
            return std::iter::once(when).chain(nothing).collect();
        };
        let mut cells = vec![when, choice.method.clone(), expected(choice)];
        cells.extend(needs(choice));
        cells
    });
    Table::new(columns, rows).fit(width)
}

/// Every method with what it needs, and what mlx-lm's needs where it has one.
pub fn methods(made: &Recommendation, width: usize) -> String {
    let peers = made.choices.iter().any(|choice| choice.mlx_lm.is_some());
    let mut columns = vec![
        Column::words("every method"),
        Column::figures("expected KL"),
        Column::figures("size").leaving(1),
        Column::figures("time"),
        Column::figures("memory"),
    ];
    let card = |choice: &Choice| choice.forecast.as_ref()?.card_memory;
    let cards = made.choices.iter().any(|choice| card(choice).is_some());
    columns.extend(cards.then_some(Column::figures("on the card")));
    columns.extend(peers.then_some(Column::figures("mlx-lm's memory").leaving(2)));
    let rows = made.choices.iter().map(|choice| {
        let mut cells = vec![choice.method.clone(), expected(choice)];
        cells.extend(needs(choice));
        let held = card(choice).map_or_else(|| "-".to_owned(), |card| bytes(card.peak));
        cells.extend(cards.then_some(held));
        let peer = choice.mlx_lm.as_ref().map(|peer| peer.memory.map_or_else(|| "cannot".to_owned(), bytes));
        cells.extend(peers.then(|| peer.unwrap_or_default()));
        cells
    });
    Table::new(columns, rows).fit(width)
}

/// What a machine does in a second, and how much memory may be used of how much.
pub fn machine(machine: &Machine, may_use: u64, total: Option<u64>, width: usize) -> String {
    let card = machine.card.map_or_else(String::new, |card| format!("card {}, ", rate(card.products)));
    let text = format!(
        "this machine: {} threads, {}, {card}disk {}/s read, {}/s written, {} of memory may be used{}",
        machine.threads,
        rate(machine.products),
        bytes(machine.read as u64),
        bytes(machine.write as u64),
        bytes(may_use),
        total.map_or_else(String::new, |total| format!(" of {}", bytes(total))),
    );
    wrap(&text, width, "  ")
}
