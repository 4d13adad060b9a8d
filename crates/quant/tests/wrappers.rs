//! Language models within wrappers that see: what is written and what is measured is what the language model alone gives.
//!
//! The parts beside it are left out; what keeping them gives is in `vision.rs`. Each checkpoint is one of the zoo, renamed, its config nested, with a tower beside it. What mlx-lm's own classes make of
//! such is held against ours by the project's audit (`../shared/tools/breadth`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{
    bf16_bytes, convert_to, fixtures, open_path, random_windows as windows, shared, write_checkpoint,
};
use mlx_format::Dtype;
use mlx_format::checkpoint::Checkpoint;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::dynamic::{SensitivitySettings, sensitivities};
use mlx_quant::model::expected_headers;
use mlx_quant::plan::PlanError;
use mlx_quant::{
    EvaluationSettings, Model, Plan, QuantizeSettings, Settings, Silent, evaluate, quantize as calibrate,
};
use serde_json::{Value, json};

/// A tensor: dtype, shape, bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// The wrapper's type, the checkpoint of the zoo that lies inside, and the type that `text_config` gives it.
type Case = (&'static str, &'static str, &'static str);

/// Of the copied checkpoints.
const COPIED: [Case; 5] = [
    ("kimi_k25", "deepseek_v3", "kimi_k2"),
    ("kimi_vl", "deepseek_v3", "deepseek_v3"),
    ("llava", "llama_tied", "llama"),
    ("mistral3", "llama_tied", "mistral"),
    ("qwen3_vl_moe", "qwen3_moe", "qwen3_vl_moe_text"),
];

/// Of the others.
const SHARED: [Case; 11] = [
    ("gemma3", "gemma3_text", "gemma3_text"),
    ("gemma4", "gemma4_text", "gemma4_text"),
    ("gemma4_unified", "gemma4_text", "gemma4_unified_text"),
    ("qwen2_vl", "qwen2", "qwen2_vl_text"),
    ("qwen2_5_vl", "qwen2", "qwen2_5_vl_text"),
    ("qwen3_vl", "qwen3", "qwen3_vl_text"),
    ("mistral3", "mistral", "mistral"),
    ("mistral3", "ministral3", "ministral3"),
    ("llava", "mistral", "mistral"),
    ("pixtral", "mistral", "mistral"),
    ("pixtral", "llama", "llama"),
];

/// What stands before `model.` and before `lm_head` in the names of a wrapper's checkpoint.
const SPELLINGS: [(&str, &str); 3] = [
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.", "lm_head."),
];

const TOWERS: [&str; 4] = [
    "vision_tower.encoder.layers.0.self_attn.k_proj.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "multi_modal_projector.linear_1.weight",
    "model.embed_vision.embedding_projection.weight",
];

/// Settings of `-q --text-only`.
fn quantize(bits: u32, group_size: usize) -> Settings {
    Settings { text_only: true, ..common::quantize(bits, group_size) }
}

fn spelt(name: &str, (model, head): (&str, &str)) -> String {
    let other = |from: &str, to: &str| Some(format!("{to}{}", name.strip_prefix(from)?));
    other("model.", model).or_else(|| other("lm_head.", head)).unwrap()
}

fn tensors(checkpoint: &Checkpoint) -> BTreeMap<String, Tensor> {
    let tensor = |(name, tensor): (&String, &mlx_format::checkpoint::Tensor)| {
        (name.clone(), (tensor.dtype, tensor.shape.clone(), checkpoint.bytes(tensor).to_vec()))
    };
    checkpoint.tensors().iter().map(tensor).collect()
}

/// Rows and columns of a matrix exchanged.
fn turned((dtype, shape, bytes): &Tensor) -> Tensor {
    let ([rows, columns], size) = (<[usize; 2]>::try_from(shape.clone()).unwrap(), bytes.len());
    let element = size / rows / columns;
    let at = |column, row| &bytes[(row * columns + column) * element..][..element];
    let turned = (0..columns).flat_map(|column| (0..rows).flat_map(move |row| at(column, row).to_vec()));
    (*dtype, vec![columns, rows], turned.collect())
}

/// Experts one by one as Qwen3-VL has them: all in one tensor, turned, gate and up side by side.
fn fused(mut plain: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let first = |name: &String| name.strip_suffix(".experts.0.gate_proj.weight").map(str::to_owned);
    for layer in plain.keys().filter_map(first).collect::<Vec<_>>() {
        let mut stack = |part: &str| -> Vec<Tensor> {
            let name = |index: usize| format!("{layer}.experts.{index}.{part}.weight");
            (0..).map_while(|index| plain.remove(&name(index))).collect()
        };
        let (gates, ups, downs) = (stack("gate_proj"), stack("up_proj"), stack("down_proj"));
        let joined = gates.iter().zip(&ups).map(|(gate, up)| {
            let rows = vec![gate.1[0] + up.1[0], gate.1[1]];
            turned(&(gate.0, rows, [gate.2.clone(), up.2.clone()].concat()))
        });
        let all = |parts: Vec<Tensor>| {
            let shape = [&[parts.len()][..], &parts[0].1].concat();
            (parts[0].0, shape, parts.iter().flat_map(|part| part.2.clone()).collect())
        };
        plain.insert(format!("{layer}.experts.gate_up_proj"), all(joined.collect()));
        plain.insert(format!("{layer}.experts.down_proj"), all(downs.iter().map(turned).collect()));
    }
    plain
}

/// config.json of the language model within a wrapper.
fn nested(plain: &Model, (wrapper, _, text_type): Case) -> Value {
    let mut text = plain.config.0.clone();
    text.insert("model_type".to_owned(), text_type.into());
    text.shift_remove("architectures");
    json!({"model_type": wrapper, "text_config": text, "vision_config": {"hidden_size": 8}, "torch_dtype": "bfloat16",
        "vocab_size": text["vocab_size"]})
}

/// Writes a wrapper around the language model of `plain`.
fn wrap(plain: &Model, case: Case, spelling: (&str, &str), config: &Value, at: &Path) -> Model {
    let own = tensors(&plain.checkpoint);
    let own = if case.0 == "qwen3_vl_moe" { fused(own) } else { own };
    let mut all: BTreeMap<String, Tensor> =
        own.into_iter().map(|(name, tensor)| (spelt(&name, spelling), tensor)).collect();
    for name in TOWERS {
        let grid = (0..64 * 64).map(|index| index as f32 / 4096.0);
        all.insert(name.to_owned(), (Dtype::BF16, vec![64, 64], bf16_bytes(grid)));
    }
    let list: Vec<_> = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
        .collect();
    write_checkpoint(at, &config.to_string(), &list);
    open_path(at).unwrap()
}

fn figures(model: &Model, reference: &Model) -> Value {
    let windows = windows(model, 7, 4, 32);
    let settings = EvaluationSettings::default();
    serde_json::to_value(evaluate(model, Some(reference), &windows, &settings, &Silent).unwrap().total)
        .unwrap()
}

/// By the names of the language model alone.
fn unwrapped(written: &Checkpoint) -> BTreeMap<String, Tensor> {
    let name = |name: String| name.strip_prefix("language_model.").map(str::to_owned).unwrap_or(name);
    tensors(written).into_iter().map(|(own, tensor)| (name(own), tensor)).collect()
}

/// A wrapper in each spelling converts to what its language model alone converts to, and is measured as that.
fn converts_alike(zoo: &Path, case: Case) {
    let plain = open_path(&zoo.join(case.1)).unwrap();
    let at = tempfile::tempdir().unwrap();
    let right = convert_to(&plain, quantize(4, 32), &at.path().join("plain")).unwrap();
    let quantized = open_path(&at.path().join("plain")).unwrap();
    let measured = figures(&quantized, &plain);
    for (index, spelling) in SPELLINGS.into_iter().enumerate() {
        let config = nested(&plain, case);
        let model = wrap(&plain, case, spelling, &config, &at.path().join(format!("wrapper-{index}")));
        let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 32)).unwrap();
        let said = plan.notes.join("\n");
        assert!(
            said.contains("4 tensors of vision or audio (") && said.contains("are dropped"),
            "{case:?}: {said}"
        );
        let target = at.path().join(format!("out-{index}"));
        let written = convert_to(&model, quantize(4, 32), &target).unwrap();
        assert!(written.tensors().keys().all(|name| name.starts_with("language_model.")), "{case:?}");
        assert!(unwrapped(&written) == tensors(&right), "{case:?} {spelling:?}");
        let out = open_path(&target).unwrap();
        assert_eq!(figures(&out, &model), measured, "{case:?} {spelling:?}");
        let config = |model: &Model| Value::Object(model.config.0.clone());
        let (inner, outer) = (config(&quantized), config(&out));
        assert_eq!((&outer["model_type"], outer.get("vision_config")), (&json!(case.0), None));
        let entries = |config: &Value| -> BTreeMap<String, Value> {
            let map = config["quantization"].as_object().unwrap();
            let own = |name: &String| name.trim_start_matches("language_model.").to_owned();
            map.iter().map(|(name, entry)| (own(name), entry.clone())).collect()
        };
        assert_eq!(entries(&outer), entries(&inner), "{case:?}");
        // What is written is a wrapper again, its names MLX's.
        let again = convert_to(&out, Settings::default(), &at.path().join(format!("again-{index}"))).unwrap();
        assert!(tensors(&again) == tensors(&written), "{case:?} {spelling:?}");
    }
    println!("{:<15} {:<12} {} tensors", case.0, case.1, right.tensors().len());
}

/// The same of every calibrated method.
fn calibrates_alike(zoo: &Path, case: Case) {
    let plain = open_path(&zoo.join(case.1)).unwrap();
    let at = tempfile::tempdir().unwrap();
    let config = nested(&plain, case);
    let model = wrap(&plain, case, SPELLINGS[1], &config, &at.path().join("wrapper"));
    let run = |model: &Model, name: &str| {
        let dwq = DwqSettings { iterations: 2, batch_size: 2, validate_every: 1, ..DwqSettings::default() };
        let lessons = Some((windows(model, 1, 4, 32), windows(model, 2, 2, 32)));
        let recipe = "awq+gptq+dwq".parse().unwrap();
        let settings = QuantizeSettings { threads: 2, dwq, lessons, ..QuantizeSettings::new(recipe) };
        let plan = Plan::new(&model.checkpoint, &model.config, quantize(3, 32)).unwrap();
        let target = at.path().join(name);
        calibrate(model, &plan, &windows(model, 3, 4, 32), &target, &settings, &Silent).unwrap();
        let out = open_path(&target).unwrap();
        (unwrapped(&out.checkpoint), figures(&out, model))
    };
    let (ours, right) = (run(&model, "out"), run(&plain, "plain"));
    assert!(ours.0 == right.0, "{case:?}: bytes");
    assert_eq!(ours.1, right.1, "{case:?}: figures");
    let sensitive = |model: &Model| {
        let windows = windows(model, 5, 2, 32);
        let found = sensitivities(model, &windows, &SensitivitySettings::default(), None, &Silent).unwrap();
        let layer = |layer: mlx_quant::dynamic::Layer| {
            let path = layer.path.trim_start_matches("language_model.").to_owned();
            let value = serde_json::to_value(mlx_quant::dynamic::Layer { path: path.clone(), ..layer });
            (path, value.unwrap())
        };
        found.layers.into_iter().map(layer).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(sensitive(&model), sensitive(&plain), "{case:?}: sensitivities");
    println!("{:<15} {:<12} kl {}", case.0, case.1, ours.1["against"]["kl_mean"]);
}

#[test]
fn the_copied_checkpoints_convert_alike() {
    for case in COPIED {
        converts_alike(&fixtures().join("zoo"), case);
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_wrapper_converts_alike() {
    for case in SHARED {
        converts_alike(&shared().join("zoo"), case);
    }
}

#[test]
fn the_copied_checkpoints_calibrate_alike() {
    for case in COPIED {
        calibrates_alike(&fixtures().join("zoo"), case);
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_wrapper_calibrates_alike() {
    for case in SHARED {
        calibrates_alike(&shared().join("zoo"), case);
    }
}

#[test]
fn config_alone_tells_every_tensor() {
    for case in COPIED {
        let plain = open_path(&fixtures().join("zoo").join(case.1)).unwrap();
        let config =
            |value: Value| mlx_format::checkpoint::Config::parse(value.to_string().as_bytes()).unwrap();
        let own = expected_headers(&plain.config).unwrap().unwrap();
        let own: BTreeMap<_, _> =
            own.into_iter().map(|(name, shape)| (format!("language_model.{name}"), shape)).collect();
        assert_eq!(expected_headers(&config(nested(&plain, case))).unwrap().unwrap(), own, "{case:?}");
    }
}

/// Sizes that the hub's configs leave out, because they are transformers' defaults.
#[test]
fn short_configs_of_the_hub() {
    let weights = |config: &Value| {
        let config = mlx_format::checkpoint::Config::parse(config.to_string().as_bytes()).unwrap();
        let headers = expected_headers(&config).unwrap().unwrap();
        headers.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>()
    };
    // Gemma 3 4B: 34 layers with 8 heads of 256, 4 of them for keys; 262,208 rows in the table.
    let gemma = json!({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}});
    let layer = 2560 * 256 * (8 + 4 + 4 + 8) + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256;
    assert_eq!(weights(&gemma), 262_208 * 2560 + 34 * layer + 2560);
    // LLaVA 1.5 7B: a Llama 2 7B with 64 more rows in its tables.
    let llava = json!({"model_type": "llava", "text_config": {"model_type": "llama", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "vocab_size": 32064}});
    assert_eq!(weights(&llava), 6_738_415_616 + 2 * 64 * 4096);
    // Pixtral 12B, without its number of heads.
    let pixtral = json!({"model_type": "pixtral", "text_config": {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128,
        "intermediate_size": 14336, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e9, "sliding_window": null, "vocab_size": 131_072}});
    assert_eq!(weights(&pixtral), 12_247_782_400);
}

/// Qwen2-VL as it was published: no `text_config`, no prefix.
#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn keys_and_names_side_by_side() {
    let plain = open_path(&shared().join("zoo/qwen2")).unwrap();
    let mut flat = plain.config.0.clone();
    flat.insert("model_type".to_owned(), "qwen2_5_vl".into());
    flat.insert("vision_config".to_owned(), json!({"hidden_size": 8}));
    let at = tempfile::tempdir().unwrap();
    let case = ("qwen2_5_vl", "qwen2", "");
    let model = wrap(&plain, case, SPELLINGS[2], &Value::Object(flat), &at.path().join("flat"));
    let right = convert_to(&plain, quantize(4, 32), &at.path().join("plain")).unwrap();
    let written = convert_to(&model, quantize(4, 32), &at.path().join("out")).unwrap();
    assert!(unwrapped(&written) == tensors(&right));
}

#[test]
fn what_mlx_lm_does_not_run_is_refused() {
    let plain = open_path(&fixtures().join("zoo/llama_tied")).unwrap();
    let at = tempfile::tempdir().unwrap();
    for (index, (case, why)) in [
        (("llava", "", "qwen2"), "within llava mlx_lm runs llama, mistral"),
        (("idefics2", "", "mistral"), "mlx_lm 0.32.2 has no model of this type"),
        (("internvl", "", "qwen2"), "within internvl mlx_vlm runs qwen3"),
    ]
    .into_iter()
    .enumerate()
    {
        let model =
            wrap(&plain, case, SPELLINGS[0], &nested(&plain, case), &at.path().join(index.to_string()));
        for settings in [quantize(4, 32), Settings::default()] {
            let error = Plan::new(&model.checkpoint, &model.config, settings).unwrap_err();
            let said = error.to_string();
            assert!(matches!(error, PlanError::NotRun { .. }) && said.contains("; hint: "), "{said}");
            assert!(said.contains(why), "{said}");
        }
        let windows = windows(&plain, 1, 1, 16);
        let error = evaluate(&model, None, &windows, &EvaluationSettings::default(), &Silent).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(why), "{error}");
    }
}

/// What nothing explains is no tower.
#[test]
fn tensors_beside_that_nobody_reads_are_named() {
    let plain = open_path(&fixtures().join("zoo/llama_tied")).unwrap();
    let at = tempfile::tempdir().unwrap();
    let model = wrap(&plain, COPIED[2], SPELLINGS[0], &nested(&plain, COPIED[2]), &at.path().join("one"));
    let mut all = tensors(&model.checkpoint);
    all.insert("image_newline".to_owned(), (Dtype::BF16, vec![8], vec![0; 16]));
    let list: Vec<_> = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), *dtype, shape.clone(), bytes.clone()))
        .collect();
    write_checkpoint(&at.path().join("two"), &nested(&plain, COPIED[2]).to_string(), &list);
    let model = open_path(&at.path().join("two")).unwrap();
    let error = Plan::new(&model.checkpoint, &model.config, quantize(4, 32)).unwrap_err().to_string();
    assert!(error.contains("image_newline (shape [8]) is read by no part of the model"), "{error}");
}
