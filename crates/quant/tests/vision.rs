//! Vision and audio kept: what is written is what mlx-vlm's own conversion writes, and the language model is what it is without.
//!
//! `fixtures/vision` holds a listing for each wrapper, made by `scripts/vision.py` with mlx-vlm 0.7.10: config.json, the
//! tensors of a tiny checkpoint in the hub's form, and names, dtypes, shapes and SHA-256 of mlx-vlm's conversion at 4 bits.
//! The checkpoint's numbers follow from its names (`values`), so that no weights have to be kept.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Stopper, write_checkpoint};
use common::{bf16_bytes, convert_to, fixtures, open_path, quantize, random_windows as windows, sha256};
use mlx_format::Dtype;
use mlx_format::checkpoint::Checkpoint;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::inspect::{inspect, verify};
use mlx_quant::session::distill;
use mlx_quant::{
    EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, convert, evaluate,
    quantize as calibrate,
};
use serde_json::{Value, json};

/// The CRC-32 of zip files.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Numbers that follow from a tensor's name and an element's index; of norms' weights around 1. `scripts/vision.py` makes
/// the same.
fn values(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let segments: Vec<&str> = name.rsplitn(3, '.').collect();
    let around_one = segments[0] == "weight" && segments.get(1).is_some_and(|module| module.contains("norm"));
    let (seed, middle) = (crc32(name.as_bytes()), if around_one { 1.0 } else { 0.0 });
    (0..count as u32).map(move |index| {
        let mut hash = index.wrapping_mul(2_654_435_761).wrapping_add(seed);
        hash = (hash ^ (hash >> 15)).wrapping_mul(2_246_822_519);
        hash ^= hash >> 13;
        ((hash >> 16) as f32 - 32768.0) / 262_144.0 + middle
    })
}

/// A listing: what is made of which tensors.
struct Case {
    name: String,
    config: Value,
    /// dtype and shape by the hub's names.
    source: BTreeMap<String, (Dtype, Vec<usize>)>,
    /// dtype, shape and the beginning of the SHA-256 by mlx-vlm's names.
    right: BTreeMap<String, String>,
}

impl Case {
    fn all() -> Vec<Self> {
        let entries = std::fs::read_dir(fixtures().join("vision")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        names.sort();
        let cases: Vec<Self> = names.iter().map(|path| Self::read(path)).collect();
        assert!(cases.len() >= 14, "{}", cases.len());
        cases
    }

    fn of(name: &str) -> Self {
        Self::read(&fixtures().join(format!("vision/{name}.json")))
    }

    fn read(path: &Path) -> Self {
        let listing: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let text =
            |key: &str| -> BTreeMap<String, String> { serde_json::from_value(listing[key].clone()).unwrap() };
        let tensor = |entry: String| {
            let mut words = entry.split(' ');
            let dtype = if words.next() == Some("F32") { Dtype::F32 } else { Dtype::BF16 };
            (dtype, words.map(|axis| axis.parse().unwrap()).collect())
        };
        let source = text("source").into_iter().map(|(name, entry)| (name, tensor(entry))).collect();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        Self { name, config: listing["config"].clone(), source, right: text("mlx_vlm") }
    }

    /// Writes the checkpoint, with a file of the processor beside it.
    fn write(&self, at: &Path) -> Model {
        let bytes = |name: &str, dtype: Dtype, shape: &[usize]| -> Vec<u8> {
            let count = shape.iter().product();
            let bound =
                if name.ends_with("_max") { Some(8.0) } else { name.ends_with("_min").then_some(-8.0) };
            let numbers: Vec<f32> = match bound {
                Some(bound) => vec![bound; count],
                None => values(name, count).collect(),
            };
            match dtype {
                Dtype::F32 => numbers.into_iter().flat_map(f32::to_le_bytes).collect(),
                _ => bf16_bytes(numbers),
            }
        };
        let tensors: Vec<_> = self
            .source
            .iter()
            .map(|(name, (dtype, shape))| (name.as_str(), *dtype, shape.clone(), bytes(name, *dtype, shape)))
            .collect();
        write_checkpoint(at, &self.config.to_string(), &tensors);
        std::fs::write(at.join("preprocessor_config.json"), "{}").unwrap();
        open_path(at).unwrap()
    }
}

fn listed(written: &Checkpoint) -> BTreeMap<String, String> {
    let entry = |(name, tensor): (&String, &mlx_format::checkpoint::Tensor)| {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        let words =
            [vec![tensor.dtype.to_string()], shape, vec![sha256(written.bytes(tensor))[..16].to_owned()]];
        (name.clone(), words.concat().join(" "))
    };
    written.tensors().iter().map(entry).collect()
}

/// What `inspect --verify` finds, but for the tokenizer, which these models do not have.
fn problems(model: &Model) -> Vec<String> {
    let found = verify(model, &Silent, 1).unwrap().problems;
    found.iter().map(ToString::to_string).filter(|problem| !problem.starts_with("tokenizer.json")).collect()
}

fn text_only(settings: Settings) -> Settings {
    Settings { text_only: true, ..settings }
}

/// Those of the language model; a head that is the table once more is none of its own.
fn language(mut listed: BTreeMap<String, String>, repeats: bool) -> BTreeMap<String, String> {
    let is = |name: &str| name.starts_with("language_model.");
    listed.retain(|name, _| is(name) && !(repeats && name.starts_with("language_model.lm_head.")));
    listed
}

#[test]
fn every_wrapper_is_what_mlx_vlm_writes() {
    for case in Case::all() {
        let at = tempfile::tempdir().unwrap();
        let (target, plain) = (at.path().join("out"), at.path().join("text"));
        let model = case.write(&at.path().join("source"));
        let written = convert_to(&model, quantize(4, 64), &target)
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let ours = listed(&written);
        for name in case.right.keys().chain(ours.keys()) {
            assert_eq!(ours.get(name), case.right.get(name), "{}: {name}", case.name);
        }
        let out = open_path(&target).unwrap();
        assert_eq!(out.config.0["vision_config"], case.config["vision_config"], "{}", case.name);
        assert_eq!(out.config.0.get("audio_config"), case.config.get("audio_config"), "{}", case.name);
        assert!(target.join("preprocessor_config.json").is_file());
        let card = std::fs::read_to_string(target.join("README.md")).unwrap();
        assert!(
            card.contains("pipeline_tag: image-text-to-text") && card.contains("mlx_vlm.generate"),
            "{card}"
        );
        // The language model is what it is without.
        let alone = convert_to(&model, text_only(quantize(4, 64)), &plain).unwrap();
        let repeats = case.name == "gemma3";
        assert_eq!(language(listed(&alone), false), language(ours.clone(), repeats), "{}", case.name);
        assert!(alone.tensors().keys().all(|name| name.starts_with("language_model.")), "{}", case.name);
        assert!(!plain.join("preprocessor_config.json").exists());
        let plain = open_path(&plain).unwrap();
        assert_eq!(plain.config.0.get("vision_config"), None);
        let figures = |of: &Model| {
            let settings = EvaluationSettings::default();
            let total =
                evaluate(of, Some(&model), &windows(&model, 7, 2, 16), &settings, &Silent).unwrap().total;
            serde_json::to_value(total).unwrap()
        };
        assert_eq!(figures(&out), figures(&plain), "{}", case.name);
        // What is written is read again, and nothing turned twice.
        let again = convert_to(&out, Settings::default(), &at.path().join("again")).unwrap();
        assert_eq!(listed(&again), ours, "{}", case.name);
        assert_eq!(problems(&out), Vec::<String>::new(), "{}", case.name);
        let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
        let found = inspect(&out).unwrap();
        let own = found.towers.map(|towers| (towers.tensors, towers.weights, towers.bytes));
        assert_eq!(own, Some((plan.towers.tensors, plan.towers.weights, plan.towers.bytes)), "{}", case.name);
        assert_eq!((found.parameters, found.bits_per_weight), (plan.parameters, plan.bits_per_weight()));
        println!("{:<20} {} tensors", case.name, ours.len());
    }
}

#[test]
fn sums_tell_the_towers_apart() {
    let case = Case::of("qwen3_5");
    let at = tempfile::tempdir().unwrap();
    let model = case.write(&at.path().join("source"));
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    let alone = Plan::new(&model.checkpoint, &model.config, text_only(quantize(4, 64))).unwrap();
    let own = case.source.iter().filter(|(name, _)| name.contains("visual"));
    let elements: usize = own.clone().map(|(_, (_, shape))| shape.iter().product::<usize>()).sum();
    assert_eq!((plan.towers.tensors, plan.towers.bytes), (own.count(), elements as u64 * 2));
    assert_eq!(plan.towers.bytes + alone.layout.tensor_bytes(), plan.layout.tensor_bytes());
    assert_eq!(plan.language_bits_per_weight(), alone.bits_per_weight());
    assert!(plan.bits_per_weight() > alone.bits_per_weight());
    assert_eq!(plan.report().towers, Some(plan.towers));
    assert_eq!(alone.report().towers, None);
    let note = alone.notes.join("\n");
    assert!(note.contains(&format!("{} tensors of vision or audio", plan.towers.tensors)), "{note}");
    assert!(!plan.notes.join("\n").contains("dropped"), "{:?}", plan.notes);
    let target = at.path().join("out");
    convert(&model, &plan, &*target, 2, &Silent).unwrap();
    let found = inspect(&open_path(&target).unwrap()).unwrap();
    assert_eq!(
        found.towers.map(|towers| (towers.tensors, towers.weights, towers.bytes)),
        Some((plan.towers.tensors, plan.towers.weights, plan.towers.bytes))
    );
    assert_eq!((found.parameters, found.bits_per_weight), (plan.parameters, plan.bits_per_weight()));
}

/// Calibrated methods on the language model within: the bytes that they give without, and towers as they were.
#[test]
fn methods_keep_towers() {
    for name in ["gemma3", "qwen3_5", "qwen2_5_vl"] {
        let case = Case::of(name);
        let at = tempfile::tempdir().unwrap();
        let model = case.write(&at.path().join("source"));
        let run = |settings: Settings, name: &str, recipe: &str| {
            let dwq =
                DwqSettings { iterations: 2, batch_size: 2, validate_every: 1, ..DwqSettings::default() };
            let lessons = Some((windows(&model, 1, 4, 32), windows(&model, 2, 2, 32)));
            let how = QuantizeSettings {
                threads: 2,
                dwq,
                lessons,
                ..QuantizeSettings::new(recipe.parse().unwrap())
            };
            let plan = Plan::new(&model.checkpoint, &model.config, settings).unwrap();
            let target = at.path().join(name);
            calibrate(&model, &plan, &windows(&model, 3, 4, 32), &*target, &how, &Silent).unwrap();
            open_path(&target).unwrap()
        };
        let seeing = run(quantize(3, 32), "seeing", "awq+gptq");
        let blind = run(text_only(quantize(3, 32)), "blind", "awq+gptq");
        let ours = listed(&seeing.checkpoint);
        assert_eq!(
            language(ours.clone(), name == "gemma3"),
            language(listed(&blind.checkpoint), false),
            "{name}"
        );
        let towers = |listed: &BTreeMap<String, String>| {
            let mut own = listed.clone();
            own.retain(|name, _| !name.starts_with("language_model."));
            own
        };
        assert_eq!(towers(&ours), towers(&case.right), "{name}");
        let twice = |listed: &BTreeMap<String, String>| {
            let of = |path: &str, leaf: &str| listed.get(&format!("language_model.{path}.{leaf}")).cloned();
            name != "gemma3"
                || ["weight", "scales", "biases"].iter().all(|leaf| {
                    of("lm_head", leaf).is_some() && of("lm_head", leaf) == of("model.embed_tokens", leaf)
                })
        };
        assert!(twice(&ours), "{name}");
        // Distilling, from the original and from what is quantized already.
        let trained = listed(&run(quantize(3, 32), "trained", "awq+dwq").checkpoint);
        let alone = listed(&run(text_only(quantize(3, 32)), "trained-blind", "awq+dwq").checkpoint);
        assert_eq!(towers(&trained), towers(&case.right), "{name}");
        assert!(twice(&trained), "{name}");
        assert_eq!(language(trained, name == "gemma3"), language(alone, false), "{name}");
        let plan = Settings { keep_dtypes: true, ..Settings::default() };
        let plan = Plan::new(&seeing.checkpoint, &seeing.config, plan).unwrap();
        let how = QuantizeSettings {
            threads: 2,
            dwq: DwqSettings { iterations: 2, batch_size: 2, validate_every: 1, ..DwqSettings::default() },
            lessons: Some((windows(&model, 1, 4, 32), windows(&model, 2, 2, 32))),
            ..QuantizeSettings::new("dwq".parse().unwrap())
        };
        let target = at.path().join("taught");
        distill(Some(&model), &seeing, &plan, &windows(&model, 3, 4, 32), &*target, &how, &Silent).unwrap();
        let taught = open_path(&target).unwrap();
        assert_eq!(towers(&listed(&taught.checkpoint)), towers(&case.right), "{name}");
        assert!(twice(&listed(&taught.checkpoint)), "{name}");
        assert_eq!(taught.config.0["vision_config"], case.config["vision_config"]);
    }
}

/// A run that was stopped goes on, and a table that is written twice is the same in both places.
#[test]
fn an_interrupted_conversion_goes_on() {
    let case = Case::of("gemma3");
    let at = tempfile::tempdir().unwrap();
    let model = case.write(&at.path().join("source"));
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    let target = at.path().join("out");
    let stopped = convert(&model, &plan, &*target, 1, &Stopper(0.into()));
    assert!(stopped.is_err() && !target.exists());
    convert(&model, &plan, &*target, 1, &Silent).unwrap();
    assert_eq!(listed(&open_path(&target).unwrap().checkpoint), case.right);
}

/// Half a tower is no tower: it is refused, and the language model alone can be had.
#[test]
fn a_tower_with_a_gap_is_refused() {
    let at = tempfile::tempdir().unwrap();
    for (gone, said) in [
        ("visual.blocks.0.attn.qkv.weight", "vision_tower.blocks.0.attn.qkv.weight is missing"),
        ("visual.blocks.1.", "vision_tower.blocks.1.attn.proj.bias is missing"),
    ] {
        let mut case = Case::of("qwen2_5_vl");
        let before = case.source.len();
        case.source.retain(|name, _| !name.starts_with(gone));
        assert!(case.source.len() < before);
        let model = case.write(&at.path().join(gone));
        let error = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("; hint: "), "{error}");
        Plan::new(&model.checkpoint, &model.config, text_only(quantize(4, 64))).unwrap();
        evaluate(&model, None, &windows(&model, 1, 1, 8), &EvaluationSettings::default(), &Silent).unwrap();
        let found = problems(&model).join("\n");
        assert!(
            found.contains(&said[..said.len() - " is missing".len()]) && found.contains("mlx_vlm"),
            "{found}"
        );
    }
}

/// An mlx-vlm build whose projector is packed: nothing of it is lost when it is copied, decoded or distilled.
#[test]
fn packed_projectors_are_carried_along() {
    let case = Case::of("kimi_k25");
    let at = tempfile::tempdir().unwrap();
    let model = case.write(&at.path().join("source"));
    convert_to(&model, quantize(4, 64), &at.path().join("dense")).unwrap();
    let dense = open_path(&at.path().join("dense")).unwrap();
    let name = "mm_projector.proj.2";
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (own, tensor) in dense.checkpoint.tensors() {
        if *own == format!("{name}.weight") {
            let [rows, columns] = tensor.shape[..] else { panic!("a matrix") };
            let groups = rows * columns / 64;
            let codes = (0..rows * columns / 8).flat_map(|word| (word as u32).to_le_bytes()).collect();
            let numbers = |value: f32| bf16_bytes(vec![value; groups]);
            tensors.push((own.clone(), Dtype::U32, vec![rows, columns / 8], codes));
            tensors.push((format!("{name}.scales"), Dtype::BF16, vec![rows, columns / 64], numbers(0.5)));
            tensors.push((format!("{name}.biases"), Dtype::BF16, vec![rows, columns / 64], numbers(-4.0)));
        } else {
            let bytes = dense.checkpoint.bytes(tensor).to_vec();
            tensors.push((own.clone(), tensor.dtype, tensor.shape.clone(), bytes));
        }
    }
    let list: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
        .collect();
    let config = Value::Object(dense.config.0.clone()).to_string();
    write_checkpoint(&at.path().join("packed"), &config, &list);
    let packed = open_path(&at.path().join("packed")).unwrap();
    let copied = convert_to(&packed, Settings::default(), &at.path().join("copied")).unwrap();
    assert_eq!(listed(&copied), listed(&packed.checkpoint));
    let decoded = Settings { dequantize: true, ..Settings::default() };
    let decoded = convert_to(&packed, decoded, &at.path().join("decoded")).unwrap();
    let weight = decoded.tensor(&format!("{name}.weight")).unwrap();
    assert_eq!(weight.dtype, Dtype::BF16);
    // The first word is 0: eight codes of 0, which decode to the bias.
    assert_eq!(&decoded.bytes(weight)[..16], &*bf16_bytes([-4.0; 8]));
    assert_eq!(problems(&packed), Vec::<String>::new());
    assert_eq!(json!(packed.config.0["vision_config"]), case.config["vision_config"]);
}
