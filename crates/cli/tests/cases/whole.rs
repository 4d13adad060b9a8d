//! A checkpoint is a whole model, or it is refused by name.

use serde_json::json;

use crate::model::{CONVERT, HIDDEN, damaged, done, llama, ones, random, raw, refused};

const EVAL: &str = "eval --model {model} --windows 1 --sequence-length 32";

#[test]
fn what_is_missing() {
    let at = tempfile::tempdir().unwrap();
    let each = [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ];
    for (index, name) in each.into_iter().enumerate() {
        let model = llama(2).without(name).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &[&format!("{name} is missing")]);
        refused("convert --model {model} --mlx-path {out}", &model, &[name]);
        refused("inspect {model} --verify", &model, &[name]);
    }
}

#[test]
fn biases_are_as_config_says() {
    let at = tempfile::tempdir().unwrap();
    let bias = |layer: usize, name: &str| format!("model.layers.{layer}.{name}.bias");
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("self_attn.{name}"));
    let width =
        |name: &str| if name.contains("k_proj") || name.contains("v_proj") { HIDDEN / 2 } else { HIDDEN };
    let with_biases = |layers: usize| {
        let mut made = llama(layers).set("attention_bias", json!(true));
        for (layer, name) in (0..layers).flat_map(|layer| names.iter().map(move |name| (layer, name))) {
            made.add(&bias(layer, name), ones(width(name)));
        }
        made
    };
    done(CONVERT, &with_biases(2).write(&at.path().join("all")));
    let half = with_biases(2).without(&bias(1, "self_attn.q_proj")).write(&at.path().join("half"));
    refused(CONVERT, &half, &[&format!("{} is missing", bias(1, "self_attn.q_proj"))]);
    let none = llama(1).set("attention_bias", json!(true)).write(&at.path().join("none"));
    refused(CONVERT, &none, &[&format!("{} is missing", bias(0, "self_attn.v_proj"))]);
    let unasked = with_biases(1).unset("attention_bias").write(&at.path().join("unasked"));
    refused(CONVERT, &unasked, &["q_proj.bias (shape [128]) is read by no part of the model"]);
    let network = llama(1).with(&bias(0, "mlp.down_proj"), ones(HIDDEN)).write(&at.path().join("network"));
    refused(CONVERT, &network, &["down_proj.bias"]);
}

#[test]
fn what_has_another_shape() {
    let at = tempfile::tempdir().unwrap();
    let each = [
        ("model.norm.weight", vec![HIDDEN / 2]),
        ("model.layers.0.self_attn.k_proj.weight", vec![HIDDEN, HIDDEN]),
        ("model.layers.1.mlp.up_proj.weight", vec![192, HIDDEN]),
        ("model.layers.1.mlp.down_proj.weight", vec![256, HIDDEN]),
        ("lm_head.weight", vec![500, HIDDEN]),
    ];
    for (index, (name, shape)) in each.into_iter().enumerate() {
        let model = llama(2).with(name, random(5, &shape)).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &[name, "config.json asks for"]);
    }
}

#[test]
fn what_nothing_reads() {
    let at = tempfile::tempdir().unwrap();
    let each = [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.1.mlp.up_proj.base_layer.weight",
        "score.weight",
        "optimizer.state.0.exp_avg",
        "model.layers.2.input_layernorm.weight",
        "model.vision_tower.patch.weight",
    ];
    for (index, name) in each.into_iter().enumerate() {
        let model = llama(2).with(name, random(6, &[8, HIDDEN])).write(&at.path().join(index.to_string()));
        let said =
            refused(CONVERT, &model, &[&format!("{name} (shape [8, 128]) is read by no part of the model")]);
        assert!(said.contains("--allow-unread"), "{said}");
        refused(EVAL, &model, &[name]);
        done(&format!("{EVAL} --allow-unread"), &model);
    }
    let model = at.path().join("0");
    let (out, _) = done(&format!("{CONVERT} --allow-unread"), &model);
    assert!(crate::model::read(&out).contains_key(each[0]), "carried along");
}

#[test]
fn ten_are_named_and_the_rest_counted() {
    let at = tempfile::tempdir().unwrap();
    let mut made = llama(2);
    made.add_layer(2);
    made.add_layer(3);
    let said = refused(CONVERT, &made.write(&at.path().join("two_more")), &["model.layers.2."]);
    assert!(said.contains("; and 8 more"), "{said}");
    assert_eq!(said.matches("is read by no part").count(), 10, "{said}");
}

#[test]
fn every_method_and_eval() {
    let at = tempfile::tempdir().unwrap();
    let without_norm = llama(2).without("model.norm.weight").write(&at.path().join("norm"));
    let without_head = llama(2).without("lm_head.weight").write(&at.path().join("head"));
    for command in ["awq", "gptq", "dynamic-quant", "dwq"] {
        let flags = "--model {model} --mlx-path {out} --n-samples 2 --sequence-length 32";
        refused(&format!("{command} {flags}"), &without_norm, &["model.norm.weight is missing"]);
        refused(&format!("{command} {flags}"), &without_head, &["lm_head.weight is missing"]);
    }
    refused(EVAL, &without_norm, &["model.norm.weight is missing"]);
    refused(EVAL, &without_head, &["lm_head.weight is missing"]);
    refused("recommend --model {model}", &without_head, &["lm_head.weight is missing"]);
}

#[test]
fn integers_that_nothing_explains() {
    let at = tempfile::tempdir().unwrap();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let each = [
        (q, raw("I8", &[HIDDEN, HIDDEN], 1)),
        (q, raw("U8", &[HIDDEN * HIDDEN / 2, 1], 7)),
        (q, raw("F8_E4M3", &[HIDDEN, HIDDEN], 0x38)),
        (q, raw("U32", &[HIDDEN, HIDDEN / 8], 3)),
        ("model.layers.0.self_attn.q_proj.qweight", raw("I32", &[HIDDEN / 8, HIDDEN], 3)),
    ];
    for (index, (name, tensor)) in each.into_iter().enumerate() {
        let model = llama(2).with(name, tensor).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &[name]);
        refused("convert --model {model} --mlx-path {out}", &model, &[name]);
    }
    // The same of a type that is not described.
    let made = llama(2).set("model_type", json!("minimax")).with(q, raw("I8", &[HIDDEN, HIDDEN], 1));
    refused(CONVERT, &made.write(&at.path().join("undescribed")), &[q, "is I8"]);
}

#[test]
fn who_quantized_it_is_named() {
    let at = tempfile::tempdir().unwrap();
    let packed = || llama(2).with("model.layers.0.self_attn.q_proj.qweight", raw("I32", &[16, HIDDEN], 3));
    let each = [
        (
            "quantize_config.json",
            json!({"bits": 4, "group_size": 128, "desc_act": false}),
            "packed by GPTQ: model.layers.0.self_attn.q_proj.scales is missing",
        ),
        (
            "quant_config.json",
            json!({"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}),
            "packed by AWQ: model.layers.0.self_attn.q_proj.scales is missing",
        ),
        (
            "hf_quant_config.json",
            json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4_AWQ"}}),
            "ModelOpt (NVFP4_AWQ)",
        ),
    ];
    for (file, content, says) in each {
        let model = packed().file(file, &content).write(&at.path().join(file.replace('.', "_")));
        refused(CONVERT, &model, &[says]);
        refused(EVAL, &model, &[says]);
    }
    // Beside plain weights such a file says nothing of them.
    let model = llama(2).file("quantize_config.json", json!({"bits": 4})).write(&at.path().join("plain"));
    done(CONVERT, &model);
}

#[test]
fn inner_widths_and_kernels_are_as_config_says() {
    let at = tempfile::tempdir().unwrap();
    for (index, width) in [128, 512, 257].into_iter().enumerate() {
        let model = llama(2).set("intermediate_size", json!(width)).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &["mlp.", &format!("config.json asks for [{width}, 128]")]);
    }
    for (zoo, says, key, value) in [
        ("qwen3_moe", "switch_mlp.", "moe_intermediate_size", 96),
        ("gpt2", "mlp.c_fc.weight", "n_inner", 64),
        ("gpt2", "wpe.weight", "n_positions", 33),
        ("deepseek_v3", "q_a_proj.weight", "q_lora_rank", 24),
    ] {
        let model = damaged(at.path(), zoo, |made| made.config[key] = json!(value));
        refused(CONVERT, &model, &[says]);
    }
}

#[test]
fn biases_of_families_that_always_have_them() {
    let at = tempfile::tempdir().unwrap();
    for (zoo, end) in [("gpt2", ".attn.c_attn.bias"), ("gpt2", ".ln_1.bias"), ("gpt_oss", ".o_proj.bias")] {
        let model = damaged(at.path(), zoo, |made| made.tensors.retain(|name, _| !name.ends_with(end)));
        refused(CONVERT, &model, &[end, "is missing"]);
    }
}

#[test]
fn what_is_read_as_a_number_is_one() {
    let at = tempfile::tempdir().unwrap();
    let (norm, q) = ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight");
    for (index, (name, dtype, shape)) in
        [(q, "I64", vec![HIDDEN, HIDDEN]), (q, "BOOL", vec![HIDDEN, HIDDEN]), (norm, "I64", vec![HIDDEN])]
            .into_iter()
            .enumerate()
    {
        let bytes = shape.iter().product::<usize>() * if dtype == "I64" { 8 } else { 1 };
        let made = llama(2).with(name, (dtype, shape, vec![1; bytes]));
        refused(CONVERT, &made.write(&at.path().join(index.to_string())), &[name, dtype]);
    }
    // Buffers that no weight is are no reason to refuse a type that is not described.
    let made = llama(1).set("model_type", json!("minimax"));
    let made = made
        .with("model.token_map", raw("I32", &[1, 512], 1))
        .with("model.causal_mask_u8", raw("U8", &[64, 64], 1));
    done(CONVERT, &made.write(&at.path().join("buffers")));
}

#[test]
fn frequencies_of_old_checkpoints_do_no_harm() {
    let at = tempfile::tempdir().unwrap();
    for zoo in ["qwen3_moe", "llama_tied", "gpt_oss"] {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
        let model = damaged(at.path(), zoo, |made| made.add(name, raw("F32", &[16], 0)));
        done(CONVERT, &model);
    }
}
