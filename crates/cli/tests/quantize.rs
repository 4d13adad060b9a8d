//! `mlx-quant quantize`, `awq` and `gptq` as people run them.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

use crate::common::{mlx_quant, two_blocks};

/// A run on the built-in model that takes a few seconds at most.
const SMALL: [&str; 4] = ["--n-samples", "6", "--sequence-length", "96"];

fn small(command: &str, target: &Path) -> Command {
    let mut run = mlx_quant();
    run.arg(command).args(SMALL).args(["--eval-windows", "0", "--mlx-path"]).arg(target);
    run
}

fn document(run: &mut Command) -> Value {
    serde_json::from_slice(&run.args(["--json", "--quiet"]).assert().success().get_output().stdout).unwrap()
}

fn weights(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

#[test]
fn writes_a_model_with_its_history() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let mut run = mlx_quant();
    run.args([
        "quantize",
        "--recipe",
        "awq+gptq",
        "--bits",
        "3",
        "--seed",
        "7",
        "--eval-windows",
        "2",
        "--mlx-path",
    ]);
    let made = document(run.arg(&target).args(SMALL));
    assert_eq!(made["recipe"], "awq+gptq");
    assert_eq!(made["calibration"]["windows"], 6);
    assert!(made["made"]["foldable"].as_u64().unwrap() > 0);
    let kl = made["made"]["evaluation"]["kl_mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.5, "{kl}");
    let config: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization"]["bits"], 3);
    // What is no linear layer falls back to six bits.
    assert_eq!(config["quantization"]["model.embed_tokens"]["bits"], 6);
    let card = std::fs::read_to_string(target.join("README.md")).unwrap();
    let hash = made["calibration"]["data_hash"].as_str().unwrap();
    for part in ["| recipe | awq+gptq |", hash, "| seed | 7 |", "KL(source, this)", "6 windows of 96 tokens"]
    {
        assert!(card.contains(part), "{part} is missing from\n{card}");
    }
    mlx_quant().args(["inspect", "--verify", "--quiet"]).arg(&target).assert().success();
}

#[test]
fn methods_lose_less_than_rounding() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let embedding = "[[layer]]\npath = \"model.embed_tokens\"\nbits = 6";
    std::fs::write(at("recipe.toml"), embedding).unwrap();
    let convert = |name: &str, more: &[&str]| {
        let mut run = mlx_quant();
        run.args(["convert", "-q", "--bits", "3", "--quiet", "--recipe-file"]).arg(at("recipe.toml"));
        run.args(more).arg("--mlx-path").arg(at(name)).assert().success();
    };
    convert("rtn", &[]);
    convert("search", &["--search"]);
    let mut same = mlx_quant();
    same.args(["quantize", "--recipe", "search", "--bits", "3", "--quiet", "--recipe-file"])
        .arg(at("recipe.toml"));
    same.arg("--mlx-path").arg(at("same")).assert().success();
    assert!(weights(&at("search")) == weights(&at("same")));
    small("awq", &at("awq")).args(["--bits", "3", "--embed-bits", "6", "--quiet"]).assert().success();
    small("gptq", &at("gptq")).args(["--bits", "3", "--quiet"]).assert().success();
    std::fs::create_dir(at("reference")).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let reference = reference(&at("reference"));
    let divergence = |name: &str| {
        let mut run = mlx_quant();
        run.args(["eval", "--windows", "4", "--sequence-length", "256", "--reference"]).arg(&reference);
        run.arg("--cache").arg(cache.path()).arg("--model").arg(at(name));
        document(&mut run)["kl_mean"].as_f64().unwrap()
    };
    let losses = ["rtn", "search", "awq", "gptq"].map(divergence);
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
}

/// The built-in model as a directory.
fn reference(directory: &Path) -> PathBuf {
    let target = directory.join("model");
    mlx_quant().args(["convert", "--quiet", "--mlx-path"]).arg(&target).assert().success();
    target
}

#[test]
fn seeds_choose_windows_and_threads_decide_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str, more: &[&str]| {
        let target = directory.path().join(name);
        small("gptq", &target).args(more).arg("--quiet").assert().success();
        weights(&target)
    };
    let first = of("first", &["--threads", "1"]);
    assert!(first == of("again", &["--threads", "2"]));
    assert!(first == of("low", &["--threads", "2", "--low-memory"]));
    assert!(first != of("seed", &["--seed", "124"]));
}

#[test]
fn killed_it_goes_on_behind_the_last_block() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    small("gptq", &at("whole")).arg("--quiet").assert().success();
    let whole = weights(&at("whole"));
    for block in [1, 3, 5] {
        let target = at(&format!("out-{block}"));
        let partial = at(&format!(".out-{block}.partial"));
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("mlx-quant"));
        child.arg("gptq").args(SMALL).args(["--quiet", "--eval-windows", "0", "--mlx-path"]).arg(&target);
        let mut child = child.spawn().unwrap();
        let reached = partial.join(format!(".state-{block}-0.safetensors"));
        let start = Instant::now();
        while !reached.exists() {
            assert!(start.elapsed() < Duration::from_secs(120), "block {block} was never reached");
            assert!(child.try_wait().unwrap().is_none(), "it was done before block {block}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!target.exists() && partial.exists());
        let made = document(&mut small("gptq", &target));
        // The block whose windows were just being stored may count or not.
        assert!(made["made"]["resumed_blocks"].as_u64().unwrap() + 1 >= block, "{}", made["made"]);
        assert!(weights(&target) == whole, "killed at block {block}");
        assert!(!partial.exists());
    }
}

#[test]
fn a_plan_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let planned = document(small("awq", &target).arg("--dry-run"));
    assert!(planned["memory"]["peak"].as_u64().unwrap() > 1 << 20);
    assert!(planned["bits_per_weight"].as_f64().unwrap() > 4.0);
    small("gptq", &target)
        .arg("--dry-run")
        .assert()
        .success()
        .stdout(contains("peak memory").and(contains("hessians")));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn statistics_serve_other_bits() {
    let directory = tempfile::tempdir().unwrap();
    let statistics = directory.path().join("statistics");
    let run = |name: &str, more: &[&str]| {
        let mut run = small("gptq", &directory.path().join(name));
        run.arg("--statistics").arg(&statistics).args(more).arg("--quiet");
        run
    };
    run("four", &[]).assert().success();
    run("three", &["--bits", "3"]).assert().success();
    run("seed", &["--seed", "5"])
        .assert()
        .code(2)
        .stderr(contains("other calibration windows").and(contains("hint:")));
    assert!(!directory.path().join("seed").exists() && !directory.path().join(".seed.partial").exists());
}

/// Exit code 2, a hint, and nothing written.
#[test]
fn refuses_what_it_cannot_do() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let short = directory.path().join("short.txt");
    std::fs::write(&short, "too short").unwrap();
    let short = short.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["quantize", "--recipe", "gptq+awq"], "awq cannot follow"),
        (&["quantize", "--recipe", "magic"], "no method"),
        (&["gptq", "--bits", "7"], "7 bits"),
        (&["gptq", "--bits", "1"], "1 bits"),
        (&["gptq", "--group-size", "48"], "group size 48"),
        (&["gptq", "--fallback-bits", "9"], "9 bits"),
        (&["gptq", "--q-mode", "nvfp4", "--bits", "8"], "nvfp4 has 4 bits"),
        (&["gptq", "--q-mode", "mxfp4", "--group-size", "64"], "mxfp4 has 4 bits"),
        (&["dwq", "--q-mode", "nvfp4"], "dwq works on affine scales"),
        (&["dynamic-quant", "--q-mode", "mxfp8"], "dynamic works on affine scales"),
        (&["quantize", "--recipe", "gptq+learn", "--q-mode", "mxfp4"], "learn works on affine scales"),
        (&["gptq", "--damping", "0"], "--damping"),
        (&["gptq", "--correction", "1.5"], "--correction"),
        (&["gptq", "--damping", "NaN"], "--damping"),
        (&["gptq", "--block-size", "0"], "block-size"),
        (&["gptq", "--device", "gpu:no-such-card"], "--device gpu:no-such-card "),
        (&["gptq", "--device", "tpu"], "--device"),
        (&["awq", "--n-grid", "0"], "n-grid"),
        (&["awq", "--sequence-length", "1"], "sequence"),
        (&["awq", "--data", short], "short.txt"),
        (&["awq", "--data", "/nonexistent"], "/nonexistent"),
        (&["awq", "--upload-repo", "a/b"], "upload"),
        (&["awq", "--model", "nobody/nothing"], "nobody/nothing"),
        (&["awq", "--recipe-file", "/nonexistent"], "/nonexistent"),
    ];
    for (arguments, text) in cases {
        let mut run = mlx_quant();
        run.args(*arguments).arg("--mlx-path").arg(&target).assert().code(2).stderr(contains(*text));
        assert!(!target.exists() && !directory.path().join(".out.partial").exists(), "{arguments:?}");
    }
    std::fs::create_dir(&target).unwrap();
    mlx_quant().args(["gptq", "--mlx-path"]).arg(&target).assert().code(2).stderr(contains("hint:"));
}

/// An fp mode goes to every layer, embeddings and head too, and the model says so.
#[test]
fn rounds_to_fp_modes() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let mut run = small("gptq", &target);
    let found = document(run.args(["--q-mode", "nvfp4"]));
    assert!(found["made"]["folded"].as_u64().unwrap() > 0, "{found}");
    let config: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    let own = &config["quantization"];
    assert_eq!((own["mode"].as_str(), own["group_size"].as_u64()), (Some("nvfp4"), Some(16)));
    assert!(own.as_object().unwrap().len() == 3, "no layer has an entry of its own: {own}");
    let mut verify = mlx_quant();
    verify.arg("inspect").arg(&target).args(["--verify", "--quiet"]).assert().success();
    let other = directory.path().join("other");
    let mut run = small("gptq", &other);
    run.args(["--q-mode", "nvfp4", "--fallback-bits", "8", "--quiet"]).assert().success();
    let config: Value = serde_json::from_slice(&std::fs::read(other.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization"]["model.embed_tokens"]["bits"], 8, "{config}");
}

#[test]
fn answers_to_mlx_lm_names() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["mlx_lm.awq", "mlx_lm.gptq"] {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(assert_cmd::cargo::cargo_bin!("mlx-quant"), &link).unwrap();
        let mut run = Command::new(&link);
        run.args(["--bits", "4", "--num-samples", "2", "--max-seq-length", "64", "--dry-run"]);
        run.assert().success().stdout(contains("calibration      2 windows of 64 tokens"));
    }
}

#[test]
fn an_unfinished_run_tells_its_command_and_begins_anew_where_it_is_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let partial = directory.path().join(".my out.partial");
    let given = mlx_quant();
    let mut first = std::process::Command::new(given.get_program());
    first.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
    first.args(["gptq", "--quiet", "--eval-windows", "0", "--mlx-path", "my out"]).args(SMALL);
    let mut child = first.current_dir(directory.path()).spawn().unwrap();
    while !partial.join(".state-2-0.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its second block");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let other = |flags: &[&str], place: &Path| {
        let mut run = mlx_quant();
        run.args(["awq", "--eval-windows", "0", "--mlx-path"]).arg(directory.path().join("my out"));
        run.args(SMALL).args(flags).current_dir(place).assert()
    };
    let program = given.get_program().to_str().unwrap();
    let line = format!(
        "{program} gptq --quiet --eval-windows 0 --mlx-path 'my out' --n-samples 6 --sequence-length 96"
    );
    let refused = other(&[], directory.path()).code(2);
    refused.stderr(contains("--restart").and(contains(format!("go on with it: {line}\n"))));
    // From elsewhere the line says where.
    let there = format!("go on with it: cd '{}' && {line}\n", directory.path().display());
    let hint = String::from_utf8(
        other(&[], Path::new("/")).code(2).stderr(contains(&there)).get_output().stderr.clone(),
    );
    assert!(partial.join(".state-2-0.safetensors").exists(), "a refusal costs nothing");
    // It can be pasted as it stands.
    let hint = hint.unwrap();
    let pasted = hint.rsplit_once("go on with it: ").unwrap().1.trim();
    let mut shell = std::process::Command::new("sh");
    shell.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
    assert!(shell.args(["-c", pasted]).status().unwrap().success());
    assert!(directory.path().join("my out/config.json").exists() && !partial.exists());
    // Another unfinished run, which nobody wants any more.
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join(".mlx-quant-run"), "mlx-quant of another time\n0\n").unwrap();
    std::fs::write(partial.join(".state-0-0.safetensors"), "x").unwrap();
    std::fs::remove_dir_all(directory.path().join("my out")).unwrap();
    other(&["--restart"], directory.path()).success();
    let mut alone = small("awq", &directory.path().join("alone"));
    alone.assert().success();
    assert!(weights(&directory.path().join("my out")) == weights(&directory.path().join("alone")));
    assert!(!partial.exists());
}

#[test]
fn an_output_is_replaced_once_the_new_model_is_finished() {
    let (directory, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = two_blocks(source.path(), "model");
    let small = |command: &str, target: &Path| {
        let mut run = small(command, target);
        run.arg("--model").arg(&model);
        run
    };
    let at = |name: &str| directory.path().join(name);
    let names = || {
        let names = std::fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<String> =
            names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    small("gptq", &at("out")).assert().success();
    let old = weights(&at("out"));
    small("awq", &at("out")).assert().code(2).stderr(contains("already exists").and(contains("--overwrite")));
    // Whatever is refused leaves it as it was.
    small("awq", &at("out")).args(["--overwrite", "--bits", "7"]).assert().code(2);
    std::fs::write(at("out").join("notes.txt"), "mine").unwrap();
    let kept = small("awq", &at("out")).arg("--overwrite").assert().code(2);
    kept.stderr(contains("notes.txt").and(contains("hint: ")));
    std::fs::remove_file(at("out").join("notes.txt")).unwrap();
    let mut decode = mlx_quant();
    decode.args(["convert", "-d", "--overwrite", "--model"]).arg(at("out")).arg("--mlx-path").arg(at("out"));
    decode.assert().code(2).stderr(contains("it is the model that is read"));
    assert!(weights(&at("out")) == old);
    // While the new one is made the old one is there, whole.
    let given = mlx_quant();
    let mut run = std::process::Command::new(given.get_program());
    run.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
    run.args(["awq", "--overwrite", "--quiet", "--eval-windows", "0", "--mlx-path"])
        .arg(at("out"))
        .args(SMALL);
    run.arg("--model").arg(&model);
    let mut child = run.spawn().unwrap();
    while !at(".out.partial/.state-1-0.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its first block");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(weights(&at("out")) == old && at("out/README.md").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(weights(&at("out")) == old);
    // It goes on where it was.
    small("awq", &at("out")).arg("--overwrite").assert().success();
    small("awq", &at("alone")).assert().success();
    assert!(weights(&at("out")) == weights(&at("alone")) && weights(&at("out")) != old);
    assert_eq!(names(), ["alone", "out"]);
    // A directory that nobody here wrote stays, and so does what a link leads to.
    std::fs::create_dir(at("photos")).unwrap();
    small("awq", &at("photos"))
        .arg("--overwrite")
        .assert()
        .code(2)
        .stderr(contains("no model that mlx-quant wrote"));
    std::os::unix::fs::symlink(at("alone"), at("link")).unwrap();
    small("awq", &at("link")).arg("--overwrite").assert().code(2).stderr(contains("it is no directory"));
    assert_eq!(names(), ["alone", "link", "out", "photos"]);
}

#[test]
fn equal_layers_are_one_line_of_a_plan() {
    let plan = |flags: &[&str]| {
        let mut run = mlx_quant();
        let shown = run.args(["gptq", "--dry-run"]).args(SMALL).args(flags).assert().success();
        String::from_utf8(shown.get_output().stdout.clone()).unwrap()
    };
    let text = plan(&[]);
    let layers: Vec<&str> = text.lines().filter(|line| line.contains("mlp.up_proj")).collect();
    assert_eq!(layers.len(), 1, "{text}");
    assert!(layers[0].contains("model.layers.{0-7}.mlp.up_proj") && layers[0].ends_with("885 kB"), "{text}");
    assert!(!text.contains(" bytes"), "{text}");
    assert_eq!(plan(&["--verbose"]).lines().filter(|line| line.contains("mlp.up_proj")).count(), 8);
}
