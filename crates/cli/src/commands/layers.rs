//! Layers of a model or plan as people read them: equal ones as one line.

use std::collections::BTreeMap;

use mlx_quant_report as report;

use crate::printer::{Printer, bytes};

/// A layer or tensor, or several that differ in their number only.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row<'l> {
    /// Its path; of several `model.layers.{0-2,5}.mlp.up_proj`.
    pub(super) path: String,
    pub(super) shape: &'l [usize],
    /// How it is stored.
    pub(super) scheme: &'l str,
    /// Of all of them.
    pub(super) bytes: u64,
}

/// Shows layers, with `--verbose` each of them.
pub(super) fn show(rows: Vec<Row<'_>>, printer: Printer) {
    let rows = if printer.is_verbose() { rows } else { collapse(rows) };
    let cells =
        |row: Row<'_>| vec![row.path, format!("{:?}", row.shape), row.scheme.to_owned(), bytes(row.bytes)];
    let rows = rows.into_iter().map(cells).collect();
    printer.data(&report::plain_table(&["layer", "shape", "stored as", "size"], rows, 3));
}

/// Layers that differ in one number only, and are stored alike, as one.
fn collapse(layers: Vec<Row<'_>>) -> Vec<Row<'_>> {
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
    let rows = groups.into_iter().map(|((before, after, shape, scheme), numbers, bytes)| {
        let path = match numbers.as_slice() {
            [] => before,
            [number] => format!("{before}{number}{after}"),
            _ => format!("{before}{{{}}}{after}", ranges(&numbers)),
        };
        Row { path, shape, scheme, bytes }
    });
    rows.collect()
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
        let layer = |path: &str, scheme| Row { path: path.to_owned(), shape: &[4, 64], scheme, bytes: 10 };
        let mut layers: Vec<Row<'_>> =
            [0, 1, 2, 5].map(|index| layer(&format!("model.layers.{index}.mlp.up_proj"), "a")).into();
        layers.push(layer("model.layers.3.mlp.up_proj", "b"));
        layers.push(layer("lm_head", "a"));
        let lines: Vec<_> = collapse(layers).into_iter().map(|row| (row.path, row.bytes)).collect();
        let expected =
            [("model.layers.{0-2,5}.mlp.up_proj", 40), ("model.layers.3.mlp.up_proj", 10), ("lm_head", 10)];
        assert_eq!(lines, expected.map(|(path, bytes)| (path.to_owned(), bytes)));
    }
}
