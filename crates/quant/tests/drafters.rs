//! Multi-token-prediction heads kept: what `--mtp` writes is what mlx-vlm's own splitter makes of them.
//!
//! `fixtures/drafters` holds a listing for each drafter, made by `scripts/drafters.py` with mlx-vlm 0.7.10: config.json and
//! tensors of a tiny checkpoint in the hub's form, and config.json, names, dtypes, shapes and SHA-256 of its drafter at
//! 8 bits.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use common::listing::{Listing, listed};
use common::{Stopper, convert_to, open_path, quantize};
use mlx_format::checkpoint::Destination;
use mlx_quant::plan::DrafterPlan;
use mlx_quant::{Model, Plan, Settings, Silent, drafter, replace};
use serde_json::Value;

fn cases() -> Vec<Listing> {
    let cases = Listing::all("drafters", "drafter");
    assert!(cases.len() >= 5, "{}", cases.len());
    cases
}

fn of(name: &str) -> Listing {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

fn with_heads(bits: u32) -> Settings {
    Settings { mtp: true, ..quantize(bits, 64) }
}

fn planned(model: &Model, settings: Settings) -> Plan {
    Plan::new(&model.checkpoint, &model.config, settings).unwrap()
}

fn refused(model: &Model) -> String {
    let error = Plan::new(&model.checkpoint, &model.config, with_heads(4)).unwrap_err();
    assert!(mlx_quant::Error::from(error).is_refusal());
    let error = Plan::new(&model.checkpoint, &model.config, with_heads(4)).unwrap_err().to_string();
    assert!(error.contains("; hint: ") && error.contains("--mtp"), "{error}");
    error
}

#[test]
fn every_drafter_is_what_mlx_vlm_makes() {
    for case in cases() {
        let at = tempfile::tempdir().unwrap();
        let model = case.write(&at.path().join("source"));
        std::fs::write(at.path().join("source/vocab.json"), "{}").unwrap();
        std::fs::write(at.path().join("source/added_tokens.json"), "{}").unwrap();
        let plan = planned(&model, with_heads(4));
        let own = plan.drafter.as_deref().unwrap();
        let place = drafter::path(&at.path().join("out"));
        assert_eq!(place, at.path().join("out-mtp"));
        assert!(drafter::write(&model, own, (&*place).into(), 2, &Silent).unwrap());
        let written = open_path(&place).unwrap();
        let ours = listed(&written.checkpoint);
        for name in case.right.keys().chain(ours.keys()) {
            assert_eq!(ours.get(name), case.right.get(name), "{}: {name}", case.name);
        }
        let Value::Object(wanted) = &case.all["drafter_config"] else { panic!("{}", case.name) };
        for (key, value) in wanted {
            assert_eq!(written.config.0.get(key), Some(value), "{}: {key}", case.name);
        }
        assert!(place.join("vocab.json").is_file() && !place.join("added_tokens.json").exists());
        let report = plan.report().drafter.unwrap();
        let file = place.join("model.safetensors").metadata().unwrap().len();
        assert_eq!((report.tensors, report.output_bytes), (ours.len(), file), "{}", case.name);
        // The model is what it is without, and says where its head is.
        let without = convert_to(&model, quantize(4, 64), &at.path().join("without")).unwrap();
        let with = convert_to(&model, with_heads(4), &at.path().join("out")).unwrap();
        assert_eq!(listed(&with), listed(&without), "{}", case.name);
        let card = |name: &str| std::fs::read_to_string(at.path().join(name).join("README.md")).unwrap();
        assert!(card("out").contains("`-mtp` behind it") && card("without").contains("is left out"));
        assert!(card("out-mtp").contains("--draft-kind mtp") && !card("out-mtp").contains("mlx_lm"));
        println!("{:<20} {} tensors", case.name, ours.len());
    }
}

/// Without -q heads stay in 16 bits, as mlx-vlm's own `--mtp` leaves them.
#[test]
fn heads_of_a_model_that_is_not_quantized_are_not() {
    let case = of("qwen3_5");
    let at = tempfile::tempdir().unwrap();
    let model = case.write(&at.path().join("source"));
    let plan = planned(&model, Settings { mtp: true, ..Settings::default() });
    let own = plan.drafter.as_deref().unwrap();
    let place = at.path().join("x-mtp");
    drafter::write(&model, own, (&*place).into(), 1, &Silent).unwrap();
    let written = open_path(&place).unwrap();
    assert!(written.checkpoint.tensors().values().all(|tensor| tensor.dtype == mlx_format::Dtype::BF16));
    assert_eq!(written.config.0.get("quantization"), None);
    // Norms multiply by `1 + w` on the hub, by `w` in MLX.
    let first = |model: &Model, name: &str| {
        let tensor = model.checkpoint.tensor(name).unwrap();
        let bytes = model.checkpoint.bytes(tensor);
        half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    };
    let own = first(&model, "mtp.norm.weight");
    assert!((first(&written, "norm.weight") - own - 1.0).abs() < 0.02, "{own}");
    assert!(plan.report().drafter.unwrap().bits_per_weight > 15.9);
}

#[test]
fn what_nothing_loads_is_refused() {
    let at = tempfile::tempdir().unwrap();
    let mut case = of("qwen3_5");
    case.source.retain(|name, _| !name.starts_with("mtp."));
    let model = case.write(&at.path().join("none"));
    assert!(refused(&model).contains("holds no multi-token-prediction heads"));
    assert!(planned(&model, quantize(4, 64)).drafter.is_none());
    let mut case = of("qwen3_5_moe");
    case.source.remove("mtp.layers.0.self_attn.k_norm.weight").unwrap();
    let said = refused(&case.write(&at.path().join("half")));
    assert!(said.contains("layers.0.self_attn.k_norm.weight is missing"), "{said}");
    let mut case = of("nemotron_h");
    case.source.insert("mtp.layers.0.extra.weight".to_owned(), (mlx_format::Dtype::BF16, vec![8]));
    let said = refused(&case.write(&at.path().join("more")));
    assert!(said.contains("layers.0.extra.weight is unknown"), "{said}");
    // Types whose heads mlx-vlm splits and does not load, and those that it does not know.
    let mut case = of("glm_moe_dsa");
    case.source.retain(|name, _| !name.contains("indexer"));
    case.config["model_type"] = "glm4_moe_lite".into();
    let said = refused(&case.write(&at.path().join("lite")));
    assert!(
        said.contains("\"glm4_moe_lite\"") && said.contains("no model of type glm4_moe_lite_mtp"),
        "{said}"
    );
    case.config["model_type"] = "deepseek_v3".into();
    let said = refused(&case.write(&at.path().join("deepseek")));
    assert!(said.contains("\"deepseek_v3\"") && said.contains("no drafter of this type"), "{said}");
    // More layers than mlx-vlm's classes have.
    for (name, within, key) in [
        ("glm_moe_dsa", None, "num_nextn_predict_layers"),
        ("qwen3_5", Some("text_config"), "mtp_num_hidden_layers"),
    ] {
        let mut case = of(name);
        let config = match within {
            Some(within) => &mut case.config[within],
            None => &mut case.config,
        };
        config[key] = 2.into();
        let deep = case.write(&at.path().join(format!("deep-{name}")));
        let error = Plan::new(&deep.checkpoint, &deep.config, with_heads(4)).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
    // Of a model that is quantized already there is no original.
    let case = of("qwen3_next");
    let model = case.write(&at.path().join("source"));
    convert_to(&model, quantize(4, 64), &at.path().join("out")).unwrap();
    let out = open_path(&at.path().join("out")).unwrap();
    let settings = Settings { mtp: true, ..Settings::default() };
    let error = Plan::new(&out.checkpoint, &out.config, settings).unwrap_err().to_string();
    assert!(error.contains("is quantized already"), "{error}");
}

/// Whole or not at all; a directory that is in the way is refused, unless the same run has written it.
#[test]
fn a_drafter_is_written_once() {
    let case = of("qwen3_next");
    let at = tempfile::tempdir().unwrap();
    let model = case.write(&at.path().join("source"));
    let plan = planned(&model, with_heads(4));
    let own: &DrafterPlan = plan.drafter.as_deref().unwrap();
    let place = at.path().join("out-mtp");
    let target = Destination::from(&place);
    // Stopped and gone on with.
    let stopped = drafter::write(&model, own, target, 1, &Stopper(0.into()));
    assert!(stopped.is_err() && !place.exists());
    assert!(drafter::write(&model, own, target, 1, &Silent).unwrap());
    let first = std::fs::metadata(place.join("model.safetensors")).unwrap().modified().unwrap();
    // The same again.
    drafter::check(target).unwrap();
    assert!(!drafter::write(&model, own, target, 2, &Silent).unwrap());
    assert_eq!(std::fs::metadata(place.join("model.safetensors")).unwrap().modified().unwrap(), first);
    // Another one.
    let other = planned(&model, Settings { mtp: true, ..Settings::default() });
    let other = other.drafter.as_deref().unwrap();
    let error = drafter::write(&model, other, target, 1, &Silent).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("out-mtp"), "{error}");
    let replacing = Destination { replaces: Some(replace::replaceable), ..target };
    assert!(!drafter::write(&model, other, replacing, 1, &Silent).unwrap());
    assert!(open_path(&place).unwrap().config.0.get("quantization").is_none());
    // A part of it is gone.
    std::fs::write(place.join("model.safetensors"), "").unwrap();
    assert!(drafter::write(&model, other, target, 1, &Silent).is_err());
    drafter::discard(&place).unwrap();
    let left = || std::fs::read_dir(at.path()).unwrap().count();
    assert_eq!(left(), 1, "the source");
    // Somebody else's.
    std::fs::create_dir(&place).unwrap();
    assert!(drafter::check(target).unwrap_err().is_refusal());
    assert!(drafter::write(&model, own, replacing, 1, &Silent).unwrap_err().is_refusal());
    assert_eq!(left(), 2);
}
