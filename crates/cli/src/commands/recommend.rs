//! `mlx-quant recommend`.

use std::path::Path;

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::CheckpointError;
use mlx_quant::dynamic::Target;
use mlx_quant::forecast::{Choice, Recommendation, Row, Wish, recommend};
use mlx_quant::inspect::inspect;
use mlx_quant::recipes::{available_memory, total_memory};
use mlx_quant_report as report;
use serde_json::json;

use super::line::{CommandLine, other, quoted, wrapped};
use crate::args::Recommend;
use crate::commands::source::{self, Asked, Need, Opened};
use crate::printer::{Printer, bytes};
use crate::refusal::Refusal;
use crate::{amount, machine};

/// What may be used where the system does not say what is free.
const USUAL_MEMORY: u64 = 16_000_000_000;

/// Of the JSON document: raised when a field goes or means something else.
const VERSION: u32 = 2;

/// Runs the command.
pub(crate) fn run(args: &Recommend, printer: Printer) -> Result<()> {
    let device = source::device(&args.device)?;
    let wish = wish(args)?;
    let asked = asked(args);
    let model = open(asked, printer)?.on(&device);
    let machine = machine::measured(wish.threads, args.measure, &device, printer)?;
    let made = recommend(&model, &wish, &machine)?;
    let name = name(args, &model);
    let lines: Vec<String> =
        made.choices.iter().map(|choice| line(choice, args, &name)).collect::<Result<_>>()?;
    let of_row = |row: &Row| row.choice.as_ref().map(|choice| line(choice, args, &name)).transpose();
    let of_rows: Vec<Option<String>> = made.rows.iter().map(of_row).collect::<Result<_>>()?;
    let inspection = inspect(&model)?;
    if printer.is_json() {
        let methods = made.choices.iter().zip(&lines).map(|(choice, line)| {
            let mut choice = serde_json::to_value(choice)?;
            choice["command"] = json!(line);
            Ok(choice)
        });
        let rows = made.rows.iter().zip(&of_rows).map(|(row, line)| {
            let mut value = serde_json::to_value(row)?;
            if let (Some(choice), Some(line)) =
                (value.get_mut("choice").and_then(|choice| choice.as_object_mut()), line)
            {
                choice.insert("command".to_owned(), json!(line));
            }
            Ok(value)
        });
        let document = json!({
            "version": VERSION,
            "model": model.name(),
            "model_type": inspection.model_type,
            "parameters": inspection.parameters,
            "model_bytes": inspection.file_bytes,
            "machine": machine,
            "memory_limit": wish.memory,
            "time_limit": wish.time,
            "quality": wish.quality,
            "methods": methods.collect::<Result<Vec<_>>>()?,
            "rows": rows.collect::<Result<Vec<_>>>()?,
            "recommended": made.pick.and_then(|pick| made.rows[pick].choice.as_ref()).map(|choice| &choice.method),
            "command": made.pick.and_then(|pick| of_rows[pick].as_ref()),
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
    show_rows(&made, &of_rows, printer);
    show_methods(&made, &lines, printer);
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
        return Err(Refusal(format!(
            "--target-bpw {bits} is no number of bits; hint: give a number above 0, such as 4.5"
        ))
        .into());
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
    Asked::new(args.model.given(), args.revision.as_deref())
}

/// How the model is called in the name of an output.
fn name(args: &Recommend, model: &mlx_quant::Model) -> String {
    let Some(word) = asked(args).word() else { return "demo".to_owned() };
    let last = word.file_name().map(|name| name.to_string_lossy().into_owned());
    let last = last.unwrap_or_else(|| model.name());
    last.split('@').next().unwrap_or_default().to_owned()
}

/// The command that carries a choice out, into a directory of its own.
fn line(choice: &Choice, args: &Recommend, name: &str) -> Result<String> {
    let scheme = Scheme::affine(choice.bits, args.q_group_size)?;
    let mut line = CommandLine::new(&choice.recipe, asked(args).word().as_deref(), scheme, choice.target_bpw);
    let size =
        choice.target_bpw.map_or_else(|| format!("{}bit", choice.bits), |target| format!("{target:.3}bpw"));
    line.flag("--mlx-path", Some(quoted(Path::new(&format!("{name}-{}-{size}", choice.method)))));
    if choice.recipe.needs_calibration() {
        line.flag("--n-samples", choice.windows.map(|count| count.to_string()));
        line.flag("--sequence-length", other(args.sequence_length, 512));
    }
    if choice.recipe.trains() {
        line.flag("--iters", other(args.iters, 100));
    }
    if choice.recipe.needs_calibration() {
        line.device(&args.device);
    }
    if choice.forecast.as_ref().is_some_and(|needs| needs.low_memory) {
        return Ok(format!("{line} --low-memory"));
    }
    Ok(line.to_string())
}

/// What to do now, within an hour and overnight.
fn show_rows(made: &Recommendation, lines: &[Option<String>], printer: Printer) {
    printer.data(&format!("\n{}", report::advice(made, printer.width())));
    for (row, line) in made.rows.iter().zip(lines) {
        let told = row.same_as.map_or_else(String::new, |same| format!("as {}: ", made.rows[same].when));
        printer.data(&format!(
            "\n{}",
            report::wrap(&format!("{}: {told}{}", row.when, row.why), printer.width(), "")
        ));
        if let (Some(line), None) = (line, row.same_as) {
            printer.data(&wrapped(line, 2, printer.width()));
        }
    }
}

/// Every method with its needs, and its command or what is in its way.
fn show_methods(made: &Recommendation, lines: &[String], printer: Printer) {
    printer.data(&format!("\n{}", report::methods(made, printer.width())));
    // What is in the way of several methods is said once.
    let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
    for choice in &made.choices {
        let Some(obstacle) = choice.obstacle.as_deref() else { continue };
        match told.iter_mut().find(|(known, _)| *known == obstacle) {
            Some((_, methods)) => methods.push(&choice.method),
            None => told.push((obstacle, vec![&choice.method])),
        }
    }
    printer.data("");
    for (choice, line) in made.choices.iter().zip(lines).filter(|(choice, _)| choice.obstacle.is_none()) {
        printer.data(&format!("{}\n{}", choice.method, wrapped(line, 2, printer.width())));
    }
    for (obstacle, methods) in told {
        printer.data(&report::wrap(&format!("{}: {obstacle}", methods.join(", ")), printer.width(), ""));
    }
    printer.data(&format!("\n{}", report::wrap(ESTIMATE, printer.width(), "")));
    if printer.is_verbose() {
        let peers = made.choices.iter().filter_map(|choice| Some((&choice.method, choice.mlx_lm.as_ref()?)));
        for (method, peer) in peers {
            printer.data(&format!("mlx-lm's {method}: {}", peer.source));
        }
    }
}

const ESTIMATE: &str = "expected KL: to the original, in nats per token; an estimate, what the method lost at this size on a \
                        model of 8 million weights and on one of 135 million. Below 0.01 is hard to tell from the original. \
                        `mlx-quant compare` measures your model.";
