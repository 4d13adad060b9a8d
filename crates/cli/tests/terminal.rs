//! What people see: quiet where nobody looks, no colours where they are not wanted.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use predicates::prelude::*;
use predicates::str::contains;

use crate::common::mlx_quant;

const SMALL: [&str; 6] = ["--n-samples", "4", "--sequence-length", "64", "--eval-windows", "1"];

/// Neither escapes nor carriage returns.
fn plain(bytes: &[u8]) -> String {
    assert!(
        bytes.iter().all(|byte| *byte == b'\n' || *byte >= b' '),
        "control characters in {:?}",
        String::from_utf8_lossy(bytes)
    );
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_file_gets_no_control_characters() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["gptq", "--mlx-path"]).arg(directory.path().join("out")).args(SMALL);
    let made = run.assert().success();
    let said = plain(&made.get_output().stderr);
    assert_eq!(said.lines().count(), 3, "what is quantized, embeddings, and what was made: {said}");
    assert!(plain(&made.get_output().stdout).is_empty());
    // Not even where colours are asked for by force elsewhere.
    let mut refused = mlx_quant();
    let refused = refused.args(["eval", "--model", "/nonexistent"]).env("NO_COLOR", "1").assert().code(2);
    let text = plain(&refused.get_output().stderr);
    assert!(text.starts_with("model    /nonexistent\nerror: ") && text.contains("\nhint: "), "{text}");
}

#[test]
fn colours_are_asked_for() {
    let run = |variables: &[(&str, &str)]| {
        let mut run = mlx_quant();
        run.args(["eval", "--model", "/nonexistent"]).envs(variables.iter().copied());
        String::from_utf8(run.assert().code(2).get_output().stderr.clone()).unwrap()
    };
    assert!(run(&[("CLICOLOR_FORCE", "1")]).contains("\u{1b}["));
    assert!(!run(&[("NO_COLOR", "1")]).contains('\u{1b}'));
    assert!(!run(&[]).contains('\u{1b}'), "stderr is no terminal");
}

#[test]
fn verbose_says_what_each_block_gained() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["gptq", "--verbose", "--mlx-path"]).arg(directory.path().join("out")).args(SMALL);
    let made = run.assert().success();
    let text = plain(&made.get_output().stderr);
    let ratios: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_suffix(" of round-to-nearest's")?.rsplit_once(", ")?.1.parse().ok())
        .collect();
    assert_eq!(ratios.len(), 8, "{text}");
    assert!(ratios.iter().all(|ratio| *ratio > 0.0 && *ratio < 1.0), "{ratios:?}");
    assert!(text.contains("model.layers.7: output error"));
    // The same bytes as without anybody looking.
    let mut quiet = mlx_quant();
    quiet
        .args(["gptq", "--quiet", "--mlx-path"])
        .arg(directory.path().join("quiet"))
        .args(SMALL)
        .assert()
        .success();
    let weights = |name: &str| std::fs::read(directory.path().join(name).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("quiet"));
}

#[test]
fn quiet_is_quiet_and_json_is_one_document() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["convert", "-q", "--quiet", "--mlx-path"]).arg(directory.path().join("out"));
    run.assert().success().stdout("").stderr("");
    let mut json = mlx_quant();
    json.args(["inspect", "--json", "--quiet"]).arg(directory.path().join("out"));
    let made = json.assert().success().stderr("");
    serde_json::from_slice::<serde_json::Value>(&made.get_output().stdout).unwrap();
    mlx_quant()
        .args(["convert", "--quiet", "--verbose"])
        .assert()
        .code(2)
        .stderr(contains("cannot be used with"));
    mlx_quant().assert().code(2).stderr(contains("Usage:").or(contains("Examples:")));
}
