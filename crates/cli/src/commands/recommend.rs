//! `mlx-quant recommend`.

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::CheckpointError;
use mlx_quant::dynamic::Target;
use mlx_quant::forecast::{Choice, Recommendation, Wish, recommend};
use mlx_quant::inspect::inspect;
use mlx_quant::recipes::{available_memory, total_memory};
use mlx_quant_report as report;
use serde_json::json;

use super::line::{CommandLine, other};
use crate::args::Recommend;
use crate::commands::source::{self, Asked, Need, Opened};
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::{amount, machine};

/// What may be used where the system does not say what is free.
const USUAL_MEMORY: u64 = 16_000_000_000;

/// Runs the command.
pub(crate) fn run(args: &Recommend, printer: Printer) -> Result<()> {
    let wish = wish(args)?;
    let asked = asked(args);
    let model = open(asked, printer)?;
    let machine = machine::measured(wish.threads, args.measure, printer)?;
    let made = recommend(&model, &wish, &machine)?;
    let lines: Vec<String> = made.choices.iter().map(|choice| line(choice, args)).collect::<Result<_>>()?;
    let inspection = inspect(&model)?;
    if printer.is_json() {
        let methods = made.choices.iter().zip(&lines).map(|(choice, line)| {
            let mut choice = serde_json::to_value(choice)?;
            choice["command"] = json!(line);
            Ok(choice)
        });
        let document = json!({
            "model": model.name(),
            "model_type": inspection.model_type,
            "parameters": inspection.parameters,
            "model_bytes": inspection.file_bytes,
            "machine": machine,
            "memory_limit": wish.memory,
            "time_limit": wish.time,
            "quality": wish.quality,
            "methods": methods.collect::<Result<Vec<_>>>()?,
            "recommended": made.pick.map(|pick| &made.choices[pick].method),
            "command": made.pick.map(|pick| &lines[pick]),
            "why": made.why,
        });
        printer.data(&report::json(&document)?);
        return possible(&made);
    }
    let weights = report::weights(inspection.parameters);
    printer.data(&format!(
        "{} ({}, {weights}, {})",
        model.name(),
        inspection.model_type,
        bytes(inspection.file_bytes)
    ));
    printer.data(&report::machine(&machine, wish.memory, total_memory(), printer.width()));
    show(&made, &lines, printer);
    possible(&made)
}

/// Exit code 2 where nothing can be recommended.
fn possible(made: &Recommendation) -> Result<()> {
    match made.pick {
        Some(_) => Ok(()),
        None => {
            Err(Refusal(format!("{}; hint: allow a larger size, more memory or more time", made.why)).into())
        }
    }
}

fn wish(args: &Recommend) -> Result<Wish> {
    let size = args.size.as_deref().map(|text| amount::size("--size", text)).transpose()?;
    let target = size.map(Target::Bytes).or_else(|| args.target_bpw.map(Target::BitsPerWeight));
    if let Some(bits) = args.target_bpw.filter(|bits| !(bits.is_finite() && *bits > 0.0)) {
        return Err(Refusal(format!("--target-bpw {bits}: hint: give a number above 0, such as 4.5")).into());
    }
    super::quantize::affine(args.q_bits, args.q_group_size)?;
    let memory = args.memory.as_deref().map(|text| amount::size("--memory", text)).transpose()?;
    Ok(Wish {
        memory: memory.or_else(available_memory).unwrap_or(USUAL_MEMORY),
        time: args.time.as_deref().map(|text| amount::time("--time", text)).transpose()?,
        target,
        bits: args.q_bits,
        group_size: args.q_group_size,
        quality: args.quality.into(),
        windows: args.n_samples,
        sequence_length: args.sequence_length,
        iterations: args.iters,
        threads: args.threads.map_or(0, |threads| threads as usize),
    })
}

/// A model, or what its config.json says of it.
fn open(asked: Asked<'_>, printer: Printer) -> Result<Opened> {
    source::directory(asked, Need::Headers, printer)?.open(|directory| match mlx_quant::open(directory) {
        Err(mlx_quant::Error::Checkpoint(CheckpointError::NoWeights { .. })) => {
            printer.say("no weights here: shapes are taken from config.json");
            mlx_quant::source::open_config(directory)
        }
        other => other,
    })
}

fn asked(args: &Recommend) -> Asked<'_> {
    Asked::new(args.model.as_deref(), args.revision.as_deref())
}

/// The command that carries a choice out.
fn line(choice: &Choice, args: &Recommend) -> Result<String> {
    let scheme = Scheme::affine(choice.bits, args.q_group_size)?;
    let mut line = CommandLine::new(&choice.recipe, asked(args).word().as_deref(), scheme, choice.target_bpw);
    if choice.recipe.needs_calibration() {
        line.flag("--n-samples", args.n_samples.map(|count| count.to_string()));
        line.flag("--sequence-length", other(args.sequence_length, 512));
    }
    if choice.recipe.trains() {
        line.flag("--iters", other(args.iters, 100));
    }
    if choice.forecast.as_ref().is_some_and(|needs| needs.low_memory) {
        return Ok(format!("{line} --low-memory"));
    }
    Ok(line.to_string())
}

fn show(made: &Recommendation, lines: &[String], printer: Printer) {
    let width = printer.width();
    printer.data(&format!("\n{}", report::recommendation(made, width)));
    match made.pick {
        Some(pick) => {
            let why = format!("* {}: {}", made.choices[pick].method, made.why);
            printer.data(&format!("\n{}", report::wrap(&why, width, "  ")));
            printer.data(&format!("\n  {}", lines[pick]));
        }
        None => printer.data(""),
    }
    if printer.is_verbose() {
        printer.data("");
        for (choice, line) in made.choices.iter().zip(lines) {
            printer.data(&format!("{}\n  {line}", choice.method));
            if let Some(peer) = &choice.mlx_lm {
                printer.data(&format!("  mlx-lm: {}", peer.source));
            }
        }
    }
}
