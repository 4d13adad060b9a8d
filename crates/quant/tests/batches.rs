//! Windows that are computed as one tensor: what an engine for cards asks for, tried on the processor.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::path::Path;

use mlx_format::Scheme;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::dynamic::{Sensitivities, SensitivitySettings, sensitivities};
use mlx_quant::{
    EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, Windows, evaluate, quantize,
};
use mlx_quant_engine::{Cpu, Device};

use crate::common::{fixtures, open_path, random_windows};

/// More than a chunk of 16, and no whole number of batches.
const WINDOWS: usize = 18;
const TOKENS: usize = 24;

fn model(name: &str, batch: usize) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap().on(&Device::new(Cpu::in_batches(batch)))
}

fn windows(model: &Model, seed: u64) -> Windows {
    random_windows(model, seed, WINDOWS, TOKENS)
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures().join("zoo")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The bytes that a stacked recipe writes.
fn made(model: &Model, threads: usize, low_memory: bool, target: &Path) -> Vec<u8> {
    let scheme = Some(Scheme::affine(3, 32).unwrap());
    let plan = Settings { quantize: scheme, ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    let dwq = DwqSettings { iterations: 3, batch_size: 6, ..DwqSettings::default() };
    let lessons = Some((windows(model, 1), windows(model, 2)));
    let recipe = "awq+gptq+dwq".parse().unwrap();
    let settings = QuantizeSettings { threads, low_memory, dwq, lessons, ..QuantizeSettings::new(recipe) };
    quantize(model, &plan, &windows(model, 3), target, &settings, &Silent).unwrap();
    std::fs::read(target.join("model.safetensors")).unwrap()
}

fn measured(model: &Model, threads: usize) -> Sensitivities {
    let settings = SensitivitySettings { threads, ..SensitivitySettings::default() };
    sensitivities(model, &windows(model, 4), &settings, None, &Silent).unwrap()
}

/// A window in a batch is computed as it is alone, so that only sums over windows know of batches.
#[test]
fn what_is_measured_does_not_depend_on_batches() {
    for name in names() {
        let of = |batch| {
            let (own, reference) = (model(&name, batch), model(&name, batch));
            let settings = EvaluationSettings { threads: 2, ..EvaluationSettings::default() };
            evaluate(&own, Some(&reference), &windows(&own, 5), &settings, &Silent).unwrap()
        };
        let (alone, together) = (of(1), of(4));
        assert_eq!(alone.total, together.total, "{name}");
    }
}

/// Threads and memory decide nothing where windows come in batches; batches change no more than the order of sums.
#[test]
fn batches_begin_where_they_begin_for_all() {
    println!("{:<16}{:>12}{:>12}{:>16}", "checkpoint", "KL", "alone", "sensitivities");
    for name in names() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let together = model(&name, 4);
        let first = made(&together, 1, false, &at("a"));
        assert!(first == made(&together, 3, false, &at("b")), "{name}: threads");
        assert!(first == made(&together, 2, true, &at("c")), "{name}: low memory");
        made(&model(&name, 1), 2, false, &at("d"));
        let kl = |directory: &Path| {
            let (made, settings) = (open_path(directory).unwrap(), EvaluationSettings::default());
            let found = evaluate(&made, Some(&together), &windows(&together, 5), &settings, &Silent).unwrap();
            found.total.against.unwrap().kl_mean
        };
        let (kl, kl_alone) = (kl(&at("a")), kl(&at("d")));

        let (one, three) = (measured(&together, 1), measured(&together, 3));
        assert_eq!(one, three, "{name}: threads");
        let alone = measured(&model(&name, 1), 2);
        let mut largest = 0f64;
        for (a, b) in one.layers.iter().zip(&alone.layers) {
            assert!(!a.costs.is_empty());
            for (a, b) in a.costs.iter().zip(&b.costs) {
                largest = largest.max((a.kl - b.kl).abs() / b.kl.abs().max(1e-12));
            }
        }
        println!("{name:<16}{kl:>12.3e}{kl_alone:>12.3e}{largest:>16.1e}");
        assert!((kl / kl_alone - 1.0).abs() < 0.03 && largest < 1e-5, "{name}: {kl}, {kl_alone}, {largest}");
    }
}
