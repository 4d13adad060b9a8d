//! `--mtp`: the drafter beside a model.

use std::path::PathBuf;

use anyhow::Result;
use mlx_format::checkpoint::Destination;
use mlx_quant::Model;
use mlx_quant::drafter;
use mlx_quant::plan::DrafterPlan;

use crate::printer::{Printer, bytes};
use crate::refusal::{REFUSED, exit_code};
use crate::screen::Screen;
use crate::typed::quoted;

/// Refuses what is in the way of a drafter beside `target`, before any work.
pub(crate) fn check(target: Destination<'_>) -> Result<()> {
    let path = drafter::path(target.path);
    Ok(drafter::check(target.at(&path))?)
}

/// A drafter that lies beside a model, which is still to be made.
pub(crate) struct Beside {
    path: PathBuf,
    /// Made by this command, where nothing was.
    fresh: bool,
    what: String,
}

/// Writes the drafter of a plan beside `target`; nothing without one.
pub(crate) fn write(
    model: &Model,
    planned: Option<&DrafterPlan>,
    target: Destination<'_>,
    threads: usize,
    printer: Printer,
) -> Result<Option<Beside>> {
    let Some(planned) = planned else { return Ok(None) };
    let path = drafter::path(target.path);
    let screen = Screen::new(printer);
    let fresh = drafter::write(model, planned, target.at(&path), threads, &screen);
    screen.clear();
    let fresh = fresh?;
    let report = planned.report();
    let what = format!("{:.3} bits per weight, {}", report.bits_per_weight, bytes(report.output_bytes));
    Ok(Some(Beside { path, fresh, what }))
}

/// The result of making the model, with a word on its drafter; a drafter of a model that was refused goes again.
pub(crate) fn conclude(beside: Option<&Beside>, made: Result<()>, printer: Printer) -> Result<()> {
    let Some(Beside { path, fresh, what }) = beside else { return made };
    if let Err(error) = &made {
        if *fresh && exit_code(error) == REFUSED {
            drafter::discard(path)?;
        }
        return made;
    }
    let path = quoted(path);
    printer.say(&format!(
        "drafter  {path}: {what}; mlx_vlm.generate takes it as --draft-model {path} --draft-kind mtp"
    ));
    Ok(())
}
