//! Every method on a graphics card, or on the software adapter of a machine that has none, beside the processor.
#![cfg(feature = "gpu")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::path::Path;

use mlx_format::Scheme;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::dynamic::{DynamicPlan, DynamicSettings, SensitivitySettings, Target, sensitivities};
use mlx_quant::learn::LearnSettings;
use mlx_quant::recipes::{Device, DeviceChoice};
use mlx_quant::{
    Evaluation, EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, Windows, evaluate,
    quantize,
};

use crate::common::{fixtures, open_path, random_windows};

const TOKENS: usize = 32;

/// The first adapter; none where there is no loader or no driver.
fn card() -> Option<Device> {
    let first = mlx_quant_engine::gpu::adapters().into_iter().next();
    let Some(adapter) = first else {
        println!(
            "skipped: no graphics adapter, not even a software one (Debian: mesa-vulkan-drivers, libvulkan1)"
        );
        return None;
    };
    println!("on {} ({})", adapter.name, adapter.kind);
    Some(DeviceChoice::Gpu(format!("gpu:{}", adapter.index)).device().unwrap())
}

fn model(name: &str, device: &Device) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap().on(device)
}

fn windows(model: &Model, seed: u64, count: usize) -> Windows {
    random_windows(model, seed, count, TOKENS)
}

/// KL to the original, measured by the processor.
fn kl(target: &Path, name: &str) -> f64 {
    let device = mlx_quant_engine::cpu();
    let (made, original) = (open_path(target).unwrap().on(&device), model(name, &device));
    measured(&made, &original).total.against.unwrap().kl_mean
}

fn measured(own: &Model, reference: &Model) -> Evaluation {
    let settings = EvaluationSettings { threads: 2, ..EvaluationSettings::default() };
    evaluate(own, Some(reference), &windows(own, 5, 6), &settings, &Silent).unwrap()
}

fn made(name: &str, device: &Device, recipe: &str, target: &Path) -> Vec<u8> {
    let model = model(name, device);
    let settings = Settings { quantize: Some(Scheme::affine(3, 32).unwrap()), ..Settings::default() };
    let calibration = windows(&model, 3, 6);
    let plan = if recipe.starts_with("dynamic") {
        let measure = SensitivitySettings { threads: 2, ..SensitivitySettings::default() };
        let found = sensitivities(&model, &calibration, &measure, None, &Silent).unwrap();
        let target = DynamicSettings::new(Target::BitsPerWeight(5.0));
        DynamicPlan::new(&model, &settings, &found, &target).unwrap().plan
    } else {
        Plan::new(&model.checkpoint, &model.config, settings).unwrap()
    };
    let dwq = DwqSettings { iterations: 4, batch_size: 3, ..DwqSettings::default() };
    let lessons = Some((windows(&model, 1, 6), windows(&model, 2, 3)));
    let recipe = recipe.parse().unwrap();
    let learn = LearnSettings { steps: 20, batch: 3, ..LearnSettings::default() };
    let settings = QuantizeSettings { threads: 2, learn, dwq, lessons, ..QuantizeSettings::new(recipe) };
    quantize(&model, &plan, &calibration, target, &settings, &Silent).unwrap();
    std::fs::read(target.join("model.safetensors")).unwrap()
}

#[test]
fn methods_are_as_good_as_on_the_processor() {
    let Some(card) = card() else { return };
    println!("{:<12}{:<12}{:>12}{:>12}", "checkpoint", "recipe", "processor", "card");
    let mut failed = Vec::new();
    for name in ["llama_tied", "qwen3_moe"] {
        for recipe in ["awq", "gptq", "dynamic+gptq", "gptq+dwq", "gptq+learn"] {
            let directory = tempfile::tempdir().unwrap();
            let at = |name: &str| directory.path().join(name);
            made(name, &mlx_quant_engine::cpu(), recipe, &at("cpu"));
            let first = made(name, &card, recipe, &at("card"));
            assert!(first == made(name, &card, recipe, &at("again")), "{name} {recipe}: other bytes");
            let (cpu, gpu) = (kl(&at("cpu"), name), kl(&at("card"), name));
            println!("{name:<12}{recipe:<12}{cpu:>12.4e}{gpu:>12.4e}");
            let near = (gpu / cpu - 1.0).abs() < 0.03;
            if !near {
                failed.push(format!("{name} {recipe}: {gpu}, {cpu} on the processor"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn it_measures_what_the_processor_measures() {
    let Some(card) = card() else { return };
    for entry in std::fs::read_dir(fixtures().join("zoo")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("made");
        let cpu = mlx_quant_engine::cpu();
        let (original, settings) = (model(&name, &cpu), Settings::default());
        let settings = Settings { quantize: Some(Scheme::affine(4, 32).unwrap()), ..settings };
        let plan = Plan::new(&original.checkpoint, &original.config, settings).unwrap();
        mlx_quant::convert(&original, &plan, &target, 2, &Silent).unwrap();
        let of = |device: &Device| {
            let found = measured(&open_path(&target).unwrap().on(device), &model(&name, device)).total;
            (found.perplexity, found.against.unwrap().kl_mean)
        };
        let (own, other) = (of(&cpu), of(&card));
        println!("{name:<12}{own:?} {other:?}");
        assert!((own.0 / other.0 - 1.0).abs() < 1e-5, "{name}: perplexity");
        assert!((own.1 / other.1 - 1.0).abs() < 1e-3, "{name}: divergence");
    }
}
