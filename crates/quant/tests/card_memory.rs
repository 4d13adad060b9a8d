//! What plans say of a card's memory, beside what runs take: never less, and at most half as much again.
#![cfg(feature = "gpu")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::time::Duration;

use mlx_format::Scheme;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::dynamic::{SensitivitySettings, sensitivities};
use mlx_quant::forecast::{Machine, card_memory_of_evaluation, forecast, nominal_windows};
use mlx_quant::learn::LearnSettings;
use mlx_quant::recipes::Device;
use mlx_quant::{
    EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, Windows, evaluate, quantize,
};
use mlx_quant_engine::Engine as _;
use mlx_quant_engine::gpu::{Gpu, adapters};

use crate::common::{fixtures, open_path, random_windows};

fn windows(model: &Model, count: usize, tokens: usize) -> Windows {
    random_windows(model, count as u64, count, tokens)
}

#[cfg(feature = "demo")]
fn demo() -> Model {
    mlx_quant::open(&mlx_quant::demo()).unwrap()
}

#[cfg(not(feature = "demo"))]
fn demo() -> Model {
    open_path(&fixtures().join("zoo/llama_tied")).unwrap()
}

fn model(name: &str) -> Model {
    if name == "demo" { demo() } else { open_path(&fixtures().join("zoo").join(name)).unwrap() }
}

/// Predicted, and taken.
struct Row {
    what: String,
    predicted: u64,
    part: &'static str,
    taken: u64,
}

/// A part of a run that is foreseen and then done.
fn row(
    gpu: &Gpu,
    what: String,
    foreseen: Option<mlx_quant::forecast::CardMemory>,
    run: impl FnOnce(),
) -> Row {
    gpu.finish().unwrap();
    gpu.reset_peak();
    run();
    let taken = gpu.memory().unwrap().peak;
    let foreseen = foreseen.unwrap();
    Row { what, predicted: foreseen.peak, part: foreseen.part, taken }
}

fn rows(gpu: &Gpu, name: &str, (count, tokens): (usize, usize)) -> Vec<Row> {
    let device = Device::new(gpu.clone());
    let model = model(name).on(&device);
    let machine = Machine::quick(2, Duration::from_millis(5)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let calibration = windows(&model, count, tokens);
    let plan = Settings { quantize: Some(Scheme::affine(4, 32).unwrap()), ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    let mut all = Vec::new();
    let mut recipes = vec![
        ("gptq", false),
        ("awq", false),
        ("gptq", true),
        ("awq+gptq", false),
        ("rtn+dwq", false),
        ("gptq+learn", false),
    ];
    // The demo model is large for a software adapter, and here for its tied table.
    let whole = name != "demo";
    recipes.truncate(if whole { recipes.len() } else { 1 });
    for (recipe, low_memory) in recipes {
        let dwq = DwqSettings { iterations: 1, batch_size: 4, norms: Some(true), ..DwqSettings::default() };
        let learn = LearnSettings { steps: 3, ..LearnSettings::default() };
        let lessons = Some((windows(&model, count, tokens), windows(&model, 4, tokens)));
        let how = QuantizeSettings {
            threads: 2,
            low_memory,
            dwq,
            learn,
            lessons,
            evaluate: None,
            ..QuantizeSettings::new(recipe.parse().unwrap())
        };
        let needs = forecast(&model, &plan, &calibration, &how, false, &machine, 0).unwrap();
        let target = directory.path().join(format!("{recipe}-{low_memory}"));
        let low = if low_memory { " --low-memory" } else { "" };
        all.push(row(gpu, format!("{name} {recipe}{low}"), needs.card_memory, || {
            quantize(&model, &plan, &calibration, &target, &how, &Silent).unwrap();
        }));
    }
    if !whole {
        return all;
    }
    let dynamic = QuantizeSettings { threads: 2, ..QuantizeSettings::new("dynamic".parse().unwrap()) };
    let needs = forecast(&model, &plan, &calibration, &dynamic, false, &machine, 0).unwrap();
    all.push(row(gpu, format!("{name} sensitivities"), needs.card_memory, || {
        let measure = SensitivitySettings { threads: 2, ..SensitivitySettings::default() };
        sensitivities(&model, &calibration, &measure, None, &Silent).unwrap();
    }));
    for reference in [None, Some(&model)] {
        let how = EvaluationSettings { threads: 2, ..EvaluationSettings::default() };
        let needs = card_memory_of_evaluation(&model, reference, &calibration, &how).unwrap();
        let with = if reference.is_some() { " with a reference" } else { "" };
        all.push(row(gpu, format!("{name} evaluation{with}"), needs, || {
            evaluate(&model, reference, &calibration, &how, &Silent).unwrap();
        }));
    }
    all
}

/// The first adapter; none where there is no loader or no driver.
fn card() -> Option<Gpu> {
    let Some(adapter) = adapters().into_iter().next() else {
        println!(
            "skipped: no graphics adapter, not even a software one (Debian: mesa-vulkan-drivers, libvulkan1)"
        );
        return None;
    };
    Some(Gpu::open(&format!("gpu:{}", adapter.index).parse().unwrap()).unwrap())
}

#[test]
fn what_does_not_fit_goes_in_waves() {
    let Some(gpu) = card() else { return };
    let device = Device::new(gpu);
    let model = model("llama_tied").on(&device);
    let plan = Settings { quantize: Some(Scheme::affine(4, 32).unwrap()), ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    let machine = Machine::quick(2, Duration::from_millis(5)).unwrap();
    // 800 GB of activations.
    let windows = nominal_windows(100_000, 8192);
    let of = |low_memory| {
        let how =
            QuantizeSettings { threads: 2, low_memory, ..QuantizeSettings::new("gptq".parse().unwrap()) };
        forecast(&model, &plan, &windows, &how, false, &machine, 0).unwrap()
    };
    let (usual, low) = (of(false), of(true));
    let in_the_way = usual.card_obstacle(&device);
    assert_eq!(in_the_way.is_some(), device.capacity().unwrap().memory.is_some(), "{in_the_way:?}");
    assert_eq!(low.card_obstacle(&device), None);
    assert!(usual.card_memory.unwrap().peak > 100 * low.card_memory.unwrap().peak);
    assert_eq!(usual.card_obstacle(&mlx_quant_engine::cpu()), None);
}

#[test]
fn plans_are_upper_bounds() {
    let Some(gpu) = card() else { return };
    let mut failed = Vec::new();
    println!("{:<46}{:>12}{:>12}{:>8}", "run", "predicted", "taken", "ratio");
    for (name, sizes) in
        [("llama_tied", (12, 128)), ("qwen3_moe", (24, 96)), ("deepseek_v3", (20, 64)), ("demo", (4, 64))]
    {
        for Row { what, predicted, part, taken } in rows(&gpu, name, sizes) {
            let ratio = predicted as f64 / taken as f64;
            println!("{what:<46}{predicted:>12}{taken:>12}{ratio:>8.2}  {part}");
            if !(1.0..1.5).contains(&ratio) {
                failed.push(format!("{what}: {predicted} predicted in {part}, {taken} taken"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
