//! `mlx-quant inspect`.

use std::collections::BTreeMap;

use anyhow::Result;
use mlx_quant::inspect::{Form, Inspection, Layer, Verdict, Verification, inspect, verify};
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
        show_layers(inspection, printer);
        show_summary(inspection, printer);
    }
    if let Some(verification) = verification {
        show_verification(verification, printer);
    }
    Ok(())
}

fn show_layers(inspection: &Inspection, printer: Printer) {
    let lines: Vec<(String, &Layer, u64)> = if printer.is_verbose() {
        inspection.layers.iter().map(|layer| (layer.path.clone(), layer, layer.bytes)).collect()
    } else {
        collapse(&inspection.layers)
    };
    let width = lines.iter().map(|(path, ..)| path.len()).max().unwrap_or(0);
    for (path, layer, bytes) in lines {
        let shape = format!("{:?}", layer.shape);
        printer.data(&format!("{path:<width$}  {shape:<20}  {:<24} {bytes:>14}", layer.scheme));
    }
    printer.data("");
}

fn show_summary(inspection: &Inspection, printer: Printer) {
    let line = |name: &str, value: &str| printer.data(&format!("{name:<16} {value}"));
    let described = match (inspection.described, inspection.decoder_described) {
        (_, true) => "decoder described",
        (true, false) => "names described, decoder not",
        (false, false) => "not described",
    };
    line("model type", &format!("{} ({}, {described})", inspection.model_type, inspection.family));
    if let Some(dimensions) = inspection.dimensions {
        line("layers", &dimensions.layers.to_string());
        line("hidden size", &dimensions.hidden_size.to_string());
        line("vocabulary", &dimensions.vocabulary.to_string());
    }
    line("parameters", &inspection.parameters.to_string());
    line("bits per weight", &format!("{:.3}", inspection.bits_per_weight));
    let dtypes = inspection.dtypes.iter().map(|(dtype, count)| format!("{dtype} {}", bytes(*count)));
    line("dtypes", &dtypes.collect::<Vec<_>>().join(", "));
    line("files", &format!("{} bytes in {} file(s)", inspection.file_bytes, inspection.files.len()));
    let packed = if inspection.form == Form::Quantized { "quantized" } else { "not quantized" };
    line("form", packed);
    for (scheme, total) in &inspection.schemes {
        let (layers, weights) = (total.layers, total.weights);
        line("", &format!("{scheme:<24} {layers:>6} layers {weights:>14} weights {:>14} bytes", total.bytes));
    }
    let other = &inspection.other;
    let (tensors, weights) = (other.layers, other.weights);
    line(
        "",
        &format!("{:<24} {tensors:>6} tensors {weights:>13} weights {:>14} bytes", "the rest", other.bytes),
    );
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

/// Layers that differ in one number only, and are stored alike, as one line: `model.layers.{0-2,5}.mlp.up_proj`.
fn collapse(layers: &[Layer]) -> Vec<(String, &Layer, u64)> {
    type Key<'l> = (String, String, &'l [usize], &'l str);
    let mut places: BTreeMap<Key<'_>, usize> = BTreeMap::new();
    let mut groups: Vec<(Key<'_>, &Layer, Vec<usize>, u64)> = Vec::new();
    for layer in layers {
        let (before, number, after) = split_at_number(&layer.path);
        let key = (before, after, layer.shape.as_slice(), layer.scheme.as_str());
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push((key, layer, Vec::new(), 0));
        }
        groups[place].2.extend(number);
        groups[place].3 += layer.bytes;
    }
    let line = |((before, after, ..), layer, numbers, bytes): (Key<'_>, _, Vec<usize>, _)| {
        let path = match numbers.as_slice() {
            [] => before,
            [number] => format!("{before}{number}{after}"),
            _ => format!("{before}{{{}}}{after}", ranges(&numbers)),
        };
        (path, layer, bytes)
    };
    groups.into_iter().map(line).collect()
}

/// The path around its first segment that is a number.
fn split_at_number(path: &str) -> (String, Option<usize>, String) {
    let mut start = 0;
    for segment in path.split('.') {
        if let Ok(number) = segment.parse() {
            let end = start + segment.len();
            return (path[..start].to_owned(), Some(number), path[end..].to_owned());
        }
        start += segment.len() + 1;
    }
    (path.to_owned(), None, String::new())
}

/// `0-2,5` of ascending numbers.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run[0].to_string(),
    });
    runs.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_layers_are_one_line() {
        let layer = |path: &str, scheme: &str| Layer {
            path: path.to_owned(),
            shape: vec![4, 64],
            scheme: scheme.to_owned(),
            packing: None,
            dtype: "BF16".to_owned(),
            weights: 256,
            bytes: 10,
        };
        let mut layers: Vec<Layer> =
            [0, 1, 2, 5].map(|index| layer(&format!("model.layers.{index}.mlp.up_proj"), "a")).into();
        layers.push(layer("model.layers.3.mlp.up_proj", "b"));
        layers.push(layer("lm_head", "a"));
        let lines: Vec<_> = collapse(&layers).into_iter().map(|(path, _, bytes)| (path, bytes)).collect();
        let expected =
            [("model.layers.{0-2,5}.mlp.up_proj", 40), ("model.layers.3.mlp.up_proj", 10), ("lm_head", 10)];
        assert_eq!(lines, expected.map(|(path, bytes)| (path.to_owned(), bytes)));
    }
}
