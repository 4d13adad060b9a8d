//! Sources that other quantizers have packed: decoded to the numbers of the programs that packed them, taken over as MLX's codes
//! where MLX holds these numbers, refused where it does not.
//!
//! `fixtures/packed/make.py` makes a small model of each form and says what its weights are, by the published code of each.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{Checkpoint, hollow_out};
use mlx_format::{Dtype, FloatType, Scheme};
use mlx_quant::model::Weights;
use mlx_quant::plan::{PackedSource, PlanError};
use mlx_quant::{Model, Plan, QuantizeSettings, Settings, Silent, quantize};
use serde_json::{Value, json};

use crate::common::{convert_to, fixtures, open_path, random_windows, sha256};

/// Forms that MLX has no codes for at all, so that they are decoded as any float8 is.
const DECODED: [&str; 4] = ["fp8_blocks", "fp8_fbgemm", "fp8_modelopt", "fp8_rows"];

/// Forms whose numbers MLX's codes do not hold, and a word of the reason.
const LACKING: [(&str, &str); 4] = [
    ("gptq4_order", "g_idx"),
    ("int4_order", "g_idx"),
    ("nvfp4_compressed", "scale of the whole matrix"),
    ("nvfp4_modelopt", "scale of the whole matrix"),
];

fn forms() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("packed")).unwrap();
    let mut forms: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    forms.retain(|path| path.is_dir());
    forms.sort();
    assert_eq!(forms.len(), 28);
    forms
}

fn name_of(form: &Path) -> &str {
    form.file_name().unwrap().to_str().unwrap()
}

fn form(name: &str) -> PathBuf {
    fixtures().join("packed").join(name)
}

/// Packed layers and what their weights are: SHA-256 of float32, by MLX's path, the matrices of stacked experts one by one.
fn expected(form: &Path) -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(form.join("decoded.json")).unwrap();
    let decoded: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    let mut expected: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // Experts stand in order: there are fewer than ten.
    for (name, hash) in decoded {
        let path = name.strip_suffix(".weight").unwrap();
        let path = match path.split_once(".experts.") {
            Some((before, behind)) => format!("{before}.switch_mlp.{}", &behind[2..]),
            None => path.to_owned(),
        };
        expected.entry(path).or_default().push(hash);
    }
    expected
}

/// Decoded weights in float32, as every method and `eval` read them.
fn decoded(model: &Model, path: &str) -> Vec<f32> {
    let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
    let module = weights.module(path, &mlx_quant_engine::cpu()).unwrap();
    module.get(&format!("{path}.weight")).unwrap().to_vec().unwrap()
}

fn hashes(values: &[f32], matrices: usize) -> Vec<String> {
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    values.chunks_exact(values.len() / matrices).map(|values| sha256(&bytes(values))).collect()
}

fn assert_decodes(model: &Model, form: &Path) {
    for (path, expected) in expected(form) {
        assert_eq!(hashes(&decoded(model, &path), expected.len()), expected, "{} {path}", name_of(form));
    }
}

/// The numbers that scales and biases of an MLX model stand for, rounded once to float32. Decoding in float32, as MLX does it, rounds
/// the product and the sum, which is the same unless scales are float32 themselves.
fn assert_holds(model: &Model, form: &Path) {
    let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
    for (path, expected) in expected(form) {
        let shape = weights.shape(&format!("{path}.weight")).unwrap().to_vec();
        let (columns, rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
        let Some(held) = weights.packed_rows(&path, 0..rows) else {
            assert_eq!(hashes(&decoded(model, &path), expected.len()), expected, "{} {path}", name_of(form));
            continue;
        };
        let value = |(at, code): (usize, &u8)| {
            let group =
                at / columns * (columns / held.scheme.group_size()) + at % columns / held.scheme.group_size();
            (f64::from(*code) * f64::from(held.scales[group]) + f64::from(held.biases[group])) as f32
        };
        let values: Vec<f32> = held.codes.iter().enumerate().map(value).collect();
        assert_eq!(hashes(&values, expected.len()), expected, "{} {path}", name_of(form));
    }
}

fn weights_of(directory: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, String)> {
    let checkpoint = open_path(directory).unwrap().checkpoint;
    let tensors = checkpoint.tensors().iter();
    tensors
        .map(|(name, tensor)| {
            (name.clone(), (tensor.dtype, tensor.shape.clone(), sha256(checkpoint.bytes(tensor))))
        })
        .collect()
}

fn config_of(directory: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap()
}

#[test]
fn decoded_values_are_those_of_the_programs_that_packed_them() {
    for form in forms() {
        assert_decodes(&open_path(&form).unwrap(), &form);
    }
}

#[test]
fn what_is_taken_over_decodes_to_the_same_numbers() {
    let temporary = tempfile::tempdir().unwrap();
    for form in forms() {
        let (name, model) = (name_of(&form), open_path(&form).unwrap());
        let target = temporary.path().join(name);
        let made = convert_to(&model, Settings::default(), &target);
        if let Some((_, word)) = LACKING.iter().find(|(lacking, _)| *lacking == name) {
            let error = made.unwrap_err();
            assert!(error.is_refusal() && !target.exists());
            let text = error.to_string();
            assert!(text.contains("cannot be taken over exactly") && text.contains(word), "{name}: {text}");
            continue;
        }
        let (written, config) = (made.unwrap(), config_of(&target));
        assert_eq!(config["quantization"], config["quantization_config"], "{name}");
        if DECODED.contains(&name) {
            assert_eq!(config["quantization"], Value::Null, "{name}");
            assert!(written.tensors().values().all(|tensor| tensor.dtype == Dtype::BF16), "{name}");
            continue;
        }
        let codes = written.tensors().values().filter(|tensor| tensor.dtype == Dtype::U32).count();
        assert_eq!(codes, expected(&form).len(), "{name}");
        // Nothing but scales and biases may need another dtype than the model's.
        let dtype = FloatType::from_name(model.config.str("torch_dtype").unwrap()).unwrap().dtype();
        for (tensor, held) in written.tensors() {
            let grid = tensor.ends_with(".scales") || tensor.ends_with(".biases") || held.dtype == Dtype::U32;
            assert!(grid || held.dtype == dtype, "{name} {tensor}");
        }
        let made = open_path(&target).unwrap();
        assert_holds(&made, &form);
        if name != "int8_rows" {
            assert_decodes(&made, &form);
        }
    }
}

#[test]
fn scales_and_biases_have_the_dtype_that_holds_them() {
    let temporary = tempfile::tempdir().unwrap();
    let dtypes = |name: &str, settings: Settings| {
        let target = temporary.path().join("out");
        let _ = std::fs::remove_dir_all(&target);
        let written = convert_to(&open_path(&form(name)).unwrap(), settings, &target).unwrap();
        let of = |leaf: &str| {
            written.tensor(&format!("model.layers.0.self_attn.q_proj.{leaf}")).map(|found| found.dtype)
        };
        (of("scales"), of("biases"))
    };
    let both = |dtype| (Some(dtype), Some(dtype));
    // Middles of the codes are powers of two; other zero points times a scale need more bits than it has.
    assert_eq!(dtypes("gptq4", Settings::default()), both(Dtype::F16));
    assert_eq!(dtypes("gptq4_asym", Settings::default()), both(Dtype::F32));
    assert_eq!(dtypes("awq", Settings::default()), both(Dtype::F32));
    assert_eq!(dtypes("w8a8", Settings::default()), both(Dtype::BF16));
    assert_eq!(dtypes("mxfp4_compressed", Settings::default()), (Some(Dtype::U8), None));
    let half = Settings { dtype: Some(FloatType::F16), ..Settings::default() };
    assert_eq!(dtypes("awq", half), both(Dtype::F16));
}

#[test]
fn without_bits_the_rest_is_quantized_and_with_others_all_is() {
    let temporary = tempfile::tempdir().unwrap();
    let affine = |bits, group| Some(Scheme::affine(bits, group).unwrap());
    let model = open_path(&form("int4_experts")).unwrap();
    let experts = "model.layers.0.mlp.switch_mlp.up_proj";
    let run = |name: &str, settings: Settings| {
        let target = temporary.path().join(name);
        convert_to(&model, settings, &target).unwrap();
        (weights_of(&target), config_of(&target)["quantization"].clone())
    };
    let (alone, quantization) = run("alone", Settings::default());
    assert_eq!(quantization, json!({"group_size": 32, "bits": 4, "mode": "affine"}));
    let keep = Settings { quantize: affine(4, 64), packed: PackedSource::Keep, ..Settings::default() };
    let (kept, quantization) = run("kept", keep);
    assert_eq!(quantization["group_size"], 32);
    assert_eq!(quantization["model.layers.0.self_attn.q_proj"]["group_size"], 64);
    let other = Settings { quantize: affine(3, 32), packed: PackedSource::Match, ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, other.clone()).unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("3 layers") && note.contains("rounded anew")),
        "{:?}",
        plan.notes
    );
    let (rounded, quantization) = run("rounded", other);
    assert_eq!((&quantization["group_size"], &quantization["bits"]), (&json!(32), &json!(3)));
    let same = Settings { quantize: affine(4, 32), packed: PackedSource::Match, ..Settings::default() };
    let (matched, _) = run("matched", same);
    for leaf in ["weight", "scales", "biases"] {
        let name = format!("{experts}.{leaf}");
        assert!(
            alone[&name] == kept[&name] && alone[&name] == matched[&name] && alone[&name] != rounded[&name]
        );
    }
    assert_eq!(alone["model.layers.0.self_attn.q_proj.weight"].0, Dtype::BF16);
    assert_eq!(kept["model.layers.0.self_attn.q_proj.weight"].0, Dtype::U32);
}

/// Quantizing a packed source and quantizing its decoded form, written in float32, is the same.
#[test]
fn methods_see_the_decoded_form() {
    let temporary = tempfile::tempdir().unwrap();
    for name in ["awq", "gptq4_order", "nvfp4_modelopt", "int4_experts", "fp8_rows"] {
        let model = open_path(&form(name)).unwrap();
        let plain = temporary.path().join(format!("{name}-plain"));
        let decode = Settings { dequantize: true, dtype: Some(FloatType::F32), ..Settings::default() };
        convert_to(&model, decode, &plain).unwrap();
        assert_eq!(config_of(&plain)["quantization_config"], Value::Null);
        let source = std::fs::metadata(form(name).join("model.safetensors")).unwrap().len();
        let asked = Settings { quantize: Some(Scheme::affine(3, 32).unwrap()), ..Settings::default() };
        let plan = Plan::new(&model.checkpoint, &model.config, asked).unwrap();
        assert!(plan.input_bytes() <= source && plan.input_bytes() > source / 2, "{name}");
        let plain = open_path(&plain).unwrap();
        assert_decodes(&plain, &form(name));
        let out = |model: &Model, recipe: &str, target: &str| {
            let target = temporary.path().join(format!("{name}-{recipe}-{target}"));
            let asked = Settings { quantize: Some(Scheme::affine(3, 32).unwrap()), ..Settings::default() };
            let plan = Plan::new(&model.checkpoint, &model.config, asked).unwrap();
            let settings = QuantizeSettings { threads: 2, ..QuantizeSettings::new(recipe.parse().unwrap()) };
            quantize(model, &plan, &random_windows(model, 1, 4, 32), &target, &settings, &Silent).unwrap();
            weights_of(&target)
        };
        for recipe in ["gptq", "awq"] {
            assert_eq!(out(&model, recipe, "packed"), out(&plain, recipe, "plain"), "{name} {recipe}");
        }
    }
}

/// A copy of a form with another config, and with some of its tensors' headers changed.
fn changed(target: &Path, name: &str, config: impl Fn(&mut Value), header: impl Fn(&mut Value)) -> Model {
    std::fs::create_dir_all(target).unwrap();
    let mut own = config_of(&form(name));
    config(&mut own);
    std::fs::write(target.join("config.json"), own.to_string()).unwrap();
    let bytes = std::fs::read(form(name).join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk::<8>().unwrap()) as usize;
    let mut head: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header(&mut head);
    let head = head.to_string();
    let file = [&(head.len() as u64).to_le_bytes(), head.as_bytes(), &bytes[8 + length..]].concat();
    std::fs::write(target.join("model.safetensors"), file).unwrap();
    open_path(target).unwrap()
}

const Q: &str = "model.layers.0.self_attn.q_proj";

/// What makes a config lie.
type Lie = fn(&mut Value);

#[test]
fn configs_that_lie_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let lies: [(&str, &str, Lie, &str); 12] = [
        ("awq as gptq", "awq", |config| config["quantize_with"] = json!(0), ""),
        (
            "gptq form of awq",
            "awq",
            |config| config["quantization_config"]["quant_method"] = json!("gptq"),
            "groups of 512 inputs",
        ),
        (
            "awq form of gptq",
            "gptq4",
            |config| config["quantization_config"]["quant_method"] = json!("awq"),
            "packed by AWQ",
        ),
        (
            "group size",
            "gptq4",
            |config| config["quantization_config"]["group_size"] = json!(16),
            "groups of 16",
        ),
        (
            "huge group size",
            "awq",
            |config| config["quantization_config"]["group_size"] = json!(u64::MAX),
            "groups of",
        ),
        ("bits of awq", "awq", |config| config["quantization_config"]["bits"] = json!(3), "3 bits"),
        ("version of awq", "awq", |config| config["quantization_config"]["version"] = json!("gemv"), "gemv"),
        (
            "words of gptq",
            "gptq4",
            |config| config["quantization_config"]["pack_dtype"] = json!("int8"),
            "int8",
        ),
        (
            "form of gptq",
            "gptq4",
            |config| config["quantization_config"]["checkpoint_format"] = json!("marlin"),
            "marlin",
        ),
        (
            "bits of codes",
            "int4_asym",
            |config| {
                config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(8);
            },
            "nothing that config.json speaks of",
        ),
        (
            "pairs of four",
            "int4_asym",
            |config| config["quantization_config"]["format"] = json!("marlin-24"),
            "marlin-24",
        ),
        (
            "bitsandbytes",
            "awq",
            |config| config["quantization_config"]["quant_method"] = json!("bitsandbytes"),
            "bitsandbytes",
        ),
    ];
    for (index, (what, name, lie, word)) in lies.into_iter().enumerate() {
        let model = changed(&temporary.path().join(index.to_string()), name, lie, |_| {});
        let plan = Plan::new(&model.checkpoint, &model.config, Settings::default());
        if word.is_empty() {
            plan.unwrap();
            continue;
        }
        let error = plan.unwrap_err();
        assert!(matches!(error, PlanError::Source(_)), "{what}: {error}");
        let text = error.to_string();
        assert!(text.contains(word) && text.contains("; hint: "), "{what}: {text}");
    }
}

/// What is done to a header.
type Damage<'a> = Box<dyn Fn(&mut Value) + 'a>;

#[test]
fn tensors_that_do_not_belong_together_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let rename = |head: &mut Value, from: &str, to: &str| {
        let map = head.as_object_mut().unwrap();
        let held = map.remove(&format!("{Q}.{from}")).unwrap();
        map.insert(format!("{Q}.{to}"), held);
    };
    let shape = |leaf: &'static str, shape: Value| -> Damage<'_> {
        Box::new(move |head: &mut Value| head[format!("{Q}.{leaf}")]["shape"] = shape.clone())
    };
    let without =
        |leaf: &'static str| -> Damage<'_> { Box::new(move |head: &mut Value| rename(head, leaf, "other")) };
    let cases: [(&str, Damage<'_>, &str); 10] = [
        ("awq", without("scales"), "scales is missing"),
        ("gptq4", without("qzeros"), "qzeros is missing"),
        ("gptq4", shape("qweight", json!([16, 32])), "shape [16, 32]"),
        ("awq", shape("scales", json!([1, 128])), "scales"),
        ("awq", shape("qzeros", json!([16, 1])), "qzeros"),
        (
            "int4_experts",
            Box::new(|head: &mut Value| {
                let map = head.as_object_mut().unwrap();
                let name = "model.layers.0.mlp.experts.0.up_proj.weight_scale";
                let held = map.remove(name).unwrap();
                map.insert("other".to_owned(), held);
            }),
            "weight_scale is missing",
        ),
        ("int4_asym", shape("weight_zero_point", json!([2, 8])), "weight_zero_point"),
        ("nvfp4_modelopt", without("weight_scale_2"), "lacks a scale of the whole matrix"),
        ("mxfp4_compressed", shape("weight_packed", json!([32, 64])), "scales"),
        ("fp8_rows", without("weight_scale"), "has no"),
    ];
    for (index, (name, damage, word)) in cases.into_iter().enumerate() {
        if name == "gptq4" && word.starts_with("shape") {
            continue;
        }
        let model = changed(&temporary.path().join(index.to_string()), name, |_| {}, damage);
        let error = Plan::new(&model.checkpoint, &model.config, Settings::default()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, PlanError::Source(_)) && text.contains(word), "{name} {index}: {text}");
    }
}

/// What `--stream` plans from headers is what is made of the whole, or refused.
#[test]
fn headers_alone_plan_the_same() {
    let temporary = tempfile::tempdir().unwrap();
    for form in forms() {
        let name = name_of(&form);
        let whole = open_path(&form).unwrap();
        let hollow = temporary.path().join(name);
        std::fs::create_dir(&hollow).unwrap();
        for file in ["config.json", "model.safetensors", "hf_quant_config.json"] {
            let _ = std::fs::copy(form.join(file), hollow.join(file));
        }
        hollow_out(&hollow.join("model.safetensors"), &[]).unwrap();
        let hollow = open_path(&hollow).unwrap();
        let layout = |model: &Model| {
            let plan = Plan::new(&model.checkpoint, &model.config, Settings::default());
            plan.map(|plan| plan.layout.specs().to_vec()).map_err(|error| error.to_string())
        };
        match (layout(&whole), layout(&hollow)) {
            (Ok(whole), Ok(hollow)) => assert_eq!(whole, hollow, "{name}"),
            // A scale of 1 is not seen before it is here.
            (_, Err(error)) => {
                assert!(
                    LACKING.iter().any(|(lacking, _)| *lacking == name) || name == "nvfp4_modelopt_one",
                    "{name}: {error}"
                );
            }
            (Err(error), Ok(_)) => panic!("{name}: {error}"),
        }
    }
}

/// Zero points that config.json calls symmetric and that were not here when the plan was made: what is something else is never written.
#[test]
fn a_plan_from_headers_that_was_lied_to_ends_in_an_error() {
    let temporary = tempfile::tempdir().unwrap();
    let lie = |config: &mut Value| config["quantization_config"]["sym"] = json!(true);
    let whole = changed(&temporary.path().join("whole"), "gptq4_asym", lie, |_| {});
    let path = temporary.path().join("hollow");
    changed(&path, "gptq4_asym", lie, |_| {});
    hollow_out(&path.join("model.safetensors"), &[]).unwrap();
    let hollow = open_path(&path).unwrap();
    let plan = Plan::new(&hollow.checkpoint, &hollow.config, Settings::default()).unwrap();
    let target = temporary.path().join("out");
    let error = mlx_quant::convert(&whole, &plan, target.as_path(), 2, &Silent).unwrap_err();
    assert!(error.to_string().contains("NaN") && !target.exists(), "{error}");
    // With the data at hand the tensor is believed.
    let made = convert_to(&whole, Settings::default(), &target).unwrap();
    assert_eq!(made.tensor(&format!("{Q}.scales")).unwrap().dtype, Dtype::F32);
    assert_decodes(&open_path(&target).unwrap(), &form("gptq4_asym"));
    let _: Checkpoint = made;
}
