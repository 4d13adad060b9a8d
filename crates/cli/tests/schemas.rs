//! What `--json` prints is what the committed schemas say.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::common::{dense, document, mlx_quant, two_blocks, with_heads};

fn validator(name: &str) -> Validator {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas").join(format!("{name}.schema.json"));
    let schema: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

fn check(schema: &str, document: &Value) {
    let problems: Vec<String> =
        validator(schema).iter_errors(document).map(|error| error.to_string()).collect();
    assert!(problems.is_empty(), "{schema}: {problems:#?}");
}

const CALIBRATED: [&str; 6] = ["--n-samples", "3", "--sequence-length", "48", "--eval-windows", "2"];
const TRAINED: [&str; 6] = ["--iters", "2", "--batch-size", "2", "--valid-samples", "1"];

#[test]
fn conversions_and_inspections() {
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let mut run = mlx_quant();
        run.args(["convert", "--mlx-path"]).arg(directory.path().join(name)).args(more);
        document(&mut run)
    };
    check("convert", &run("dense", &[]));
    check("convert", &run("four", &["-q"]));
    check("convert", &run("plan", &["-q", "--dry-run", "--q-mode", "mxfp4"]));
    let heads = with_heads(directory.path(), "heads", |_, _| {});
    let heads = ["-q", "--mtp", "--model", heads.to_str().unwrap()];
    check("convert", &run("planned-heads", &[&heads[..], &["--dry-run"]].concat()));
    check("convert", &run("drafted", &heads));
    let mut inspect = mlx_quant();
    check("inspect", &document(inspect.arg("inspect")));
    let mut verify = mlx_quant();
    let four = directory.path().join("four");
    check("inspect", &document(verify.arg("inspect").arg(&four).arg("--verify")));
    // What is wrong has a form too.
    std::fs::remove_file(four.join("tokenizer.json")).unwrap();
    let mut wrong = mlx_quant();
    let made = wrong.arg("inspect").arg(&four).args(["--verify", "--json", "--quiet"]).output().unwrap();
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert!(!made["verification"]["problems"].as_array().unwrap().is_empty());
    check("inspect", &made);
}

#[test]
fn calibrated_runs() {
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, arguments: &[&str]| {
        let mut run = mlx_quant();
        run.args(arguments).args(CALIBRATED).arg("--mlx-path").arg(directory.path().join(name));
        document(&mut run)
    };
    check("quantize", &run("awq", &["awq"]));
    check("quantize", &run("gptq", &["gptq", "--dry-run"]));
    check("quantize", &run("nvfp4", &["gptq", "--q-mode", "nvfp4"]));
    check("quantize", &run("rtn", &["quantize", "--recipe", "rtn"]));
    check("quantize", &run("search", &["quantize", "--recipe", "search", "--dry-run"]));
    check("quantize", &run("dynamic", &["dynamic-quant", "--target-bpw", "4.5", "--report-ppl"]));
    check("quantize", &run("dwq", &[&["dwq"], TRAINED.as_slice()].concat()));
    let stacked = ["quantize", "--recipe", "dynamic+awq+gptq+dwq", "--dry-run"];
    check("quantize", &run("all", &[stacked.as_slice(), TRAINED.as_slice()].concat()));
}

#[test]
fn evaluations() {
    let directory = tempfile::tempdir().unwrap();
    let model = dense(directory.path(), "model");
    let run = |more: &[&str]| {
        let mut run = mlx_quant();
        run.args(["eval", "--windows", "2", "--sequence-length", "48"]).args(more);
        run
    };
    check("eval", &document(&mut run(&[])));
    check("eval", &document(run(&[]).arg("--reference").arg(&model)));
    check("eval", &document(&mut run(&["--dry-run"])));
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/suite.jsonl");
    let made = document(run(&[]).arg("--suite").arg(&suite));
    assert!(made["suite"]["beside"].is_null());
    check("eval", &made);
    let made = document(run(&[]).arg("--reference").arg(&model).arg("--suite").arg(&suite));
    assert_eq!((&made["suite"]["questions"], &made["suite"]["choices"]), (&json!(20), &json!(80)));
    assert_eq!(made["suite"]["beside"]["agreement"], json!(1.0), "the demo model beside itself");
    check("eval", &made);
    check("eval", &document(run(&["--dry-run"]).arg("--suite").arg(&suite)));
    // Several files are told apart.
    let texts = directory.path().join("texts");
    std::fs::create_dir(&texts).unwrap();
    for name in ["a.txt", "b.txt"] {
        std::fs::write(texts.join(name), "A text of some length for windows. ".repeat(60)).unwrap();
    }
    let made = document(run(&[]).arg("--reference").arg(&model).arg("--data").arg(&texts));
    assert_eq!(made["by_source"].as_array().unwrap().len(), 2);
    check("eval", &made);
    // One window has no standard error.
    let mut one = mlx_quant();
    check("eval", &document(one.args(["eval", "--windows", "1", "--sequence-length", "48"])));
}

#[test]
fn comparisons_and_recommendations() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args([
        "compare",
        "--methods",
        "basic,dynamic+search,dwq",
        "--n-samples",
        "3",
        "--sequence-length",
        "48",
    ]);
    run.args(["--iters", "2", "--windows", "2", "--output"]).arg(directory.path().join("out"));
    let made = document(&mut run);
    check("compare", &made);
    let report = std::fs::read(directory.path().join("out/report.json")).unwrap();
    check("compare", &serde_json::from_slice(&report).unwrap());
    let mut plan = mlx_quant();
    check("compare", &document(plan.args(["compare", "--dry-run"])));
    let mut recommend = mlx_quant();
    check("recommend", &document(recommend.args(["recommend", "--time", "1s", "--memory", "100MB"])));
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs/Llama-3.2-3B");
    let mut recommend = mlx_quant();
    check("recommend", &document(recommend.args(["recommend", "--model"]).arg(configs)));
}

/// With a card, where there is an adapter.
#[test]
fn devices_and_what_a_card_needs() {
    let mut devices = mlx_quant();
    let found = document(devices.args(["devices", "--threads", "1"]));
    check("devices", &found);
    let Some(card) = found["adapters"].as_array().unwrap().iter().find(|one| one["obstacle"].is_null())
    else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut run = mlx_quant();
        run.args(arguments).args(["--device", card["device"].as_str().unwrap()]);
        run
    };
    // A software adapter takes its time.
    let model = two_blocks(directory.path(), "model");
    let calibrated = |more: &str| {
        let mut run = run(&["gptq"]);
        run.arg("--model").arg(&model).args(CALIBRATED).arg("--mlx-path").arg(directory.path().join("out"));
        document(run.args(more.split_whitespace()))
    };
    check("quantize", &calibrated("--dry-run"));
    check("eval", &document(&mut run(&["eval", "--windows", "1", "--dry-run"])));
    check("compare", &document(&mut run(&["compare", "--methods", "gptq", "--dry-run"])));
    check("recommend", &document(&mut run(&["recommend"])));
    let made = calibrated("");
    check("quantize", &made);
    let (held, most) = (&made["card_peak_memory_bytes"], &made["card_predicted_memory_bytes"]);
    assert!(held.as_u64().unwrap() <= most.as_u64().unwrap(), "{held} of {most}");
}

/// The schemas refuse something.
#[test]
fn unknown_keys_are_refused() {
    let mut run = mlx_quant();
    let mut document = document(run.args(["eval", "--windows", "1", "--sequence-length", "16"]));
    assert!(validator("eval").is_valid(&document));
    document["unheard_of"] = json!(1);
    assert!(!validator("eval").is_valid(&document));
    document.as_object_mut().unwrap().remove("unheard_of");
    document["perplexity"] = json!("low");
    assert!(!validator("eval").is_valid(&document));
}
