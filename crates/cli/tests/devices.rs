//! `mlx-quant devices`, and `--device` where plans and forecasts are concerned.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use assert_cmd::Command;
use mlx_quant::device::Engines;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

use crate::common::{cache, document, mlx_quant};

fn devices(arguments: &[&str]) -> Command {
    let mut run = mlx_quant();
    // Rates are kept by themselves: other tests measure too.
    run.env("XDG_CACHE_HOME", cache().join("devices"))
        .arg("devices")
        .args(["--threads", "1"])
        .args(arguments);
    run
}

/// The word for the first adapter; none where there is no loader or no driver.
fn card() -> Option<String> {
    Engines::here().adapters.into_iter().next().map(|adapter| adapter.device)
}

#[test]
fn everything_that_computes_is_listed_with_its_rate() {
    let first = document(&mut devices(&["--measure"]));
    let here = Engines::here();
    assert_eq!(first["cpu"]["name"], here.cpu.as_str());
    assert!(first["cpu"]["products"].as_f64().unwrap() > 1e8 && first["cpu"]["threads"] == 1);
    let adapters = first["adapters"].as_array().unwrap();
    assert_eq!(adapters.len(), here.adapters.len());
    for (told, adapter) in adapters.iter().zip(&here.adapters) {
        assert_eq!(told["name"], adapter.name.as_str());
        assert_eq!(told["rates"].is_null(), told["obstacle"].is_string(), "{told}");
        if let Some(rates) = told["rates"].as_object() {
            assert!(rates.values().all(|rate| rate.as_f64().unwrap() > 1e6), "{told}");
        }
    }
    assert_eq!(first["auto"], here.auto.as_str());
    // What was measured is kept.
    let rates = |document: &Value| -> Vec<Value> {
        let of = |adapter: &Value| adapter["rates"]["products"].clone();
        document["adapters"]
            .as_array()
            .unwrap()
            .iter()
            .map(of)
            .chain([document["cpu"]["products"].clone()])
            .collect()
    };
    assert_eq!(rates(&first), rates(&document(&mut devices(&[]))));
    let shown = devices(&[]).assert().success().stdout(contains("--device").and(contains("1 threads")));
    let mut shown = shown.stdout(contains(format!("--device auto takes {}", here.auto)));
    for adapter in &here.adapters {
        shown = shown.stdout(contains(&adapter.device).and(contains(&adapter.kind)));
    }
}

/// As on a machine whose driver is missing: the processor is all there is, and what to do is said.
#[test]
fn without_a_driver_the_processor_is_left() {
    let without = |arguments: &[&str]| {
        let mut run = devices(arguments);
        run.env("VK_DRIVER_FILES", "/nothing/there.json").env("VK_ICD_FILENAMES", "/nothing/there.json");
        run
    };
    if cfg!(target_vendor = "apple") {
        return;
    }
    let found = document(&mut without(&[]));
    assert!(found["adapters"].as_array().unwrap().is_empty() && found["auto"] == "cpu", "{found}");
    let why = found["no_card"].as_str().unwrap();
    let hint = if cfg!(feature = "gpu") { "libvulkan1" } else { "--features gpu" };
    assert!(why.contains("; hint: ") && why.contains(hint), "{why}");
    let mut run = mlx_quant();
    run.env("VK_DRIVER_FILES", "/nothing/there.json").env("VK_ICD_FILENAMES", "/nothing/there.json");
    run.args(["eval", "--windows", "1", "--sequence-length", "16", "--device", "gpu"]);
    run.assert().code(2).stderr(contains("--device gpu").and(contains(hint)));
}

#[test]
#[cfg_attr(not(all(feature = "gpu", feature = "demo")), ignore = "needs --features gpu,demo")]
fn plans_and_advice_know_the_card() {
    let Some(card) = card() else { return };
    let common = ["--n-samples", "2", "--sequence-length", "64", "--eval-windows", "1"];
    let plan = |device: &str| {
        let mut run = mlx_quant();
        run.args(["gptq", "--dry-run", "--device", device]).args(common);
        run
    };
    let needs = document(&mut plan(&card));
    let memory = |part: &str| needs["card_memory"][part].as_u64().unwrap();
    let parts = ["weights", "activations", "hessians", "scratch"].map(memory);
    assert_eq!(memory("peak"), parts.iter().sum::<u64>());
    assert!(document(&mut plan("cpu"))["card_memory"].is_null());
    plan(&card).assert().success().stdout(contains("card: peak memory").and(contains("up to ")));
    let advice = |device: &str| {
        let mut run = mlx_quant();
        run.args(["recommend", "--device", device, "--memory", "16GB"]);
        document(&mut run)
    };
    let (on_card, on_cpu) = (advice(&card), advice("cpu"));
    assert!(on_card["machine"]["card"]["products"].as_f64().unwrap() > 1e6, "{}", on_card["machine"]);
    assert!(on_cpu["machine"].get("card").is_none());
    let gptq = |document: &Value| {
        document["methods"].as_array().unwrap().iter().find(|one| one["method"] == "gptq").unwrap().clone()
    };
    let (own, other) = (gptq(&on_card), gptq(&on_cpu));
    assert!(own["command"].as_str().unwrap().contains(&format!("--device {card}")), "{own}");
    assert!(!other["command"].as_str().unwrap().contains("--device"), "{other}");
    assert!(own["forecast"]["card_memory"]["peak"].as_u64().unwrap() > 0);
    assert_ne!(own["forecast"]["seconds"], other["forecast"]["seconds"]);
    // What the card has no room for is no advice, and no run: as far as the driver tells.
    let large = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs/Llama-3.1-70B");
    let mut run = mlx_quant();
    run.args(["recommend", "--device", &card, "--memory", "2TB", "--time", "1000d", "--model"]).arg(large);
    let told =
        serde_json::from_slice::<Value>(&run.args(["--json", "--quiet"]).output().unwrap().stdout).unwrap();
    let adapter = Engines::here().adapters.swap_remove(0);
    let mut foreseen = 0;
    for one in told["methods"].as_array().unwrap() {
        let needs = &one["forecast"]["card_memory"];
        let (Some(peak), Some(largest)) = (needs["peak"].as_u64(), needs["largest"].as_u64()) else {
            continue;
        };
        let refused = one["obstacle"].as_str().is_some_and(|why| why.contains("the card's "));
        let fits = adapter.memory.is_none_or(|has| peak <= has) && largest <= adapter.largest_buffer;
        assert_eq!(refused, !fits, "{one}");
        foreseen += 1;
    }
    assert!(foreseen >= 4, "{told}");
}

/// A run that was begun by a card which is not here any more.
#[test]
#[cfg_attr(not(feature = "demo"), ignore = "needs --features demo")]
fn what_another_engine_began_goes_on_only_with_the_users_word() {
    let directory = tempfile::tempdir().unwrap();
    let (target, partial) = (directory.path().join("out"), directory.path().join(".out.partial"));
    let words = |more: &[&str]| {
        let mut run = mlx_quant();
        run.args([
            "gptq",
            "--n-samples",
            "6",
            "--sequence-length",
            "96",
            "--eval-windows",
            "0",
            "--mlx-path",
        ]);
        run.arg(&target).args(more);
        run
    };
    let given = words(&["--quiet"]);
    let mut first = std::process::Command::new(given.get_program());
    first.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?)))).args(given.get_args());
    let mut child = first.spawn().unwrap();
    while !partial.join(".state-2-0.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its second block");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let journal = partial.join(".mlx-quant-run");
    let own = Engines::here().cpu;
    let text = std::fs::read_to_string(&journal).unwrap();
    let (begun, now) = (format!(" computed by {own}\n"), " computed by gpu H100, vulkan, 1.2\n");
    assert_eq!(text.matches(&begun).count(), 1, "{text}");
    std::fs::write(&journal, text.replace(&begun, now)).unwrap();
    let refused = words(&[]).assert().code(2).stderr(contains("begun by gpu H100, vulkan, 1.2"));
    refused.stderr(contains(format!("now {own} would compute")).and(contains("--restart-block")));
    assert!(journal.exists() && !target.exists(), "a refusal costs nothing");
    words(&["--restart", "--restart-block"]).assert().code(2);
    let went_on = words(&["--restart-block"]).assert().success();
    let told = went_on.stderr(contains("what gpu H100, vulkan, 1.2 has finished stays"));
    let told = String::from_utf8(told.get_output().stderr.clone()).unwrap();
    assert!(told.contains("engines  gpu H100, vulkan, 1.2: "), "{told}");
    let card = std::fs::read_to_string(target.join("README.md")).unwrap();
    assert!(
        card.contains("| engine | gpu H100, vulkan, 1.2: ") && card.contains(&format!("; {own}: ")),
        "{card}"
    );
}
