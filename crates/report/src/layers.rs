//! What a model is, and what a plan would write, layer by layer.

use std::collections::BTreeMap;

use mlx_quant::inspect::{Form, Inspection};
use mlx_quant::plan::{DrafterReport, PlanReport, Towers};

use crate::table::{Column, Table, facts};
use crate::{bytes, weights};

const LAYERS: [Column; 4] = [
    Column::words("layer"),
    Column::words("shape").leaving(1),
    Column::words("stored as"),
    Column::figures("size"),
];

/// A layer or tensor, or several that differ in their number only.
struct Line<'l> {
    /// Its path; of several `model.layers.{0-2,5}.mlp.up_proj`.
    path: String,
    shape: &'l [usize],
    /// How it is stored.
    scheme: &'l str,
    /// Of all of them.
    bytes: u64,
}

/// Layers, those alike on one line unless `each` has its own, then what the model is as a whole.
pub fn inspection(inspection: &Inspection, each: bool, width: usize) -> String {
    let lines = inspection.layers.iter().map(|layer| Line {
        path: layer.path.clone(),
        shape: &layer.shape,
        scheme: &layer.scheme,
        bytes: layer.bytes,
    });
    let layers = listed(lines.collect(), each, width);
    format!("{layers}\n\n{}\n\n{}", facts(&summary(inspection), width), schemes(inspection).fit(width))
}

fn listed(lines: Vec<Line<'_>>, each: bool, width: usize) -> String {
    let lines = if each { lines } else { collapse(lines) };
    let row = |line: Line<'_>| {
        vec![line.path, format!("{:?}", line.shape), line.scheme.to_owned(), bytes(line.bytes)]
    };
    Table::new(LAYERS, lines.into_iter().map(row)).fit(width)
}

fn summary(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let described = match (inspection.described, inspection.decoder_described) {
        (_, true) => "decoder described",
        (true, false) => "names described, decoder not",
        (false, false) => "not described",
    };
    let mut lines =
        vec![("model type", format!("{} ({}, {described})", inspection.model_type, inspection.family))];
    if let Some(dimensions) = inspection.dimensions {
        lines.extend([
            ("layers", dimensions.layers.to_string()),
            ("hidden size", dimensions.hidden_size.to_string()),
            ("vocabulary", dimensions.vocabulary.to_string()),
        ]);
    }
    let dtypes = inspection.dtypes.iter().map(|(dtype, count)| format!("{dtype} {}", bytes(*count)));
    let form = if inspection.form == Form::Quantized { "quantized" } else { "not quantized" };
    lines.extend([
        ("parameters", weights(inspection.parameters)),
        ("bits per weight", format!("{:.3}", inspection.bits_per_weight)),
    ]);
    lines.extend(inspection.towers.map(|own| towers(own, inspection.tensor_bytes, inspection.parameters)));
    lines.extend([
        ("dtypes", dtypes.collect::<Vec<_>>().join(", ")),
        ("files", files(inspection.file_bytes, inspection.files.len())),
        ("form", form.to_owned()),
    ]);
    lines
}

/// Layers by scheme, and the tensors that are none.
fn schemes(inspection: &Inspection) -> Table {
    let columns = [
        Column::words("stored as"),
        Column::figures("tensors"),
        Column::figures("weights").leaving(1),
        Column::figures("size"),
    ];
    let all = inspection.schemes.iter().map(|(scheme, total)| (scheme.as_str(), total));
    let rows = all.chain([("the rest", &inspection.other)]).map(|(name, total)| {
        let counted = weights(total.weights);
        let counted = counted.trim_end_matches(" weights").to_owned();
        vec![name.to_owned(), total.layers.to_string(), counted, bytes(total.bytes)]
    });
    Table::new(columns, rows)
}

/// Layers that a plan writes, those alike on one line unless `each` has its own, and sums.
pub fn plan(report: &PlanReport, each: bool, width: usize) -> String {
    let lines = report.layers.iter().map(|layer| Line {
        path: layer.name.clone(),
        shape: &layer.shape,
        scheme: &layer.scheme,
        bytes: layer.bytes,
    });
    let layers = listed(lines.collect(), each, width);
    let described = if report.described { "" } else { ", by tensor names" };
    let mut sums = vec![
        ("model type", format!("{} ({}{described})", report.model_type, report.family)),
        ("parameters", weights(report.parameters)),
        ("bits per weight", format!("{:.3}", report.bits_per_weight)),
    ];
    let all = report.layers.iter().map(|layer| layer.bytes).sum();
    sums.extend(report.towers.map(|own| towers(own, all, report.parameters)));
    sums.extend(report.drafter.as_ref().map(drafter));
    sums.extend([
        ("reads", bytes(report.input_bytes)),
        ("writes", files(report.output_bytes, report.files.len())),
    ]);
    format!("{layers}\n\n{}", facts(&sums, width))
}

/// What is written beside the model.
fn drafter(own: &DrafterReport) -> (&'static str, String) {
    let (size, bits) = (bytes(own.output_bytes), own.bits_per_weight);
    (
        "drafter",
        format!("{} beside it: {} tensors, {bits:.3} bits per weight, {size}", own.model_type, own.tensors),
    )
}

/// What sees and hears, and what the language model takes without it.
fn towers(own: Towers, all: u64, parameters: u64) -> (&'static str, String) {
    let without = (all - own.bytes) as f64 * 8.0 / (parameters - own.weights).max(1) as f64;
    let text =
        format!("{} tensors, {}; {without:.3} bits per weight without them", own.tensors, bytes(own.bytes));
    ("vision, audio", text)
}

fn files(size: u64, count: usize) -> String {
    format!("{} in {count} file{}", bytes(size), if count == 1 { "" } else { "s" })
}

/// Layers that differ in one number only, and are stored alike, as one.
fn collapse(layers: Vec<Line<'_>>) -> Vec<Line<'_>> {
    type Key<'l> = (String, String, &'l [usize], &'l str);
    let mut places: BTreeMap<Key<'_>, usize> = BTreeMap::new();
    let mut groups: Vec<(Key<'_>, Vec<usize>, u64)> = Vec::new();
    for layer in layers {
        let (before, number, after) = split_at_number(&layer.path);
        let key = (before, after, layer.shape, layer.scheme);
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push((key, Vec::new(), 0));
        }
        groups[place].1.extend(number);
        groups[place].2 += layer.bytes;
    }
    let lines = groups.into_iter().map(|((before, after, shape, scheme), numbers, bytes)| {
        let path = match numbers.as_slice() {
            [] => before,
            [number] => format!("{before}{number}{after}"),
            _ => format!("{before}{{{}}}{after}", ranges(&numbers)),
        };
        Line { path, shape, scheme, bytes }
    });
    lines.collect()
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
        let layer = |path: &str, scheme| Line { path: path.to_owned(), shape: &[4, 64], scheme, bytes: 10 };
        let mut layers: Vec<Line<'_>> =
            [0, 1, 2, 5].map(|index| layer(&format!("model.layers.{index}.mlp.up_proj"), "a")).into();
        layers.push(layer("model.layers.3.mlp.up_proj", "b"));
        layers.push(layer("lm_head", "a"));
        let lines: Vec<_> = collapse(layers).into_iter().map(|line| (line.path, line.bytes)).collect();
        let expected =
            [("model.layers.{0-2,5}.mlp.up_proj", 40), ("model.layers.3.mlp.up_proj", 10), ("lm_head", 10)];
        assert_eq!(lines, expected.map(|(path, bytes)| (path.to_owned(), bytes)));
    }
}
