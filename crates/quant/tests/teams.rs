//! Several devices that compute one model together write what one of them writes.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and says what it skips")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use mlx_format::Scheme;
use mlx_quant::observer::{Event, Observer};
use mlx_quant::recipes::{Device, Precision};
use mlx_quant::{
    Error, EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, evaluate, quantize,
};

use crate::common::{fixtures, open_path, random_windows};

/// Chunks of windows for three members, and one that is not whole.
const WINDOWS: usize = 37;
const TOKENS: usize = 24;

fn model(name: &str, devices: &[Device]) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap().on_all(devices)
}

fn cpus(count: usize) -> Vec<Device> {
    vec![mlx_quant_engine::cpu(); count]
}

/// Stops behind so many blocks.
struct StopsAt(u64, AtomicU64);

impl Observer for StopsAt {
    fn event(&self, event: Event<'_>) {
        if let Event::Progress { done } = event {
            self.1.fetch_max(done, Ordering::SeqCst);
        }
    }

    fn cancelled(&self) -> bool {
        self.1.load(Ordering::SeqCst) >= self.0
    }
}

fn settings(recipe: &str, low_memory: bool) -> QuantizeSettings {
    let mut settings = QuantizeSettings::new(recipe.parse().unwrap());
    (settings.threads, settings.low_memory, settings.save_seconds) = (2, low_memory, 0);
    settings
}

fn run(
    model: &Model,
    settings: &QuantizeSettings,
    target: &Path,
    observer: &dyn Observer,
) -> Result<(), Error> {
    let plan = Settings { quantize: Some(Scheme::affine(3, 32).unwrap()), ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    let windows = random_windows(model, 7, WINDOWS, TOKENS);
    quantize(model, &plan, &windows, target, settings, observer).map(drop)
}

/// All files but the card, which tells how long it took.
fn files(target: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(target).unwrap().map(|entry| entry.unwrap());
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).filter(|(name, _)| name != "README.md").collect()
}

fn made(name: &str, devices: &[Device], recipe: &str, low_memory: bool) -> BTreeMap<String, Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    run(&model(name, devices), &settings(recipe, low_memory), &target, &Silent).unwrap();
    files(&target)
}

#[test]
fn several_processors_write_what_one_writes() {
    for (name, recipe, low_memory) in [
        ("llama_tied", "gptq", false),
        ("llama_tied", "awq+gptq", true),
        ("qwen3_moe", "awq+gptq", false),
        ("qwen3_moe", "refine", true),
        ("deepseek_v3", "awq", false),
        ("gpt_oss", "gptq", false),
        ("qwen3_5", "awq+gptq", false),
        ("gpt2", "gptq", true),
    ] {
        let alone = made(name, &cpus(1), recipe, low_memory);
        for count in [2, 3] {
            let together = made(name, &cpus(count), recipe, low_memory);
            assert!(alone == together, "{name} {recipe} on {count}");
        }
    }
}

/// What a member stopped with is kept whatever the number of members that go on.
#[test]
fn a_run_goes_on_with_another_number_of_devices() {
    for (name, low_memory) in [("llama_tied", false), ("qwen3_moe", true)] {
        let alone = made(name, &cpus(1), "gptq", low_memory);
        for (before, after) in [(1, 2), (3, 1), (2, 3)] {
            let directory = tempfile::tempdir().unwrap();
            let target = directory.path().join("out");
            let settings = settings("gptq", low_memory);
            let stops = StopsAt(1, AtomicU64::new(0));
            let stopped = run(&model(name, &cpus(before)), &settings, &target, &stops);
            assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
            run(&model(name, &cpus(after)), &settings, &target, &Silent).unwrap();
            assert!(files(&target) == alone, "{name}: {before}, then {after}");
        }
    }
}

#[test]
fn several_processors_measure_what_one_measures() {
    let measured = |devices: &[Device]| {
        let (own, reference) = (model("qwen3_moe", devices), model("qwen3_moe", devices));
        let windows = random_windows(&own, 9, WINDOWS, TOKENS);
        let settings = EvaluationSettings { threads: 2, ..EvaluationSettings::default() };
        let beside = evaluate(&own, Some(&reference), &windows, &settings, &Silent).unwrap().total;
        (beside, evaluate(&own, None, &windows, &settings, &Silent).unwrap().total)
    };
    let alone = measured(&cpus(1));
    assert_eq!(alone, measured(&cpus(2)));
    assert_eq!(alone, measured(&cpus(5)));
}

/// What is not shared out is refused before any work.
#[test]
fn what_computes_on_one_device_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let own = model("llama_tied", &cpus(2));
    let refused = |settings: &QuantizeSettings| {
        let error = run(&own, settings, &target, &Silent).unwrap_err();
        assert!(error.is_refusal() && !target.exists(), "{error}");
        error.to_string()
    };
    assert!(refused(&settings("gptq+learn", false)).starts_with("learn computes on one device"));
    let statistics = Some(directory.path().join("statistics"));
    let refusal = refused(&QuantizeSettings { statistics, ..settings("gptq", false) });
    assert!(refusal.starts_with("--statistics computes on one device; hint: "), "{refusal}");
    let cache = Some(directory.path().join("cache"));
    let settings = EvaluationSettings { threads: 2, cache, ..EvaluationSettings::default() };
    let windows = random_windows(&own, 9, 4, TOKENS);
    let error = evaluate(&own, Some(&own), &windows, &settings, &Silent).unwrap_err();
    assert!(error.to_string().contains("--cache computes on one device"), "{error}");
}

#[test]
fn several_devices_are_chosen_by_a_list() {
    use mlx_quant::recipes::DeviceChoice;
    let choice = |text: &str| text.parse::<DeviceChoice>();
    assert_eq!(choice("cpu,cpu").unwrap().devices_with(Precision::Float32).unwrap().len(), 2);
    assert_eq!(choice("gpu:0,gpu:1").unwrap().to_string(), "gpu:0,gpu:1");
    assert_eq!(choice("gpu:all").unwrap(), DeviceChoice::All);
    for wrong in ["cpu,", "auto,cpu", "gpu:all,cpu", ","] {
        assert!(choice(wrong).is_err(), "{wrong}");
    }
    let error = choice("cpu,cpu").unwrap().device().unwrap_err().to_string();
    assert!(error.contains("names several devices") && error.contains("; hint: "), "{error}");
}

/// Two handles of one adapter are two devices.
#[cfg(feature = "gpu")]
#[test]
fn two_cards_write_what_one_writes() {
    use mlx_quant::recipes::DeviceChoice;
    let Some(adapter) = mlx_quant_engine::gpu::adapters().into_iter().next() else {
        println!(
            "skipped: no graphics adapter, not even a software one (Debian: mesa-vulkan-drivers, libvulkan1)"
        );
        return;
    };
    let choice = |text: String| text.parse::<DeviceChoice>().unwrap().devices_with(Precision::Float32);
    let gpu = format!("gpu:{}", adapter.index);
    let (one, two) = (choice(gpu.clone()).unwrap(), choice(format!("{gpu},{gpu}")).unwrap());
    assert!(choice(format!("{gpu},cpu")).unwrap_err().to_string().contains("devices of different kinds"));
    for (name, recipe) in [("llama_tied", "gptq"), ("qwen3_moe", "awq+gptq")] {
        assert!(made(name, &one, recipe, false) == made(name, &two, recipe, false), "{name} {recipe}");
    }
}
