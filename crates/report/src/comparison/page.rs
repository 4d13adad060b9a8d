//! The page: one file, no network, no script.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use mlx_quant::compare::{Comparison, Entry, Ranked};
use mlx_quant::evaluate::SCALE;
use serde::Serialize;

use super::Commands;
use super::canvas::{Size, dark_rules};
use super::layers::Grid;
use super::plots::{size_plot, training_plot};
use super::rows::{columns, facts, in_order, made_on, quality_orders, rows, verdict, widths};
use super::style::{Style, method};
use crate::{Error, with_error};

const PAGE: &str = include_str!("page.html");
/// Steps of the colours of sensitivities.
const SHADES: usize = 6;

/// A step of the order of quality.
#[derive(Serialize)]
struct Gap {
    name: String,
    bits: u32,
    against: String,
    behind: String,
    apart: bool,
}

/// A head or cell, and whether a phone shows it.
#[derive(Serialize)]
struct Cell {
    text: String,
    phone: bool,
}

/// What to take at one width.
#[derive(Serialize)]
struct Taken {
    words: String,
    lines: Vec<(&'static str, String)>,
}

/// A method in a legend.
#[derive(Serialize)]
struct Key {
    name: String,
    color: &'static str,
    path: &'static str,
}

/// Bits of every layer, and the methods that have them.
#[derive(Serialize)]
struct Allocation {
    names: Vec<String>,
    words: String,
    grid: Grid<(u32, usize)>,
}

/// KL of a layer alone, in thousandths of a nat, and its shade.
#[derive(Clone, Serialize)]
struct Cost {
    thousandths: String,
    shade: usize,
}

/// The page as HTML: what to take, tables, KL of the methods, bits and sensitivities of layers, the course of dwq.
///
/// # Errors
/// If the page's own template is wrong.
pub fn comparison_html(comparison: &Comparison, commands: &Commands) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    let failed = |error: minijinja::Error| Error::Page(error.to_string());
    environment.add_template("page", PAGE).map_err(failed)?;
    let numbers: Vec<usize> = in_order(comparison).map(|(index, _)| index).collect();
    let names: Vec<String> = numbers.iter().map(|index| comparison.entries[*index].name.clone()).collect();
    let pareto: Vec<bool> = numbers.iter().map(|index| comparison.rankings.pareto.contains(index)).collect();
    let make: Vec<String> = numbers.iter().filter_map(|index| commands.make.get(*index).cloned()).collect();
    let verdicts = comparison.rankings.verdicts.iter();
    let taken = verdicts
        .map(|one| Taken { words: verdict(comparison, one), lines: commands.after(comparison, one) })
        .collect::<Vec<_>>();
    let figure = |draw: &dyn Fn(Size) -> String| {
        [Size::Wide, Size::Narrow].map(|size| Value::from_safe_string(draw(size)))
    };
    let course = training_plot(comparison, Size::Wide)
        .map(|_| figure(&|size| training_plot(comparison, size).unwrap_or_default()));
    let costs = costs(comparison);
    let trained: Vec<Key> = in_order(comparison)
        .filter(|(_, entry)| entry.distilled.is_some())
        .map(|(_, entry)| Key { name: entry.name.clone(), ..key(entry) })
        .collect();
    let page = environment.get_template("page").map_err(failed)?;
    let page = page.render(context! {
        comparison => Value::from(Serde(comparison)),
        facts => facts(comparison),
        taken => Value::from(Serde(taken)),
        heads => Value::from(Serde(heads(comparison))),
        rows => Value::from(Serde(cells(comparison))),
        pareto,
        make,
        names,
        several => widths(comparison).len() > 1,
        orders => quality_orders(comparison),
        made_on => made_on(comparison),
        scale => SCALE.map(|reading| (reading.range(), reading.words)).to_vec(),
        gaps => Value::from(Serde(gaps(comparison))),
        dark_rules => Value::from_safe_string(dark_rules()),
        size_plot => figure(&|size| size_plot(comparison, size)).to_vec(),
        keys => Value::from(Serde(keys(comparison))),
        training_plot => course.map(|course| course.to_vec()),
        trained => Value::from(Serde(trained)),
        costs => costs.map(|costs| Value::from(Serde(costs))),
        bits => Value::from(Serde(allocations(comparison))),
    });
    page.map_err(failed)
}

fn heads(comparison: &Comparison) -> Vec<Cell> {
    let head = |(column, phone): (crate::Column, bool)| Cell { text: column.head.to_owned(), phone };
    columns(comparison).into_iter().map(head).collect()
}

fn cells(comparison: &Comparison) -> Vec<Vec<Cell>> {
    let columns = columns(comparison);
    let row = |row: Vec<String>| {
        row.into_iter().zip(&columns).map(|(text, (_, phone))| Cell { text, phone: *phone }).collect()
    };
    rows(comparison).into_iter().map(row).collect()
}

fn gaps(comparison: &Comparison) -> Vec<Gap> {
    let name = |entry: usize| method(&comparison.entries[entry].recipe).to_owned();
    let gap = |ranked: &Ranked| {
        Some(Gap {
            name: name(ranked.entry),
            bits: ranked.bits,
            against: name(ranked.against?),
            behind: with_error(ranked.behind?, ranked.behind_stderr, 4),
            apart: ranked.apart,
        })
    };
    comparison.rankings.quality.iter().filter_map(gap).collect()
}

fn key(entry: &Entry) -> Key {
    let style = Style::of(&entry.recipe);
    Key { name: method(&entry.recipe).to_owned(), color: style.color, path: style.path() }
}

/// One for each recipe.
fn keys(comparison: &Comparison) -> Vec<Key> {
    let mut keys: Vec<Key> = Vec::new();
    for (_, entry) in in_order(comparison) {
        let key = key(entry);
        if keys.iter().all(|known| known.name != key.name) {
            keys.push(key);
        }
    }
    keys
}

/// Each allocation once, however many methods round it.
fn allocations(comparison: &Comparison) -> Vec<Allocation> {
    /// Bits and group size of each layer, by path.
    type Widths = Vec<(String, (u32, usize))>;
    let mut same: Vec<(Widths, Vec<&Entry>)> = Vec::new();
    for (_, entry) in in_order(comparison).filter(|(_, entry)| entry.predicted_kl.is_some()) {
        let layers: Vec<_> =
            entry.layers.iter().map(|layer| (layer.path.clone(), (layer.bits, layer.group_size))).collect();
        match same.iter_mut().find(|(known, _)| *known == layers) {
            Some((_, entries)) => entries.push(entry),
            None => same.push((layers, vec![entry])),
        }
    }
    let allocation = |(layers, entries): (Vec<_>, Vec<&Entry>)| Allocation {
        names: entries.iter().map(|entry| entry.name.clone()).collect(),
        words: foreseen(&entries),
        grid: Grid::of(layers),
    };
    same.into_iter().map(allocation).collect()
}

/// What the allocation was foreseen to cost beside what each method then measured, and why they differ.
fn foreseen(entries: &[&Entry]) -> String {
    let Some(predicted) = entries.first().and_then(|entry| entry.predicted_kl) else { return String::new() };
    let measured = |entry: &&Entry| {
        let change = entry.kl() / predicted - 1.0;
        let side = if change < 0.0 { "below" } else { "above" };
        format!("{} {:.4}, {:.0} % {side} it", method(&entry.recipe), entry.kl(), change.abs() * 100.0)
    };
    format!(
        "Chosen by an estimate of KL {predicted:.4}: the sum of what each layer costs alone, rounded with searched scales. \
         Measured: {}. The estimate is for choosing bits only: it leaves out how layers act together, and that these \
         methods round otherwise than by searched scales.",
        entries.iter().map(measured).collect::<Vec<_>>().join("; ")
    )
}

/// KL of each layer alone at the scheme of the comparison, if it was measured.
fn costs(comparison: &Comparison) -> Option<Grid<Cost>> {
    let known: Vec<(String, f64)> = comparison
        .sensitivities
        .iter()
        .filter_map(|layer| Some((layer.path.clone(), layer.kl?)))
        .filter(|(_, kl)| kl.is_finite())
        .collect();
    let logs = known.iter().filter(|(_, kl)| *kl > 0.0).map(|(_, kl)| kl.ln());
    let (low, high) = logs.fold((f64::MAX, f64::MIN), |(low, high), log| (low.min(log), high.max(log)));
    let shade = |kl: f64| {
        // Equal steps of the shade are equal factors.
        let part = (kl.max(f64::MIN_POSITIVE).ln() - low) / (high - low).max(1e-9);
        ((part * SHADES as f64) as usize).min(SHADES - 1)
    };
    let cost = |(path, kl): (String, f64)| (path, Cost { thousandths: thousandths(kl), shade: shade(kl) });
    (!known.is_empty()).then(|| Grid::of(known.into_iter().map(cost)))
}

/// Two digits that count: `12`, `1.2`, `0.12`, `0.01`.
fn thousandths(kl: f64) -> String {
    let value = kl * 1e3;
    let digits = match value {
        _ if value >= 9.95 => 0,
        _ if value >= 0.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use mlx_quant::compare::{Keep, LayerBits, LayerSensitivity, MadeOn, Rankings, Text};
    use mlx_quant::evaluate::{Against, Measures, Subject};
    use mlx_quant::{Evaluation, Pick};

    use super::*;

    fn text() -> Text {
        let pick = Pick::EvenlySpaced { windows: 3 };
        Text {
            sequence_length: 8,
            windows: 3,
            pick,
            data_hash: "0123456789abcdef01".to_owned(),
            sources: Vec::new(),
        }
    }

    /// A result with these divergences by window.
    fn entry(name: &str, recipe: &str, bits_per_weight: f64, seconds: f64, windows: &[f64]) -> Entry {
        let against = Against {
            kl_mean: windows.iter().sum::<f64>() / windows.len() as f64,
            kl_by_window: windows.to_vec(),
            ..Against::default()
        };
        let total = Measures { windows: windows.len(), against: Some(against), ..Measures::default() };
        Entry {
            name: name.to_owned(),
            recipe: recipe.to_owned(),
            bits: bits_per_weight as u32,
            group_size: 64,
            bits_per_weight,
            bytes: 1000,
            seconds,
            resumed: false,
            peak_memory: None,
            made_on: MadeOn { processor: Some("Xeon".to_owned()), threads: 2, engine: "cpu".to_owned() },
            predicted_kl: None,
            evaluation: Evaluation {
                subject: Subject::default(),
                total,
                by_source: Vec::new(),
                sequence_length: 8,
                data_hash: String::new(),
                pick: Pick::EvenlySpaced { windows: windows.len() },
                sources: Vec::new(),
            },
            layers: Vec::new(),
            distilled: None,
            keep: Keep::Best,
            model: None,
        }
    }

    fn comparison(entries: Vec<Entry>) -> Comparison {
        Comparison {
            version: "1".to_owned(),
            model: "<script>alert(1)</script>".to_owned(),
            model_type: "llama".to_owned(),
            parameters: 1000,
            model_bytes: 2000,
            reference_perplexity: 10.0,
            kernels: "none".to_owned(),
            calibration: text(),
            held_out: text(),
            training: (0, 0),
            rankings: Rankings::of(&entries),
            entries,
            sensitivities: Vec::new(),
            predicted: vec![(4.0, 0.2), (5.0, 0.05)],
            seconds: 1.0,
        }
    }

    #[test]
    fn names_are_text_and_nothing_is_left_out() {
        let entries = vec![
            entry("basic", "rtn", 4.5, 1.0, &[0.1, 0.12, 0.11]),
            entry("gptq", "gptq", 4.5, 9.0, &[0.05, 0.07, 0.06]),
        ];
        let comparison = comparison(entries);
        let make = vec!["one".to_owned(), "two & three".to_owned()];
        let commands = Commands { make, run: Vec::new() };
        let page = comparison_html(&comparison, &commands).unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
        // The better one stands first, with its own command.
        let (first, second) = (page.find("<pre>two &amp; three</pre>"), page.find("<pre>one</pre>"));
        assert!(first.is_some() && first < second, "{first:?} {second:?}");
        assert!(page.contains("0.0500 ± 0.0000"), "{page}");
        // It opens with what to take, and what nobody measured stands beside nothing.
        let verdict = page.find(
            "Take gptq: KL 0.0600 (noticeable in hard tasks), 45 % below basic at the same size, 9.00 s",
        );
        assert!(verdict.is_some() && verdict < page.find("<table"), "{page}");
        assert!(!page.contains("predicted") && page.contains("Xeon, 2 threads, engine cpu"));
        // Nothing of what did not take part.
        for absent in ["Bits of every layer", "What each layer costs", "The course of dwq", "<dt>dwq"] {
            assert!(!page.contains(absent), "{absent}");
        }
    }

    #[test]
    fn equal_allocations_are_shown_once_with_their_embeddings() {
        let layers = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"];
        let bits = |path: &str| LayerBits { path: path.to_owned(), bits: 4, group_size: 64, bytes: 10 };
        let allocated = |name: &str, windows: &[f64]| Entry {
            predicted_kl: Some(0.06),
            layers: layers.map(bits).to_vec(),
            ..entry(name, name, 4.5, 9.0, windows)
        };
        let mut made = comparison(vec![
            allocated("dynamic", &[0.044, 0.045, 0.046]),
            allocated("dynamic+gptq", &[0.040, 0.041, 0.042]),
        ]);
        made.sensitivities = layers
            .iter()
            .zip([0.004, 0.0005, 0.000_05])
            .map(|(path, kl)| LayerSensitivity { path: (*path).to_owned(), kl: Some(kl) })
            .collect();
        let page = comparison_html(&made, &Commands::default()).unwrap();
        assert_eq!(page.matches("<table class=\"bits\">").count(), 2, "one of bits, one of costs");
        assert!(page.contains("<h3>dynamic+gptq; dynamic</h3>"));
        // A long name may break behind a plus, on a phone.
        assert!(
            page.contains("<th scope=\"row\">dynamic+<wbr>gptq</th>") && !page.contains("&lt;wbr"),
            "{page}"
        );
        assert!(page.contains("dynamic 0.0450, 25 % below it"), "{page}");
        assert_eq!(page.matches("model.embed_tokens").count(), 2, "with its bits and with its cost");
        assert!(page.contains("class=\"s5\">4.0<") && page.contains("class=\"s0\">0.05<"), "{page}");
    }
}
