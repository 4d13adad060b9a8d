//! The page: one file, no network, no script.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use mlx_quant::compare::{Comparison, Ranked};
use serde::Serialize;

use super::layers::Grid;
use super::plots::{sensitivity_plot, size_plot, training_plot};
use super::rows::{HEADS, facts, in_order, quality_order, rows, speed_order};
use crate::{Error, with_error};

const PAGE: &str = include_str!("page.html");

/// A step of the order of quality.
#[derive(Serialize)]
struct Gap {
    name: String,
    behind: Option<String>,
    apart: bool,
}

/// The page as HTML: tables, KL against size, bits and sensitivities of layers, the course of dwq.
///
/// `commands` gives for each entry the command line that makes it again, and may be empty.
///
/// # Errors
/// If the page's own template is wrong.
pub fn comparison_html(comparison: &Comparison, commands: &[String]) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    let failed = |error: minijinja::Error| Error::Page(error.to_string());
    environment.add_template("page", PAGE).map_err(failed)?;
    let gap = |ranked: &Ranked| Gap {
        name: comparison.entries[ranked.entry].name.clone(),
        behind: ranked.behind.map(|behind| with_error(behind, ranked.behind_stderr, 5)),
        apart: ranked.apart,
    };
    let bits: Vec<Value> = comparison
        .entries
        .iter()
        .filter(|entry| entry.predicted_kl.is_some())
        .map(|entry| {
            let layers = entry.layers.iter().map(|layer| (layer.path.clone(), (layer.bits, layer.group_size)));
            let predicted = entry.predicted_kl.map(|kl| format!("{kl:.4}"));
            context! { name => entry.name.clone(), grid => Value::from(Serde(Grid::of(layers))), predicted, measured => format!("{:.4}", entry.kl()) }
        })
        .collect();
    let gaps: Vec<Gap> = comparison.rankings.quality.iter().map(gap).collect();
    let numbers: Vec<usize> = in_order(comparison).map(|(index, _)| index).collect();
    let names: Vec<String> = numbers.iter().map(|index| comparison.entries[*index].name.clone()).collect();
    let pareto: Vec<bool> = numbers.iter().map(|index| comparison.rankings.pareto.contains(index)).collect();
    let commands: Vec<String> = numbers.iter().filter_map(|index| commands.get(*index).cloned()).collect();
    let page = environment.get_template("page").map_err(failed)?;
    let page = page.render(context! {
        comparison => Value::from(Serde(comparison)),
        facts => facts(comparison),
        heads => HEADS,
        rows => rows(comparison),
        pareto,
        commands,
        names,
        quality => quality_order(comparison),
        speed => speed_order(comparison),
        gaps => Value::from(Serde(gaps)),
        size_plot => Value::from_safe_string(size_plot(comparison)),
        sensitivity_plot => sensitivity_plot(comparison).map(Value::from_safe_string),
        training_plot => training_plot(comparison).map(Value::from_safe_string),
        bits,
    });
    page.map_err(failed)
}

#[cfg(test)]
mod tests {
    use mlx_quant::compare::{Entry, Keep, Rankings, Text};
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

    #[test]
    fn names_are_text_and_nothing_is_left_out() {
        let entries = vec![
            entry("basic", "rtn", 4.5, 1.0, &[0.1, 0.12, 0.11]),
            entry("gptq", "gptq", 4.5, 9.0, &[0.05, 0.07, 0.06]),
        ];
        let comparison = Comparison {
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
        };
        let page = comparison_html(&comparison, &["one".to_owned(), "two & three".to_owned()]).unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
        // The better one stands first, with its own command.
        let (first, second) = (page.find("<pre>two &amp; three</pre>"), page.find("<pre>one</pre>"));
        assert!(first.is_some() && first < second, "{first:?} {second:?}");
        assert!(page.contains("predicted: dynamic+search") && page.contains("0.05000 ± 0.00000"), "{page}");
        // Nothing of what did not take part.
        assert!(
            !page.contains("Bits of every layer")
                && !page.contains("The course of dwq")
                && !page.contains("<dt>dwq")
        );
    }
}
