//! Every listing of `mlx_lm.convert` in the zoo: names, dtypes, shapes, sha256 of every tensor, the index's
//! metadata and config.json. Prints a table with one line per checkpoint (`--nocapture`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and prints its table")]

mod common;

use std::path::Path;

use common::{convert_to, fixtures, open_path, sha256, shared};
use mlx_format::{Mode, Scheme};
use mlx_quant::Settings;
use mlx_quant::plan::{MixedRecipe, PlanError};
use serde_json::Value;

const CASES: [&str; 3] = ["q4", "mxfp4", "mixed_4_6"];

fn settings(case: &str) -> Settings {
    let mode = if case == "mxfp4" { Mode::Mxfp4 } else { Mode::Affine };
    let mixed = (case == "mixed_4_6").then_some(MixedRecipe::Mixed4_6);
    let quantize = Some(Scheme::new(mode, None, None).unwrap());
    // mlx-lm writes the language model alone.
    Settings { quantize, mixed, text_only: true, ..Settings::default() }
}

/// The two slips in what mlx-lm writes: `"group_size": null` for a recipe without `--q-group-size` (it reads it as
/// 64), and `rope_type` of qwen3_5 renamed to `type` in the source's own object when the model is built.
fn as_meant(mut config: Value) -> Value {
    if let Some(rope) = config.pointer_mut("/text_config/rope_parameters").and_then(Value::as_object_mut)
        && let Some(kind) = rope.remove("type")
    {
        rope.insert("rope_type".to_owned(), kind);
    }
    for key in ["quantization", "quantization_config"] {
        for entry in config[key].as_object_mut().into_iter().flat_map(serde_json::Map::values_mut) {
            if entry.get("group_size") == Some(&Value::Null) {
                entry["group_size"] = 64.into();
            }
        }
    }
    config
}

/// Compares one conversion with its listing; returns the number of equal tensors.
fn compare(zoo: &Path, name: &str, case: &str) -> usize {
    let directory = zoo.join(name);
    let listing = std::fs::read(directory.join(format!("convert_{case}.json"))).unwrap();
    let listing: Value = serde_json::from_slice(&listing).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let target = temporary.path().join("out");
    let model = open_path(&directory).unwrap();
    let written =
        convert_to(&model, settings(case), &target).unwrap_or_else(|error| panic!("{name} {case}: {error}"));

    let expected = listing["tensors"].as_object().unwrap();
    let ours: Vec<&String> = written.tensors().keys().collect();
    let mut theirs: Vec<&String> = expected.keys().collect();
    theirs.sort();
    assert_eq!(ours, theirs, "{name} {case}: names");
    for (tensor, info) in written.tensors() {
        let listed = &expected[tensor];
        assert_eq!(
            info.dtype.to_string(),
            listed["dtype"].as_str().unwrap(),
            "{name} {case}: dtype of {tensor}"
        );
        let shape: Vec<usize> = serde_json::from_value(listed["shape"].clone()).unwrap();
        assert_eq!(info.shape, shape, "{name} {case}: shape of {tensor}");
        assert_eq!(
            sha256(written.bytes(info)),
            listed["sha256"].as_str().unwrap(),
            "{name} {case}: bytes of {tensor}"
        );
    }

    let read =
        |file: &str| -> Value { serde_json::from_slice(&std::fs::read(target.join(file)).unwrap()).unwrap() };
    assert_eq!(
        read("model.safetensors.index.json")["metadata"],
        listing["index_metadata"],
        "{name} {case}: index"
    );
    assert_eq!(read("config.json"), as_meant(listing["config"].clone()), "{name} {case}: config.json");
    for file in listing["files"].as_object().unwrap().keys() {
        assert!(target.join(file).is_file(), "{name} {case}: {file} is missing");
    }
    expected.len()
}

/// Conversions of all checkpoints; a listing that is missing is one that mlx-lm refuses.
fn whole(zoo: &Path, cases: &[&str]) -> usize {
    let mut names: Vec<String> = std::fs::read_dir(zoo)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| zoo.join(name).join("convert_q4.json").is_file())
        .collect();
    names.sort();
    println!("{:<20} {}: tensors equal to mlx_lm.convert", "checkpoint", cases.join(" "));
    let mut total = 0;
    for name in &names {
        let mut cells = Vec::new();
        for case in cases.iter().copied() {
            if zoo.join(name).join(format!("convert_{case}.json")).is_file() {
                let equal = compare(zoo, name, case);
                total += equal;
                cells.push(equal.to_string());
            } else {
                // mlx-lm refuses recipes for models without down_proj; so do we.
                let model = open_path(&zoo.join(name)).unwrap();
                let refused = mlx_quant::Plan::new(&model.checkpoint, &model.config, settings(case));
                assert!(matches!(refused, Err(PlanError::MixedLayers)), "{name} {case}");
                cells.push("refused".to_owned());
            }
        }
        println!("{name:<20} {}", cells.join(" "));
    }
    println!("{} checkpoints, {total} tensors equal", names.len());
    names.len()
}

#[test]
fn checkpoints_in_the_repository() {
    assert_eq!(whole(&fixtures().join("zoo"), &CASES), 6);
}

#[test]
fn seeded_checkpoints() {
    assert_eq!(whole(common::seeds::seeded().path(), &CASES[..1]), 42);
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_checkpoint_of_the_shared_zoo() {
    assert_eq!(whole(&shared().join("zoo"), &CASES), 40);
}
