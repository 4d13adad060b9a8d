//! Types without a description: nothing is promised, and what is known to end badly is refused.

use serde_json::json;

use crate::model::{CONVERT, HIDDEN, Made, config, done, llama, random, read, refused};

/// A plain decoder of a type that is not described.
fn unknown() -> Made {
    llama(2).set("model_type", json!("minimax"))
}

/// With a router and experts in place of the network of each layer, named by `expert`.
fn with_experts(model_type: &str, expert: impl Fn(usize, &str) -> String) -> Made {
    let mut made = llama(2).set("model_type", json!(model_type));
    made.tensors.retain(|name, _| !name.contains(".mlp."));
    for layer in 0..2 {
        made.add(&format!("model.layers.{layer}.mlp.gate.weight"), random(3, &[4, HIDDEN]));
        for (index, name) in (0..4).flat_map(|index| ["w1", "w2", "w3"].map(|name| (index, name))) {
            made.add(
                &format!("model.layers.{layer}.{}", expert(index, name)),
                random(index as u64, &[HIDDEN, HIDDEN]),
            );
        }
    }
    made
}

#[test]
fn verify_promises_nothing() {
    let at = tempfile::tempdir().unwrap();
    for (index, model_type) in
        ["minimax", "prism_hadamard_qwen35", "phimoe_of_tomorrow"].into_iter().enumerate()
    {
        let model = llama(2).set("model_type", json!(model_type)).write(&at.path().join(index.to_string()));
        let (out, said) = done(CONVERT, &model);
        assert!(said.contains("has no description here"), "{said}");
        let ran = crate::model::run("inspect {model} --verify", &out);
        let known = index < 2;
        assert_eq!(
            (ran.code, ran.text.contains("not known whether mlx_lm loads it")),
            if known { (0, true) } else { (2, false) },
            "{model_type}: {}",
            ran.text
        );
        assert!(!ran.text.contains("will load it"), "{}", ran.text);
        let ran = crate::model::run("inspect {model} --verify --json", &out);
        let document = serde_json::Deserializer::from_str(&ran.text).into_iter::<serde_json::Value>().next();
        let document = document.unwrap().unwrap();
        assert_eq!(document["verification"]["verdict"], json!(if known { "unknown" } else { "fails" }));
    }
}

#[test]
fn experts_that_nobody_would_stack() {
    let at = tempfile::tempdir().unwrap();
    let names: [fn(usize, &str) -> String; 3] = [
        |index, name| format!("block_sparse_moe.experts.{index}.{name}.weight"),
        |index, name| format!("mlp.experts.{index}.{name}.weight"),
        |index, name| format!("ffn.local_experts.{index}.{name}.weight"),
    ];
    for (index, name) in names.into_iter().enumerate() {
        let model = with_experts("minimax", name).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &["experts stand one by one", "experts.0.w1.weight"]);
        // As they are, mlx_lm stacks them when it loads.
        done("convert --model {model} --mlx-path {out}", &model);
    }
}

#[test]
fn matrices_that_would_stay_unquantized() {
    let at = tempfile::tempdir().unwrap();
    let each = [
        ("model.layers.0.mlp.experts.gate_up_proj", vec![4, HIDDEN, 256]),
        ("model.layers.0.moe.up_proj.weight", vec![4, 64, HIDDEN]),
        ("model.layers.0.block_sparse_moe.input_linear.weight", vec![4, 256, HIDDEN]),
        ("model.layers.0.ffn.experts.mlp.w1", vec![512, HIDDEN]),
    ];
    for (index, (name, shape)) in each.into_iter().enumerate() {
        let model = unknown().with(name, random(4, &shape)).write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &[name, "would stay unquantized"]);
        done("convert --model {model} --mlx-path {out}", &model);
    }
    // Convolutions, biases of experts and tables of relative positions are no such matrices.
    for (index, (name, shape)) in [
        ("model.layers.0.mixer.conv1d.weight", vec![256, 1, 4]),
        ("model.layers.0.conv.weight", vec![HIDDEN, HIDDEN, 3]),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", vec![4, 256]),
    ]
    .into_iter()
    .enumerate()
    {
        done(
            CONVERT,
            &unknown().with(name, random(4, &shape)).write(&at.path().join(format!("fine{index}"))),
        );
    }
}

#[test]
fn types_that_mlx_lm_cannot_load_so() {
    let at = tempfile::tempdir().unwrap();
    for model_type in ["afm7", "lfm2-vl", "deepseek_v41"] {
        let model = llama(2).set("model_type", json!(model_type)).write(&at.path().join(model_type));
        refused(CONVERT, &model, &[model_type, "mlx_lm would not load it"]);
    }
}

#[test]
fn any_part_of_a_path_tells_a_router() {
    let at = tempfile::tempdir().unwrap();
    for (index, path) in
        ["mlp.router.proj", "mlp.router.classifier", "block_sparse_moe.router.layer", "mlp.gate.wg"]
            .into_iter()
            .enumerate()
    {
        let name = format!("model.layers.0.{path}");
        let made = unknown().with(&format!("{name}.weight"), random(4, &[8, HIDDEN]));
        let (out, _) = done(CONVERT, &made.write(&at.path().join(index.to_string())));
        assert!(!read(&out).contains_key(&format!("{name}.scales")), "{name}");
    }
}

#[test]
fn towers_are_dropped_or_whole() {
    let at = tempfile::tempdir().unwrap();
    let towers = [
        "vision_tower.encoder.layers.0.q_proj.weight",
        "multi_modal_projector.linear.weight",
        "model.visual.blocks.0.qkv.weight",
    ];
    let wrapper = |model_type: &str| {
        let mut made = llama(2).renamed(|name| format!("language_model.{name}"));
        made.config = json!({"model_type": model_type, "text_config": made.config, "vision_config": {"hidden_size": HIDDEN}, "torch_dtype": "bfloat16"});
        for tower in towers {
            made.add(tower, random(8, &[HIDDEN, HIDDEN]));
        }
        made
    };
    for model_type in ["llava", "pixtral"] {
        let text_only = format!("{CONVERT} --text-only");
        let (out, said) = done(&text_only, &wrapper(model_type).write(&at.path().join(model_type)));
        assert!(said.contains("3 tensors of vision or audio"), "{said}");
        assert!(read(&out).keys().all(|name| name.starts_with("language_model.")), "{:?}", read(&out).keys());
        assert!(config(&out).get("vision_config").is_none());
    }
    // mlx_lm does not know the type: nothing is lost, and nothing packed without its settings.
    let (out, said) = done(CONVERT, &wrapper("vlm_of_tomorrow").write(&at.path().join("unknown")));
    for tower in towers {
        assert_eq!(read(&out)[tower].2, random(8, &[HIDDEN, HIDDEN]).2, "{tower}");
    }
    assert!(config(&out).get("vision_config").is_some());
    assert!(said.contains("bits per weight"), "{said}");
}

#[test]
fn much_that_stays_unquantized_is_said() {
    let at = tempfile::tempdir().unwrap();
    let recipe = at.path().join("recipe.toml");
    for (index, (path, says)) in [
        ("lm_head", "lm_head.weight: "),
        ("*.mlp.*", "model.layers.*.mlp."),
        ("model.embed_tokens", "model.embed_tokens.weight: "),
    ]
    .into_iter()
    .enumerate()
    {
        std::fs::write(&recipe, format!("[[layer]]\npath = \"{path}\"\nkeep = true")).unwrap();
        let model = llama(2).write(&at.path().join(index.to_string()));
        let (_, said) = done(&format!("{CONVERT} --recipe-file {}", recipe.display()), &model);
        assert!(
            said.contains("% of the bytes stay unquantized, which makes ") && said.contains(says),
            "{said}"
        );
    }
    let (_, said) = done(CONVERT, &llama(2).write(&at.path().join("all")));
    assert!(!said.contains("stay unquantized"), "{said}");
}

#[test]
fn experts_that_are_not_all_there() {
    let at = tempfile::tempdir().unwrap();
    let name = |index: usize, part: &str| format!("mlp.experts.{index}.{part}.weight");
    let whole = || with_experts("minimax", name);
    let lost = "model.layers.1.mlp.experts.2.w2.weight";
    for (index, made) in [
        whole().without(lost),
        whole().without("model.layers.0.mlp.experts.0.w1.weight"),
        whole().with(lost, random(9, &[HIDDEN, 64])),
    ]
    .into_iter()
    .enumerate()
    {
        let model = made.write(&at.path().join(index.to_string()));
        refused(CONVERT, &model, &["experts must be alike and all there"]);
        refused("convert --model {model} --mlx-path {out}", &model, &["experts must be alike"]);
    }
}

#[test]
fn what_trainings_and_other_heads_leave() {
    let at = tempfile::tempdir().unwrap();
    let q = "model.layers.0.self_attn.q_proj";
    let each = [
        format!("{q}.lora_a"),
        format!("{q}.lora_down.weight"),
        format!("{q}.lokr_w1"),
        format!("{q}.weight.absmax"),
        format!("{q}.weight.quant_state.bitsandbytes__nf4"),
        "optimizer.state.momentum_buffer".to_owned(),
        "score.weight".to_owned(),
        "v_head.summary.weight".to_owned(),
        "classifier.dense.weight".to_owned(),
    ];
    for (index, name) in each.iter().enumerate() {
        let made = unknown().with(name, random(9, &[8, HIDDEN]));
        refused(CONVERT, &made.write(&at.path().join(index.to_string())), &[name]);
    }
}

#[test]
fn tables_are_no_experts() {
    let at = tempfile::tempdir().unwrap();
    for (index, (name, shape)) in [
        ("model.pos_embed", vec![1, 64, HIDDEN]),
        ("model.position_embedding.weight", vec![4, 64, HIDDEN]),
        ("model.query_tokens", vec![1, 32, HIDDEN]),
    ]
    .into_iter()
    .enumerate()
    {
        done(CONVERT, &unknown().with(name, random(4, &shape)).write(&at.path().join(index.to_string())));
    }
    let experts = unknown().with("model.layers.0.mlp.expert_weights", random(4, &[512, HIDDEN]));
    refused(CONVERT, &experts.write(&at.path().join("experts")), &["expert_weights"]);
}

#[test]
fn in_a_frame_only_the_language_model_is_quantized() {
    let at = tempfile::tempdir().unwrap();
    for (index, tower) in
        ["mlp1.0", "resampler.kv_proj", "vpm.encoder.layers.0.q", "Vision_Tower.x", "abstractor.query_proj"]
            .into_iter()
            .enumerate()
    {
        let mut made = llama(2).renamed(|name| format!("language_model.{name}"));
        made.config = json!({"model_type": "frame_of_tomorrow", "text_config": made.config, "vision_config": {}, "torch_dtype": "bfloat16"});
        made.add(&format!("{tower}.weight"), random(8, &[HIDDEN, HIDDEN]));
        let (out, _) = done(CONVERT, &made.write(&at.path().join(index.to_string())));
        assert!(!read(&out).contains_key(&format!("{tower}.scales")), "{tower}");
        assert!(read(&out).contains_key("language_model.lm_head.scales"));
        assert!(config(&out).get("vision_config").is_some());
    }
}
