//! Types that are another type under a name of their own: the same checkpoint gives the same bytes and figures.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use common::{convert_to, fixtures, open_path, quantize, random_windows as windows, shared};
use mlx_format::checkpoint::Config;
use mlx_quant::{EvaluationSettings, Model, Plan, QuantizeSettings, Silent, evaluate, quantize as calibrate};
use serde_json::{Value, json};

/// A checkpoint with some keys of its config.json changed.
fn with(path: &Path, keys: &Value) -> Model {
    let mut model = open_path(path).unwrap();
    let mut config = model.config.0.clone();
    config.extend(keys.as_object().unwrap().clone());
    model.config = Config(config);
    model
}

/// What it measures, and what `gptq` writes.
fn runs(model: &Model, at: &Path) -> (Value, Vec<u8>) {
    let held_out = windows(model, 7, 3, 40);
    let measured = evaluate(model, None, &held_out, &EvaluationSettings::default(), &Silent).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 32)).unwrap();
    let settings = QuantizeSettings { threads: 2, ..QuantizeSettings::new("gptq".parse().unwrap()) };
    calibrate(model, &plan, &windows(model, 3, 3, 40), at, &settings, &Silent).unwrap();
    (serde_json::to_value(measured.total).unwrap(), std::fs::read(at.join("model.safetensors")).unwrap())
}

/// Holds a checkpoint with `variant` keys against the same with `plain` ones.
fn alike(path: &Path, plain: &Value, variant: &Value) {
    let at = tempfile::tempdir().unwrap();
    let (plain, variant) = (with(path, plain), with(path, variant));
    let write = |model: &Model, name: &str| {
        convert_to(model, quantize(4, 32), &at.path().join(name)).unwrap();
        std::fs::read(at.path().join(name).join("model.safetensors")).unwrap()
    };
    assert!(write(&plain, "a") == write(&variant, "b"), "convert: {}", path.display());
    let (right, ours) = (runs(&plain, &at.path().join("c")), runs(&variant, &at.path().join("d")));
    assert_eq!(ours.0, right.0, "{}", path.display());
    assert!(ours.1 == right.1, "gptq: {}", path.display());
}

#[test]
fn glm_4_7_flash_is_a_deepseek_v3() {
    let path = fixtures().join("zoo/deepseek_v3");
    alike(&path, &json!({}), &json!({"model_type": "glm4_moe_lite"}));
    // Its own defaults: one dense layer, a rotary base of a million.
    let said = json!({"first_k_dense_replace": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-5});
    let silent = json!({"model_type": "glm4_moe_lite", "first_k_dense_replace": null, "rope_theta": null, "rms_norm_eps": null});
    alike(&path, &said, &silent);
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn solar_open_is_a_glm_4_moe() {
    let path = shared().join("zoo/glm4_moe");
    alike(&path, &json!({}), &json!({"model_type": "solar_open"}));
    // Whole heads turn where its config does not say.
    let silent = json!({"model_type": "solar_open", "partial_rotary_factor": null});
    alike(&path, &json!({"partial_rotary_factor": 1.0}), &silent);
}

#[test]
fn mellum_is_a_qwen3_moe_of_two_kinds_of_layers() {
    let path = fixtures().join("zoo/qwen3_moe");
    let kinds = |full: f64, sliding: f64| {
        json!({"full_attention": {"rope_type": "default", "rope_theta": full},
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding}})
    };
    let mellum = |kind: &str, ropes: Value| json!({"model_type": "mellum", "layer_types": [kind, kind, kind], "rope_parameters": ropes, "sliding_window": 8});
    alike(&path, &json!({"rope_theta": 3e5}), &mellum("full_attention", kinds(3e5, 1e4)));
    let windowed = json!({"rope_theta": 2e4, "use_sliding_window": true, "sliding_window": 8});
    alike(&path, &windowed, &mellum("sliding_attention", kinds(5e5, 2e4)));
}
