//! Every kind of tensor that `mlx_lm.convert` writes for a tiny checkpoint of each model type of `tests/fixtures/rules`: names,
//! dtypes, shapes, bytes, and config.json. `scripts/rules_fixtures.py` makes these files; it says what stands in them. Prints a
//! table with a line for each (`--nocapture`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and prints its table")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{bf16_bytes, convert_to, fixtures, open_path, sha256, write_checkpoint};
use mlx_format::checkpoint::Checkpoint;
use mlx_format::{Dtype, Mode, Scheme};
use mlx_quant::plan::{MixedRecipe, PlanError};
use mlx_quant::{Model, Plan, Settings};
use rayon::iter::Either;
use rayon::prelude::*;
use serde_json::{Map, Value};

const CASES: [&str; 3] = ["q4", "mxfp4", "mixed_4_6"];

/// A tensor of a checkpoint: name, dtype, shape, bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// mlx_lm.convert leaves out what sees and hears.
fn settings(case: &str) -> Settings {
    let mode = if case == "mxfp4" { Mode::Mxfp4 } else { Mode::Affine };
    let mixed = (case == "mixed_4_6").then_some(MixedRecipe::Mixed4_6);
    let quantize = Some(Scheme::new(mode, None, None).unwrap());
    Settings { quantize, mixed, text_only: true, ..Settings::default() }
}

fn fixture(name: &str) -> Value {
    let file = fixtures().join("rules").join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn names() -> Vec<String> {
    let files = std::fs::read_dir(fixtures().join("rules")).unwrap();
    let stem = |file: std::io::Result<std::fs::DirEntry>| {
        file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()
    };
    let mut names: Vec<String> = files.map(stem).collect();
    names.sort();
    names
}

/// What a tensor of this name holds.
fn fill(name: &str, dtype: Dtype, elements: usize) -> Vec<u8> {
    if name.ends_with("residual_gate.gate") {
        return vec![0; elements * dtype.bitsize() / 8];
    }
    let hash = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let mut next = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut state = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ (state >> 31)
    };
    match dtype {
        Dtype::BF16 => {
            bf16_bytes((0..elements).map(|_| f32::from(((next() >> 56) as u8).cast_signed()) / 64.0))
        }
        Dtype::F32 => {
            let mut value =
                || f64::from(((next() >> 32) as u32).cast_signed().div_euclid(256)) / f64::from(1 << 22);
            (0..elements).flat_map(|_| (value() as f32).to_le_bytes()).collect()
        }
        _ => (0..elements).map(|_| (next() >> 56) as u8).collect(),
    }
}

/// A kind's name with numbers in the places of `#`.
fn numbered(kind: &str, numbers: &str) -> String {
    numbers.split('.').fold(kind.to_owned(), |name, number| name.replacen('#', number, 1))
}

fn tensors(fixture: &Value) -> Vec<Tensor> {
    let mut all = Vec::new();
    for (kind, forms) in fixture["source"].as_object().unwrap() {
        for form in forms.as_array().unwrap() {
            let dtype: Dtype = serde_json::from_value(form[0].clone()).unwrap();
            let shape: Vec<usize> = serde_json::from_value(form[1].clone()).unwrap();
            for numbers in form[2].as_str().unwrap().split(' ') {
                let name = numbered(kind, numbers);
                let bytes = fill(&name, dtype, shape.iter().product());
                all.push((name, dtype, shape.clone(), bytes));
            }
        }
    }
    all
}

fn write(at: &Path, config: &Value, tensors: &[Tensor]) -> Model {
    let list: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
        .collect();
    write_checkpoint(at, &config.to_string(), &list);
    open_path(at).unwrap()
}

fn kind(name: &str) -> String {
    let mut kind = String::new();
    for character in name.chars() {
        match character {
            '0'..='9' if kind.ends_with('#') => {}
            '0'..='9' => kind.push('#'),
            other => kind.push(other),
        }
    }
    kind
}

fn digests(written: &Checkpoint) -> BTreeMap<String, String> {
    let mut kinds: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (name, tensor) in written.tensors() {
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let held = kinds.entry(kind(name)).or_default();
        held.extend(format!("{name} {} [{shape}]\n", tensor.dtype).as_bytes());
        held.extend(written.bytes(tensor));
    }
    kinds.into_iter().map(|(kind, held)| (kind, sha256(&held)[..20].to_owned())).collect()
}

/// What mlx-lm means where it writes less: a recipe's group size is 64, and so is that of 8 bits alone (RWKV).
fn as_meant(mut changed: Map<String, Value>) -> Map<String, Value> {
    let entries = changed.get_mut("quantization").and_then(Value::as_object_mut).unwrap();
    for entry in entries.values_mut().filter_map(Value::as_object_mut) {
        if entry.get("group_size").is_none_or(Value::is_null) {
            entry.insert("group_size".to_owned(), 64.into());
        }
    }
    changed
}

fn compare(name: &str, fixture: &Value, model: &Model, case: &str, target: &Path) -> usize {
    let expected = &fixture["written"][case];
    let written =
        convert_to(model, settings(case), target).unwrap_or_else(|error| panic!("{name} {case}: {error}"));
    let theirs: BTreeMap<String, String> = serde_json::from_value(expected["tensors"].clone()).unwrap();
    let ours = digests(&written);
    for kind in theirs.keys().chain(ours.keys()) {
        assert_eq!(ours.get(kind), theirs.get(kind), "{name} {case}: {kind}");
    }
    let mut config = fixture["config"].as_object().unwrap().clone();
    for (key, value) in as_meant(expected["changed"].as_object().unwrap().clone()) {
        match value {
            Value::Null => config.remove(&key),
            value => config.insert(key, value),
        };
    }
    config.insert("quantization_config".to_owned(), config["quantization"].clone());
    let ours: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    for key in config.keys().chain(ours.keys()) {
        assert_eq!(ours.get(key), config.get(key), "{name} {case}: {key} of config.json");
    }
    written.tensors().len()
}

fn whole(name: &str) -> String {
    let fixture = fixture(name);
    let at = tempfile::tempdir().unwrap();
    let model = write(&at.path().join("source"), &fixture["config"], &tensors(&fixture));
    let cell = |case: &str| {
        // mlx-lm fails at it.
        if fixture["written"].get(case).is_some_and(Value::is_null) {
            return "-".to_owned();
        }
        if fixture["written"].get(case).is_some() {
            return compare(name, &fixture, &model, case, &at.path().join(case)).to_string();
        }
        // mlx-lm refuses recipes for models without down_proj; so do we.
        let refused = Plan::new(&model.checkpoint, &model.config, settings(case));
        assert!(matches!(refused, Err(PlanError::MixedLayers)), "{name} {case}");
        "refused".to_owned()
    };
    let [q4, mxfp4, mixed] = CASES.map(cell);
    format!("{name:<24} {q4:>6} {mxfp4:>6} {mixed:>9}")
}

#[test]
fn every_type_converts_as_mlx_lm_converts_it() {
    let names = names();
    assert!(names.len() > 40, "{}", names.len());
    // All are tried, so that one run tells of all that fail.
    let row = |name: &String| std::panic::catch_unwind(|| whole(name)).map_err(|_| name.clone());
    let (rows, failed): (Vec<String>, Vec<String>) =
        names.par_iter().map(row).partition_map(|row| match row {
            Ok(row) => Either::Left(row),
            Err(name) => Either::Right(name),
        });
    println!(
        "{:<24} {:>6} {:>6} {:>9}   tensors equal to mlx_lm.convert",
        "type", "q4", "mxfp4", "mixed_4_6"
    );
    for row in &rows {
        println!("{row}");
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// Whoever describes a type without a decoder proves it here.
#[test]
fn every_type_without_a_decoder_has_its_fixture() {
    // OLMo 1 needs a package beside mlx-lm, which its fixture would have to be made with.
    const WITHOUT: [&str; 1] = ["olmo"];
    let proven: Vec<String> = names()
        .iter()
        .map(|name| fixture(name)["config"]["model_type"].as_str().unwrap().to_owned())
        .chain(names())
        .collect();
    let rules_only = mlx_quant::model::arch::described().filter(|(_, decoder)| !decoder);
    for types in rules_only.map(|(types, _)| types) {
        let known = types.iter().any(|name| WITHOUT.contains(name) || proven.iter().any(|own| own == name));
        assert!(known, "{types:?} has no fixture");
    }
}

/// A matrix that no rule knows is refused, not carried along in 16 bits.
#[test]
fn a_matrix_without_a_place_is_refused() {
    let fixture = fixture("jamba");
    let mut all = tensors(&fixture);
    all.push(("model.layers.0.mamba.extra.weight".to_owned(), Dtype::BF16, vec![64, 64], vec![0; 8192]));
    let at = tempfile::tempdir().unwrap();
    let model = write(at.path(), &fixture["config"], &all);
    let error = Plan::new(&model.checkpoint, &model.config, settings("q4")).unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, PlanError::Unknown { .. }) && said.contains("mamba.extra.weight"), "{said}");
}

/// Falcon H1's keys have a multiplier of their own, as in transformers; mlx-lm forgets it. A power of two moves the scales alone.
#[test]
fn keys_of_falcon_h1_are_multiplied() {
    let fixture = fixture("falcon_h1");
    let all = tensors(&fixture);
    let at = tempfile::tempdir().unwrap();
    let scales = |multiplier: f32, name: &str| {
        let mut config = fixture["config"].clone();
        config["key_multiplier"] = multiplier.into();
        let model = write(&at.path().join(format!("source{multiplier}")), &config, &all);
        let target = at.path().join(format!("{name}{multiplier}"));
        let written = convert_to(&model, settings("q4"), &target).unwrap();
        let tensor = &written.tensors()[&format!("model.layers.0.self_attn.{name}.scales")];
        let bytes = written.bytes(tensor).chunks_exact(2);
        bytes.map(|pair| half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect::<Vec<f32>>()
    };
    let halves: Vec<f32> = scales(1.0, "k_proj").iter().map(|scale| scale / 2.0).collect();
    assert_eq!(scales(0.5, "k_proj"), halves);
    assert_eq!(scales(0.5, "q_proj"), scales(1.0, "q_proj"));
}

/// Parts of a joined matrix that are not all there.
#[test]
fn a_part_that_is_missing_is_named() {
    let fixture = fixture("kimi_k3");
    let mut all = tensors(&fixture);
    all.retain(|(name, ..)| !name.ends_with("layers.1.self_attn.v_proj.weight"));
    let at = tempfile::tempdir().unwrap();
    let model = write(at.path(), &fixture["config"], &all);
    let said = Plan::new(&model.checkpoint, &model.config, settings("q4")).unwrap_err().to_string();
    assert!(said.contains("layers.1.self_attn.qkv_proj.weight is made of 3 parts"), "{said}");
}
