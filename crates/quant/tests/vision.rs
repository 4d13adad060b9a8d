//! Vision and audio kept: what is written is what mlx-vlm's own conversion writes, and the language model is what it is without.
//!
//! `fixtures/vision` holds a listing for each wrapper, made by `scripts/vision.py` with mlx-vlm 0.7.10: config.json, the
//! tensors of a tiny checkpoint in the hub's form, and names, dtypes, shapes and SHA-256 of mlx-vlm's conversion at 4 bits.
//! The checkpoint's numbers follow from its names (`common/listing.rs`), so that no weights have to be kept.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::listing::{Listing, listed};
use common::{Stopper, write_checkpoint};
use common::{bf16_bytes, convert_to, fixtures, open_path, quantize, random_windows as windows};
use mlx_format::Dtype;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::inspect::{inspect, verify};
use mlx_quant::session::distill;
use mlx_quant::{
    EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, convert, evaluate,
    quantize as calibrate,
};
use serde_json::{Value, json};

/// A listing of a wrapper.
struct Case(Listing);

impl std::ops::Deref for Case {
    type Target = Listing;

    fn deref(&self) -> &Listing {
        &self.0
    }
}

impl std::ops::DerefMut for Case {
    fn deref_mut(&mut self) -> &mut Listing {
        &mut self.0
    }
}

impl Case {
    fn all() -> Vec<Self> {
        let cases: Vec<Self> = Listing::all("vision", "mlx_vlm").into_iter().map(Self).collect();
        assert!(cases.len() >= 22, "{}", cases.len());
        cases
    }

    fn of(name: &str) -> Self {
        Self(Listing::read(&fixtures().join(format!("vision/{name}.json")), "mlx_vlm"))
    }

    /// Writes the checkpoint, with a file of the processor beside it.
    fn write(&self, at: &Path) -> Model {
        let model = self.0.write(at);
        std::fs::write(at.join("preprocessor_config.json"), "{}").unwrap();
        model
    }

    /// Whether mlx-lm has no model of its type.
    fn is_mlx_vlms(&self) -> bool {
        let types = ["glm4v", "internvl", "lfm2_vl", "idefics3", "smolvlm"];
        types.iter().any(|own| self.config["model_type"] == **own)
    }
}

/// Whether a tensor is of a part that sees or hears, by mlx-vlm's names.
fn is_tower(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    [
        "vision_",
        "audio_",
        "embed_vision.",
        "embed_audio.",
        "multi_modal_projector.",
        "mm_projector.",
        "connector.",
    ]
    .iter()
    .any(|part| name.starts_with(part))
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
    let is_head = |name: &str| repeats && name.starts_with("language_model.lm_head.");
    listed.retain(|name, _| !(is_tower(name) || is_head(name)));
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
        assert_eq!(card.contains("mlx_lm.generate"), !case.is_mlx_vlms(), "{card}");
        let figures = |of: &Model| {
            let settings = EvaluationSettings::default();
            let total =
                evaluate(of, Some(&model), &windows(&model, 7, 2, 16), &settings, &Silent).unwrap().total;
            serde_json::to_value(total).unwrap()
        };
        let measured = figures(&out);
        assert!(measured["perplexity"].as_f64().is_some_and(f64::is_finite), "{}: {measured}", case.name);
        let alone = convert_to(&model, text_only(quantize(4, 64)), &plain);
        if case.is_mlx_vlms() {
            // Nothing would load the language model alone.
            let error = alone.unwrap_err().to_string();
            assert!(error.contains("leave out --text-only"), "{error}");
        } else {
            // The language model is what it is without.
            let alone = alone.unwrap();
            let repeats = case.name == "gemma3";
            assert_eq!(language(listed(&alone), false), language(ours.clone(), repeats), "{}", case.name);
            assert!(!alone.tensors().keys().any(|name| is_tower(name)), "{}", case.name);
            assert!(!plain.join("preprocessor_config.json").exists());
            let plain = open_path(&plain).unwrap();
            assert_eq!(plain.config.0.get("vision_config"), None);
            assert_eq!(measured, figures(&plain), "{}", case.name);
        }
        // What is written is read again, and nothing turned twice.
        let again = convert_to(&out, Settings::default(), &at.path().join("again")).unwrap();
        assert_eq!(listed(&again), ours, "{}", case.name);
        assert_eq!(problems(&out), Vec::<String>::new(), "{}", case.name);
        let loader = if case.is_mlx_vlms() { "mlx_vlm" } else { "mlx_lm" };
        assert_eq!(verify(&out, &Silent, 1).unwrap().loader, loader, "{}", case.name);
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
            own.retain(|name, _| is_tower(name));
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
