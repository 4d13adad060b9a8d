//! Dynamic mixed precision end to end: what it predicts, what it spends, and what it refuses.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mlx_format::Scheme;
use mlx_format::checkpoint::Directory;
use mlx_quant::dynamic::{
    DynamicPlan, DynamicSettings, Sensitivities, SensitivitySettings, Target, sensitivities,
};
use mlx_quant::plan::Overrides;
use mlx_quant::{
    DataSource, Error, EvaluationSettings, Event, Model, Observer, Pick, Plan, QuantizeSettings, Settings,
    Silent, Windows, evaluate, open, quantize,
};

use crate::common::{Stopper, fixtures, open_path, random_windows, shared};

fn demo() -> Model {
    open(&Directory::Embedded { name: "demo model", files: mlx_quant_demo::FILES }).unwrap()
}

fn windows(model: &Model, data: &DataSource, pick: Pick, tokens: usize) -> Windows {
    Windows::read(data, &model.tokenizer().unwrap(), model.vocabulary().unwrap(), tokens, pick).unwrap()
}

fn calibration(model: &Model) -> Windows {
    windows(model, &DataSource::BuiltinCalibration, Pick::Sampled { windows: 8, seed: 123 }, 256)
}

fn settings(group_size: usize) -> Settings {
    Settings { quantize: Some(Scheme::affine(4, group_size).unwrap()), ..Settings::default() }
}

fn measure(model: &Model, windows: &Windows) -> Sensitivities {
    sensitivities(model, windows, &SensitivitySettings::default(), None, &Silent).unwrap()
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    order.into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank as f64);
    ranks
}

fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product =
        |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum() };
    product(&a, &b) / (product(&a, &a) * product(&b, &b)).sqrt()
}

/// Predicted divergence of replacing one layer against the true one.
#[test]
fn predictions_rank_as_the_truth() {
    let model = demo();
    let all = measure(&model, &calibration(&model));
    let held_out = windows(&model, &DataSource::BuiltinHeldOut, Pick::EvenlySpaced { windows: 2 }, 256);
    let out = tempfile::tempdir().unwrap();
    let base = Scheme::affine(4, 64).unwrap();
    let (mut predicted, mut found) = (Vec::new(), Vec::new());
    for layer in all.layers.iter().step_by(4) {
        for bits in [2, 4] {
            let path = &layer.path;
            let text = format!(
                "[[layer]]\npath = \"*\"\nkeep = true\n[[layer]]\npath = \"{path}\"\nbits = {bits}\ngroup_size = 64"
            );
            let overrides = Some(Overrides::parse(&text, base).unwrap());
            let settings = Settings { quantize: Some(base), overrides, ..Settings::default() };
            let plan = Plan::new(&model.checkpoint, &model.config, settings).unwrap();
            let mut how = QuantizeSettings::new("search".parse().unwrap());
            how.columns = [(path.clone(), layer.column_weights())].into_iter().collect();
            let target = out.path().join(format!("{path}-{bits}"));
            quantize(&model, &plan, &held_out, &target, &how, &Silent).unwrap();
            let written = open_path(&target).unwrap();
            let quality =
                evaluate(&written, Some(&model), &held_out, &EvaluationSettings::default(), &Silent).unwrap();
            found.push(quality.total.against.unwrap().kl_mean);
            let cost = layer.costs.iter().find(|cost| cost.bits == bits && cost.group_size == 64).unwrap();
            predicted.push(cost.kl);
            println!(
                "{path:<45} {bits} bits: predicted {:.3e}, true {:.3e}",
                cost.kl,
                found[found.len() - 1]
            );
        }
    }
    let correlation = spearman(&predicted, &found);
    println!("Spearman {correlation:.4} over {}", found.len());
    assert!(correlation > 0.95, "{correlation}");
}

/// Layers that learn afterwards lose less by few bits, and the table, which does not learn, gets what they leave.
#[test]
fn what_learns_leaves_bits_to_the_table() {
    let model = demo();
    let all = measure(&model, &calibration(&model));
    let plan = |learned| {
        let dynamic = DynamicSettings { learned, ..DynamicSettings::new(Target::BitsPerWeight(2.5)) };
        DynamicPlan::new(&model, &settings(64), &all, &dynamic).unwrap()
    };
    let bits = |plan: &DynamicPlan| plan.plan.settings.schemes["model.embed_tokens"].bits();
    let [usual, learned] = [plan(false), plan(true)];
    assert!(bits(&learned) > bits(&usual), "{} and {}", bits(&learned), bits(&usual));
    assert!(learned.plan.bits_per_weight() <= 2.5);
    assert!(learned.predicted_kl < 0.7 * usual.predicted_kl);
}

/// Never above the target, hardly below it, whatever is asked, and no more bits than allowed.
#[test]
fn targets_are_met() {
    let model = demo();
    let all = measure(&model, &calibration(&model));
    let plan = |dynamic: &DynamicSettings| DynamicPlan::new(&model, &settings(64), &all, dynamic);
    let mut last = f64::INFINITY;
    for target in [2.5, 3.0, 3.507, 4.0, 4.5, 5.0, 6.3] {
        let made = plan(&DynamicSettings::new(Target::BitsPerWeight(target))).unwrap();
        let bits = made.plan.bits_per_weight();
        assert!(bits <= target && bits > target - 0.02, "{bits} for {target}");
        // At the lower end the embedding alone is a step of several hundredths of a bit.
        let gap = made.predicted_kl / made.bound_kl;
        assert!(made.predicted_kl < last && gap < if target < 3.0 { 1.05 } else { 1.005 }, "{target}: {gap}");
        last = made.predicted_kl;
        let bytes = made.plan.layout.tensor_bytes();
        let same = plan(&DynamicSettings::new(Target::Bytes(bytes))).unwrap();
        assert!(same.plan.layout.tensor_bytes() <= bytes && same.predicted_kl <= made.predicted_kl * 1.0001);
    }
    let limited =
        DynamicSettings { min_bits: 3, max_bits: 5, ..DynamicSettings::new(Target::BitsPerWeight(4.2)) };
    for (scheme, _) in plan(&limited).unwrap().plan.report().schemes {
        assert!(
            ["3 bits", "4 bits", "5 bits", "bfloat16", "BF16"].iter().any(|own| scheme.starts_with(own)),
            "{scheme}"
        );
    }
    let small = plan(&DynamicSettings::new(Target::Divergence(0.05))).unwrap();
    assert!(small.predicted_kl <= 0.05 && small.predicted_kl > 0.049, "{}", small.predicted_kl);
    for target in [
        Target::BitsPerWeight(1.9),
        Target::BitsPerWeight(9.5),
        Target::BitsPerWeight(f64::NAN),
        Target::Bytes(1000),
        Target::Divergence(1e-9),
        Target::Divergence(-1.0),
    ] {
        let error = plan(&DynamicSettings::new(target)).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("bits per weight"), "{target:?}: {error}");
    }
}

/// A family's own protection and a recipe file stand above the allocation.
#[test]
fn what_is_decided_elsewhere_stays() {
    let model = demo();
    let all = measure(&model, &calibration(&model));
    let text = "[[layer]]\npath = \"*.0.mlp.down_proj\"\nkeep = true\n[[layer]]\npath = \"*.1.mlp.down_proj\"\nbits = 3";
    let base = Scheme::affine(4, 64).unwrap();
    let settings = Settings { overrides: Some(Overrides::parse(text, base).unwrap()), ..settings(64) };
    let dynamic = DynamicSettings::new(Target::BitsPerWeight(6.0));
    let made = DynamicPlan::new(&model, &settings, &all, &dynamic).unwrap();
    let report = made.plan.report();
    let scheme =
        |path: &str| report.layers.iter().find(|layer| layer.name.starts_with(path)).unwrap().scheme.clone();
    assert!(
        scheme("model.layers.0.mlp.down_proj").starts_with("BF16"),
        "{}",
        scheme("model.layers.0.mlp.down_proj")
    );
    assert!(scheme("model.layers.1.mlp.down_proj").starts_with("3 bits"));
    assert!(made.plan.bits_per_weight() <= 6.0);
}

/// Notes which phases came by.
#[derive(Default)]
struct Phases(Mutex<Vec<String>>);

impl Observer for Phases {
    fn event(&self, event: Event<'_>) {
        if let Event::Phase { name, .. } = event {
            self.0.lock().unwrap().push(name.to_owned());
        }
    }
}

/// Counts progress; the first figure says where a measurement goes on.
#[derive(Default)]
struct Progress(Mutex<Vec<u64>>);

impl Observer for Progress {
    fn event(&self, event: Event<'_>) {
        if let Event::Progress { done } = event {
            self.0.lock().unwrap().push(done);
        }
    }
}

#[test]
fn a_measurement_that_was_stopped_goes_on_where_it_was() {
    let model = demo();
    let own = calibration(&model);
    let how = SensitivitySettings { threads: 1, low_memory: true, save_seconds: 0, ..Default::default() };
    let directory = tempfile::tempdir().unwrap();
    let whole = sensitivities(&model, &own, &how, None, &Silent).unwrap();
    let file = directory.path().join("sensitivities.json");
    let stopper = Stopper(20.into());
    let stopped = sensitivities(&model, &own, &how, Some(&file), &stopper).unwrap_err();
    assert!(matches!(stopped, Error::Interrupted) && !file.exists());
    let progress = Progress::default();
    assert_eq!(sensitivities(&model, &own, &how, Some(&file), &progress).unwrap(), whole);
    let blocks = mlx_quant::walks::Walk::open(&model).unwrap().decoder.blocks.len() as u64;
    let first = progress.0.lock().unwrap()[0];
    assert!(first > 2 * blocks, "windows are measured once: {first} of {blocks} blocks");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "the figures, and nothing else");
}

#[test]
fn a_file_serves_again_and_only_for_what_it_was_made_from() {
    let model = demo();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sensitivities.json");
    let own = calibration(&model);
    let how = SensitivitySettings { seed: 3, threads: 1, ..SensitivitySettings::default() };
    let first = sensitivities(&model, &own, &how, Some(&file), &Silent).unwrap();
    let phases = Phases::default();
    let again = sensitivities(&model, &own, &how, Some(&file), &phases).unwrap();
    assert_eq!(first, again);
    assert!(phases.0.lock().unwrap().is_empty(), "nothing is measured again");
    // Threads and the number of windows at a time decide nothing.
    let two = SensitivitySettings { threads: 2, low_memory: true, ..how };
    assert_eq!(sensitivities(&model, &own, &two, None, &Silent).unwrap(), first);
    let refused = |windows: &Windows, how: &SensitivitySettings, text: &str| {
        let error = sensitivities(&model, windows, how, Some(&file), &Silent).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(text), "{error}");
    };
    let other = windows(&model, &DataSource::BuiltinCalibration, Pick::Sampled { windows: 2, seed: 9 }, 256);
    refused(&other, &how, "other calibration windows");
    refused(&own, &SensitivitySettings { seed: 4, ..how }, "another seed");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(&first.key.model, "0000")).unwrap();
    refused(&own, &how, "another model");
    std::fs::write(&file, &text[..text.len() / 2]).unwrap();
    refused(&own, &how, "sensitivities.json");
    let at = text.find("\"inputs\":[").unwrap() + 10;
    std::fs::write(&file, format!("{}-{}", &text[..at], &text[at..])).unwrap();
    refused(&own, &how, "do not fit");
    // Finite figures whose products and sums are not.
    let all = |name: &str, value: &str| {
        let mut parts = text.split(&format!("\"{name}\":[")).collect::<Vec<_>>().into_iter();
        let mut changed = parts.next().unwrap().to_owned();
        for part in parts {
            let (list, rest) = part.split_once(']').unwrap();
            let values = vec![value; list.split(',').count()].join(",");
            changed.extend(["\"", name, "\":[", &values, "]", rest]);
        }
        changed
    };
    std::fs::write(&file, all("gradients", "3e38")).unwrap();
    refused(&own, &how, "do not fit");
    let costs = text.rfind("\"kl\":").unwrap() + 5;
    for cost in ["1e308", "4e38"] {
        let end = costs + text[costs..].find('}').unwrap();
        std::fs::write(&file, format!("{}{cost}{}", &text[..costs], &text[end..])).unwrap();
        refused(&own, &how, "do not fit");
    }
    // Without costs, candidates are judged by these figures.
    let mut unjudged: serde_json::Value = serde_json::from_str(&text).unwrap();
    for layer in unjudged["layers"].as_array_mut().unwrap() {
        layer["costs"] = serde_json::json!([]);
        if !layer["table"].is_null() {
            continue;
        }
        for seen in layer["seen"].as_array_mut().unwrap() {
            for figures in ["inputs", "gradients"] {
                seen[figures].as_array_mut().unwrap().iter_mut().for_each(|value| *value = 3e38.into());
            }
        }
    }
    std::fs::write(&file, unjudged.to_string()).unwrap();
    let before = std::fs::read(&file).unwrap();
    refused(&own, &how, "is not finite");
    assert!(std::fs::read(&file).unwrap() == before, "nothing is written over it");
}

/// Every family is measured, allocated, quantized and found within its budget.
fn every_family(zoo: &Path) {
    let mut all: Vec<PathBuf> = std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("config.json").is_file());
    all.sort();
    let out = tempfile::tempdir().unwrap();
    for path in &all {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let model = open_path(path).unwrap();
        let windows = random_windows(&model, 5, 4, 40);
        let measured = measure(&model, &windows);
        // In the middle of what can be had.
        let ask = |target| DynamicPlan::new(&model, &settings(32), &measured, &DynamicSettings::new(target));
        assert!(matches!(ask(Target::BitsPerWeight(0.0)), Err(Error::Plan(_))), "{name}");
        let range = ask(Target::Divergence(1e9)).unwrap().range;
        let target = f64::midpoint(range.0, range.1);
        let made = ask(Target::BitsPerWeight(target)).unwrap();
        let bits = made.plan.language_bits_per_weight();
        let close = bits <= target + 1e-9 && bits > target - 0.1 * (range.1 - range.0);
        assert!(close, "{name}: {bits} for {target}");
        let mut how = QuantizeSettings::new("dynamic+search".parse().unwrap());
        how.columns =
            measured.layers.iter().map(|layer| (layer.path.clone(), layer.column_weights())).collect();
        let target = out.path().join(&name);
        quantize(&model, &made.plan, &windows, &target, &how, &Silent).unwrap();
        let written = open_path(&target).unwrap();
        let quality =
            evaluate(&written, Some(&model), &windows, &EvaluationSettings::default(), &Silent).unwrap();
        let kl = quality.total.against.unwrap().kl_mean;
        println!(
            "{name:<20} {bits:.3} of {:.3} to {:.3}: predicted {:.2e}, found {kl:.2e}",
            range.0, range.1, made.predicted_kl
        );
        assert!(kl < made.range_kl.0 * 2.0 + 1e-3, "{name}: {kl} {:?}", made.range_kl);
    }
}

#[test]
fn the_copied_checkpoints() {
    every_family(&fixtures().join("zoo"));
}

#[test]
fn the_seeded_checkpoints() {
    every_family(common::seeds::seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared")]
fn every_checkpoint_of_the_zoo() {
    every_family(&shared().join("zoo"));
}
