//! What can compute on a machine.

use mlx_quant::device::Engines;

use crate::table::{Column, Table, wrap};
use crate::{bytes, rate};

/// One engine, as a row.
#[derive(Clone, Debug)]
pub struct EngineRow {
    /// The word for it: `cpu`, `gpu:0`.
    pub device: String,
    /// Name, with instruction set and threads of a processor.
    pub name: String,
    /// `processor`, or the kind of adapter.
    pub kind: String,
    /// Backend and driver.
    pub driver: String,
    /// Bytes of memory, where that is known.
    pub memory: Option<u64>,
    /// Bytes of the largest tensor, and of what a kernel sees of it at once.
    pub largest: Option<(u64, u64)>,
    /// Operations a second in float32 products, or why nothing can be computed there.
    pub products: Result<f64, String>,
}

/// The engines of a machine, a star at what `auto` takes; below them why that is no card, and which cannot be used.
pub fn engines(all: &Engines, rows: &[EngineRow], width: usize) -> String {
    let columns = [
        Column::words("--device"),
        Column::words("name"),
        Column::words("kind").leaving(3),
        Column::words("driver").leaving(2),
        Column::figures("memory"),
        Column::figures("largest tensor").leaving(1),
        Column::figures("product"),
    ];
    let drawn = rows.iter().map(|row| {
        let star = if row.device == all.auto { " *" } else { "" };
        vec![
            format!("{}{star}", row.device),
            row.name.clone(),
            row.kind.clone(),
            row.driver.clone(),
            row.memory.map_or_else(|| "?".to_owned(), bytes),
            row.largest.map_or_else(String::new, |(buffer, _)| bytes(buffer)),
            row.products.as_ref().map_or_else(|_| "-".to_owned(), |products| rate(*products)),
        ]
    });
    let mut text = Table::new(columns, drawn).fit(width);
    let mut say = |line: &str| {
        text.push('\n');
        text.push_str(&wrap(line, width, ""));
    };
    say("");
    for row in rows {
        if let Err(why) = &row.products {
            say(&format!("{} cannot be used: {why}", row.device));
        }
        if let Some((buffer, binding)) = row.largest.filter(|(buffer, binding)| binding < buffer) {
            say(&format!(
                "{}: a kernel sees {} of a tensor of up to {} at once; operations on more go in parts",
                row.device,
                bytes(binding),
                bytes(buffer)
            ));
        }
    }
    say(&match &all.no_card {
        None => format!("* --device auto takes {}", all.auto),
        Some(why) => format!("* --device auto takes {}: {why}", all.auto),
    });
    text
}
