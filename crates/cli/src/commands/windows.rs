//! What is said of the text that windows are taken from.

use anyhow::Result;
use mlx_quant::Model;
use mlx_quant::data::SourceInfo;
use mlx_quant::recipes::{SharedText, Shares, Text};

use crate::printer::Printer;

/// A calibration text, shared out, with a word on what of it was not read and what it lacks.
pub(crate) fn shared(
    model: &Model,
    text: &Text,
    seed: u64,
    shares: &Shares,
    printer: Printer,
) -> Result<SharedText> {
    let shared = text.share_out(model, seed, shares)?;
    tell(&shared.sources, printer);
    if let Some(found) = shared.short {
        printer.warn(&format!(
            "the calibration text holds {found} windows only, not {}; all of them are used",
            shared.wanted
        ));
    }
    Ok(shared)
}

/// Says what of the text was not read, and what was left out.
pub(crate) fn tell(sources: &[SourceInfo], printer: Printer) {
    for source in sources {
        if let Some(part) = source.part_read() {
            printer.say(&format!("data     {}: {part}", source.name));
        }
        if let Some(rows) = source.left_out() {
            printer.warn(&format!("{}: {rows}; --strict stops there", source.name));
        }
    }
}
