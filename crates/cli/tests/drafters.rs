//! `--mtp`: heads that predict later tokens, written beside the model by every command that writes one.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

use crate::common::{document, mlx_quant, two_blocks, weights, with_heads};

const SHORT: [&str; 6] = ["--n-samples", "3", "--sequence-length", "48", "--eval-windows", "0"];
const TRAINED: [&str; 6] = ["--iters", "2", "--batch-size", "2", "--valid-samples", "1"];

fn run(arguments: &[&str], model: &Path, out: &Path) -> Command {
    let mut run = mlx_quant();
    run.args(arguments).arg("--mtp").arg("--model").arg(model).arg("--mlx-path").arg(out);
    run
}

/// What a refused command says; exit code 2.
fn refused(run: &mut Command) -> String {
    let output = run.assert().code(2).get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_command_writes_the_same_drafter() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let model = with_heads(directory.path(), "model", |_, _| {});
    let planned = document(&mut run(&["convert", "-q", "--dry-run"], &model, &at("four")));
    assert_eq!(names(directory.path()), ["model"]);
    let made = document(&mut run(&["convert", "-q"], &model, &at("four")));
    assert_eq!(planned["drafter"], made["drafter"]);
    let drafter = weights(&at("four-mtp"));
    assert_eq!(made["drafter"]["output_bytes"], drafter.len());
    assert_eq!(made["drafter"]["model_type"], "qwen3_5_mtp");
    let config: Value =
        serde_json::from_slice(&std::fs::read(at("four-mtp").join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["quantization"]["bits"], &config["block_size"]), (&8.into(), &3.into()));
    for (name, arguments) in [
        ("awq", [&["awq"][..], &SHORT].concat()),
        ("dynamic", [&["dynamic-quant", "--target-bpw", "4.6"][..], &SHORT].concat()),
        ("search", vec!["quantize", "--recipe", "search"]),
    ] {
        let shown = run(&arguments, &model, &at(name)).assert().success().get_output().stderr.clone();
        let shown = String::from_utf8(shown).unwrap();
        assert!(shown.contains("--draft-kind mtp"), "{shown}");
        assert!(weights(&at(&format!("{name}-mtp"))) == drafter, "{name}");
        assert!(at(name).join("config.json").is_file(), "{name}");
    }
    // A student that is quantized already has no heads; the original's are taken.
    let four = at("four");
    let student = ["dwq", "--quantized-model", four.to_str().unwrap()];
    run(&[&student[..], &SHORT, &TRAINED].concat(), &model, &at("taught")).assert().success();
    assert!(weights(&at("taught-mtp")) == drafter);
}

#[test]
fn what_is_in_the_way_is_refused_before_any_work() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let model = with_heads(directory.path(), "model", |_, _| {});
    std::fs::create_dir(at("out-mtp")).unwrap();
    for arguments in [&["convert", "-q"][..], &["gptq"]] {
        let said = refused(&mut run(arguments, &model, &at("out")));
        assert!(said.contains("out-mtp"), "{said}");
        let said = refused(run(arguments, &model, &at("out")).arg("--overwrite"));
        assert!(said.contains("out-mtp") && said.contains("no model that mlx-quant wrote"), "{said}");
    }
    assert_eq!(names(directory.path()), ["model", "out-mtp"]);
    std::fs::remove_dir(at("out-mtp")).unwrap();
    run(&["convert", "-q", "--quiet"], &model, &at("out")).assert().success();
    // The drafter of a run whose model is not there yet stays; the model is made.
    std::fs::remove_dir_all(at("out")).unwrap();
    run(&["convert", "-q", "--quiet"], &model, &at("out")).assert().success();
    // Both are replaced.
    run(&["convert", "--quiet", "--overwrite"], &model, &at("out")).assert().success();
    let config = std::fs::read_to_string(at("out-mtp").join("config.json")).unwrap();
    assert!(!config.contains("quantization"), "{config}");
    assert_eq!(names(directory.path()), ["model", "out", "out-mtp"]);
}

#[test]
fn models_without_usable_heads_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let llama = two_blocks(directory.path(), "llama");
    for arguments in [&["convert", "-q"][..], &["awq"]] {
        let said = refused(&mut run(arguments, &llama, &at("out")));
        assert!(said.contains("\"llama\"") && said.contains("leave out --mtp"), "{said}");
    }
    let none =
        with_heads(directory.path(), "none", |_, shapes| shapes.retain(|name, _| !name.starts_with("mtp.")));
    let said = refused(&mut run(&["convert", "-q"], &none, &at("out")));
    assert!(said.contains("holds no multi-token-prediction heads"), "{said}");
    let said = refused(run(&["convert", "-q"], &none, &at("out")).arg("--stream"));
    assert!(said.contains("--stream"), "{said}");
    assert_eq!(names(directory.path()), ["llama", "none"]);
}

/// A model that is refused while it is read takes its drafter along.
#[test]
fn a_refused_model_leaves_no_drafter() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let model = with_heads(directory.path(), "model", |_, _| {});
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap();
    let start = 8 + length + usize::try_from(start).unwrap();
    // A NaN.
    bytes[start..start + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let said = refused(&mut run(&["convert", "-q"], &model, &at("out")));
    assert!(said.contains("model.norm.weight"), "{said}");
    assert_eq!(names(directory.path()), ["model"]);
}
