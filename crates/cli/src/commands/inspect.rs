//! `mlx-quant inspect`.

use anyhow::Result;
use mlx_quant::inspect::{Inspection, Verdict, Verification, inspect, verify};
use mlx_quant_report as report;
use serde_json::{Value, json};

use crate::args::Inspect;
use crate::commands::source::{self, Asked, Need};
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::screen::Screen;

/// Runs the command.
pub(crate) fn run(args: &Inspect, printer: Printer) -> Result<()> {
    let asked = Asked::new(args.model.given(), args.revision.as_deref());
    let located = source::directory(asked, Need::of(!args.verify), printer)?;
    if !args.verify {
        let model = located.open(mlx_quant::open)?;
        for file in model.checkpoint.ignored() {
            printer.warn(&format!("{file} is not in the index; mlx_lm reads it all the same"));
        }
        if let Some(index) = model.checkpoint.left_aside() {
            printer
                .warn(&format!("{} names {}, which is not here; it is left aside", index.file, index.names));
        }
        let inspection = inspect(&model)?;
        return show(Some(&inspection), None, printer);
    }
    let directory = located.directory.clone();
    let model = located.open(mlx_quant::source::open_files)?;
    let screen = Screen::new(printer);
    let threads = args.threads.map_or(0, |threads| threads as usize);
    let verification = verify(&model, &screen, threads);
    screen.clear();
    let verification = verification?;
    // What keeps it from being told is among the problems then.
    show(inspect(&model).ok().as_ref(), Some(&verification), printer)?;
    match verification.verdict {
        Verdict::Loads => Ok(()),
        Verdict::Unknown if verification.problems.is_empty() => Ok(()),
        Verdict::LoadsBut | Verdict::Unknown | Verdict::Fails => {
            let (count, model) = (verification.problems.len(), directory.display());
            let plural = if count == 1 { "problem" } else { "problems" };
            Err(Refusal(format!(
                "{model}: {count} {plural}; hint: download the files again, or convert the original model again"
            ))
            .into())
        }
    }
}

fn show(
    inspection: Option<&Inspection>,
    verification: Option<&Verification>,
    printer: Printer,
) -> Result<()> {
    if printer.is_json() {
        let mut document = inspection.map_or_else(|| Ok(json!({})), serde_json::to_value)?;
        if let (Some(object), Some(verification)) = (document.as_object_mut(), verification) {
            let mut value = serde_json::to_value(verification)?;
            value["text"] = Value::String(verification.to_string());
            object.insert("verification".to_owned(), value);
        }
        printer.data(&serde_json::to_string_pretty(&document)?);
        return Ok(());
    }
    if let Some(inspection) = inspection {
        printer.data(&report::inspection(inspection, printer.is_verbose(), printer.width()));
    }
    if let Some(verification) = verification {
        show_verification(verification, printer);
    }
    Ok(())
}

fn show_verification(verification: &Verification, printer: Printer) {
    printer.data("");
    for problem in &verification.problems {
        let kind = if problem.fatal { "fatal" } else { "wrong" };
        printer.data(&format!("{kind}: {problem}"));
    }
    for note in &verification.notes {
        printer.data(&format!("note: {note}"));
    }
    let (tensors, read, seconds) = (verification.tensors, bytes(verification.bytes), verification.seconds);
    printer.say(&format!("read {read} of {tensors} tensors in {seconds:.2} s"));
    printer.data(&verification.to_string());
}
