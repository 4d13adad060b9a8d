//! `mlx-quant dynamic-quant` and `dwq` as people run them.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

use crate::common::mlx_quant;

/// A run on the built-in model that takes a few seconds at most.
const SMALL: [&str; 6] = ["--n-samples", "4", "--sequence-length", "64", "--eval-windows", "0"];

fn small(command: &str, target: &Path) -> Command {
    let mut run = mlx_quant();
    run.arg(command).args(SMALL).arg("--mlx-path").arg(target);
    run
}

fn document(run: &mut Command) -> Value {
    serde_json::from_slice(&run.args(["--json", "--quiet"]).assert().success().get_output().stdout).unwrap()
}

fn weights(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

#[test]
fn dynamic_spends_what_it_is_given() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let file = at("sensitivities.json");
    let made = document(
        small("dynamic-quant", &at("out")).args(["--target-bpw", "4.5", "--sensitivities"]).arg(&file),
    );
    let bits = made["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 4.5 && bits > 4.48, "{bits}");
    assert!(made["schemes"].as_object().unwrap().len() > 3, "{}", made["schemes"]);
    let config: Value =
        serde_json::from_slice(&std::fs::read(at("out").join("config.json")).unwrap()).unwrap();
    assert!(config["quantization"]["model.layers.0.self_attn.v_proj"]["bits"].is_u64());
    mlx_quant().args(["inspect", "--verify", "--quiet"]).arg(at("out")).assert().success();
    let known: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(known["layers"].as_array().unwrap().len(), 57);
    // Another size and an alias; and what is read is what was measured.
    let mut again = small("dynamic_quant", &at("again"));
    again.args(["--target-bpw", "4.5", "--threads", "1", "--quiet", "--sensitivities"]).arg(&file);
    again.assert().success();
    assert!(weights(&at("out")) == weights(&at("again")));
    let planned = document(
        small("dynamic-quant", &at("none"))
            .args(["--target-size", "3.5MB", "--dry-run", "--sensitivities"])
            .arg(&file),
    );
    assert!(planned["bits_per_weight"].as_f64().unwrap() < 3.6);
    assert!(!at("none").exists());
    small("dynamic-quant", &at("none"))
        .args(["--target-bpw", "1.5", "--sensitivities"])
        .arg(&file)
        .assert()
        .code(2)
        .stderr(contains("2.258 to 9.004 bits per weight").and(contains("hint:")));
    small("dynamic-quant", &at("none"))
        .args(["--seed", "5", "--sensitivities"])
        .arg(&file)
        .assert()
        .code(2)
        .stderr(contains("sensitivities.json").and(contains("hint:")));
    let within = at("none").join("s.json");
    let mut run = small("dynamic-quant", &at("none"));
    run.arg("--sensitivities").arg(within).assert().code(2).stderr(contains("output directory"));
    // A dry run measures nothing and writes nothing.
    let planned =
        document(small("dynamic-quant", &at("none")).args(["--dry-run", "--sensitivities"]).arg(at("new")));
    assert!(planned["sensitivities_memory"]["peak"].as_u64().unwrap() > 1 << 20);
    assert!(!at("none").exists() && !at(".none.partial").exists() && !at("new").exists());
}

/// The smallest model whose measured divergence is below what was asked, and nothing else, is left.
#[test]
fn a_divergence_can_be_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let mut run = mlx_quant();
    run.args(["quantize", "--recipe", "dynamic+search", "--n-samples", "4", "--sequence-length", "64"]);
    let made = document(run.args(["--target-kl", "0.08", "--mlx-path"]).arg(&target));
    let kl = made["made"]["evaluation"]["kl_mean"].as_f64().unwrap();
    assert!(kl <= 0.08 && kl > 0.06, "{kl}");
    let names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["out"]);
}

/// Two searches into one output: the second is told so before any work, and takes nothing from the first.
#[test]
fn a_search_under_way_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let tried = directory.path().join(".out.try-0");
    std::fs::create_dir(&tried).unwrap();
    let lock = std::fs::File::create(directory.path().join(".out.lock")).unwrap();
    lock.lock().unwrap();
    let search = || {
        let mut run = small("dynamic-quant", &target);
        run.args(["--target-kl", "5"]);
        run
    };
    search()
        .assert()
        .code(2)
        .stderr(contains("out is being written by another process").and(contains("hint:")));
    assert!(tried.exists() && !target.exists());
    drop(lock);
    // What that one would have left, had it been killed, goes.
    search().assert().success();
    let names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["out"]);
}

#[test]
fn dwq_learns_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let train = ["--iters", "6", "--batch-size", "2", "--valid-samples", "2", "--bits", "3"];
    let made = document(small("dwq", &at("out")).args(train));
    let distilled = &made["made"]["distilled"];
    assert!(distilled["best_kl"].as_f64().unwrap() < distilled["start_kl"].as_f64().unwrap(), "{distilled}");
    assert_eq!(distilled["steps"], 6);
    let card = std::fs::read_to_string(at("out").join("README.md")).unwrap();
    assert!(card.contains("| recipe | dwq |") && card.contains("| dwq |"), "{card}");
    mlx_quant().args(["inspect", "--verify", "--quiet"]).arg(at("out")).assert().success();
    // From an MLX model, with targets that were made before.
    small("gptq", &at("student")).args(["--bits", "3", "--quiet"]).assert().success();
    let targets = at("targets");
    small("dwq", &at("none"))
        .args(train)
        .args(["--targets-only", "--target-dir"])
        .arg(&targets)
        .assert()
        .success();
    let mut run = small("dwq", &at("second"));
    run.args(train).arg("--target-dir").arg(&targets).arg("--quantized-model").arg(at("student"));
    let made = document(&mut run);
    let distilled = &made["made"]["distilled"];
    assert!(distilled["best_kl"].as_f64().unwrap() < distilled["start_kl"].as_f64().unwrap(), "{distilled}");
    let config = |name: &str| std::fs::read(at(name).join("config.json")).unwrap();
    assert_eq!(config("second"), config("student"));
    let mut other = small("dwq", &at("third"));
    other.args(train).args(["--seed", "9", "--target-dir"]).arg(&targets);
    other.assert().code(2).stderr(contains("of other data").and(contains("hint:")));
    assert!(!at("third").exists() && !at(".third.partial").exists());
}

#[test]
fn killed_it_learns_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let train = ["--recipe", "gptq+dwq", "--iters", "45", "--batch-size", "1", "--valid-samples", "2"];
    small("quantize", &at("whole")).args(train).arg("--quiet").assert().success();
    let whole = weights(&at("whole"));
    for (name, delay) in [("first", 0), ("later", 400)] {
        let target = at(name);
        let state = at(&format!(".{name}.partial/.state-dwq.safetensors"));
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("mlx-quant"));
        child.arg("quantize").args(SMALL).args(train).args(["--quiet", "--mlx-path"]).arg(&target);
        let mut child = child.spawn().unwrap();
        let start = Instant::now();
        while !state.exists() {
            assert!(start.elapsed() < Duration::from_secs(240), "training never began");
            assert!(child.try_wait().unwrap().is_none(), "it was done before it was killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!target.exists());
        small("quantize", &target).args(train).arg("--quiet").assert().success();
        assert!(weights(&target) == whole, "{name}");
    }
}

/// Exit code 2, a hint, and nothing written.
#[test]
fn refuses_what_it_cannot_do() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let cases: &[(&[&str], &str)] = &[
        (&["quantize", "--recipe", "dwq+gptq"], "gptq cannot follow"),
        (&["quantize", "--recipe", "awq+dynamic"], "dynamic cannot follow"),
        (&["dynamic-quant", "--target-bpw", "NaN"], "NaN"),
        (&["dynamic-quant", "--min-bits", "7"], "--min-bits 7"),
        (&["dynamic-quant", "--low-bits", "6", "--high-bits", "3"], "--min-bits 6"),
        (&["dynamic-quant", "--target-size", "3 apples"], "apples"),
        (&["dynamic-quant", "--target-size", "3GB", "--target-kl", "1"], "cannot be used with"),
        (&["dynamic-quant", "--target-kl=-1"], "KL of -1"),
        (&["quantize", "--recipe", "gptq", "--target-bpw", "4"], "--target-bpw belongs to dynamic"),
        (&["quantize", "--recipe", "gptq", "--target-dir", "x"], "--target-dir belongs to dwq"),
        (&["quantize", "--recipe", "gptq", "--learn-steps", "9"], "--learn-steps belongs to learn"),
        (&["quantize", "--recipe", "dwq", "--learn-batch", "9"], "--learn-batch belongs to learn"),
        (
            &["quantize", "--recipe", "gptq+learn", "--statistics", "x"],
            "--statistics spares windows the way through the blocks",
        ),
        (&["dwq", "--quantized-model", "x", "--dtype", "float16"], "--dtype has no meaning"),
        (&["dwq", "--bits", "8"], "nothing in this plan can be trained"),
        (&["dwq", "--learning-rate=-1"], "--learning-rate"),
        (&["dwq", "--learning-rate", "NaN"], "--learning-rate"),
        (&["dwq", "--temperature", "0"], "--temperature"),
        (&["dwq", "--batch-size", "0"], "batch-size"),
        (&["dwq", "--valid-samples", "0"], "--valid-samples"),
        (&["dwq", "--quantized-model", "/nonexistent"], "/nonexistent"),
        (&["dwq", "--targets-only"], "--target-dir"),
    ];
    for (arguments, text) in cases {
        let mut run = mlx_quant();
        run.args(*arguments).args(["--n-samples", "2", "--sequence-length", "32", "--mlx-path"]).arg(&target);
        run.assert().code(2).stderr(contains(*text));
        assert!(!target.exists() && !directory.path().join(".out.partial").exists(), "{arguments:?}");
    }
}

#[test]
fn answers_to_mlx_lm_names() {
    let directory = tempfile::tempdir().unwrap();
    for (name, flags) in [
        ("mlx_lm.dwq", &["--bits", "4", "--learning-rate", "1e-6", "--grad-checkpoint"][..]),
        ("mlx_lm.dynamic_quant", &["--low-bits", "4", "--high-bits", "5", "--target-bpw", "5.0"]),
    ] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(assert_cmd::cargo::cargo_bin!("mlx-quant"), &link).unwrap();
        let mut run = Command::new(&link);
        run.args(flags).args(["--num-samples", "2", "--max-seq-length", "64", "--dry-run"]);
        run.assert().success().stdout(contains("calibration      2 windows of 64 tokens"));
    }
}
