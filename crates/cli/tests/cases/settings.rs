//! config.json against the tensors: heads, end-of-text tokens, settings of a quantization.

use serde_json::{Value, json};

use crate::model::{CONVERT, HIDDEN, Made, config, done, llama, random, read, refused};

#[test]
fn a_head_that_differs_from_the_embedding_it_is_tied_to() {
    let at = tempfile::tempdir().unwrap();
    let head = "lm_head.weight differs from model.embed_tokens.weight";
    let tied = || llama(2).set("tie_word_embeddings", json!(true));
    let (out, said) = done(CONVERT, &tied().write(&at.path().join("differs")));
    assert!(said.contains(head), "{said}");
    assert!(!read(&out).contains_key("lm_head.weight"), "left out, as config.json says");

    let same = tied().with("lm_head.weight", random(1, &[512, HIDDEN]));
    let (_, said) = done(CONVERT, &same.write(&at.path().join("same")));
    assert!(!said.contains("differs"), "{said}");

    // The same numbers, otherwise stored.
    let (_, shape, bytes) = random(1, &[512, HIDDEN]);
    let wide = bytes.chunks_exact(2).flat_map(|pair| [0, 0, pair[0], pair[1]]).collect();
    let wider = tied().with("lm_head.weight", ("F32", shape, wide));
    let (_, said) = done(CONVERT, &wider.write(&at.path().join("wider")));
    assert!(!said.contains("differs"), "{said}");

    let larger = tied().with("lm_head.weight", random(1, &[520, HIDDEN]));
    let (_, said) = done(CONVERT, &larger.write(&at.path().join("larger")));
    assert!(said.contains(head), "{said}");
}

#[test]
fn where_config_is_silent_a_head_of_its_own_stays() {
    let at = tempfile::tempdir().unwrap();
    let silent = || llama(2).unset("tie_word_embeddings");
    let (out, said) = done(CONVERT, &silent().write(&at.path().join("differs")));
    assert!(said.contains("they stay two"), "{said}");
    assert!(read(&out).contains_key("lm_head.weight"));
    assert_eq!(config(&out)["tie_word_embeddings"], json!(false), "so that mlx_lm reads it");

    let same = silent().with("lm_head.weight", random(1, &[512, HIDDEN]));
    let (out, said) = done(CONVERT, &same.write(&at.path().join("same")));
    assert!(!said.contains("stay two") && !read(&out).contains_key("lm_head.weight"), "{said}");

    let (out, _) = done(CONVERT, &silent().without("lm_head.weight").write(&at.path().join("none")));
    assert!(config(&out).get("tie_word_embeddings").is_none());
}

/// What mlx_lm takes for ends of a text: generation_config.json's where it has any.
fn ends(out: &std::path::Path) -> Value {
    let generation = std::fs::read(out.join("generation_config.json")).ok();
    let generation: Option<Value> = generation.map(|bytes| serde_json::from_slice(&bytes).unwrap());
    let own = generation.and_then(|generation| generation.get("eos_token_id").cloned());
    let in_config = config(out)["eos_token_id"].clone();
    if let Some(own) = &own {
        assert_eq!(*own, in_config, "both files say the same");
    }
    own.unwrap_or(in_config)
}

#[test]
fn all_ends_of_a_text_are_kept() {
    let at = tempfile::tempdir().unwrap();
    let ended = |eos: Value, generation: Option<Value>| {
        let made = llama(2).set("eos_token_id", eos);
        match generation {
            Some(eos) => made.file("generation_config.json", json!({"eos_token_id": eos, "top_p": 0.9})),
            None => made,
        }
    };
    let each = [
        (ended(json!([10, 11, 12]), Some(json!(10))), json!([10, 11, 12])),
        (ended(json!(2), Some(json!([2, 7]))), json!([2, 7])),
        (ended(json!(3), Some(json!(4))), json!([4, 3])),
        (ended(json!(5), None), json!(5)),
    ];
    for (index, (made, expected)) in each.iter().enumerate() {
        let (out, _) = done(CONVERT, &made.write(&at.path().join(index.to_string())));
        assert_eq!(ends(&out), *expected, "{index}");
    }
    let model = at.path().join("0");
    let (out, said) = done(&format!("{CONVERT} --keep-eos"), &model);
    assert_eq!((ends(&out), said.contains("eos_token_id")), (json!(10), false));
    let generation: Value =
        serde_json::from_slice(&std::fs::read(out.join("generation_config.json")).unwrap()).unwrap();
    assert_eq!(generation["top_p"], json!(0.9));
}

#[test]
fn what_ends_a_turn_ends_a_text() {
    let at = tempfile::tempdir().unwrap();
    let chat = |end: &str| {
        format!("{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}{end}{{% endfor %}}")
    };
    let made = |end: &str| llama(2).set("eos_token_id", json!(200)).file("chat_template.jinja", chat(end));
    let tokenizer: Value = serde_json::from_slice(
        &std::fs::read(llama(1).write(&at.path().join("probe")).join("tokenizer.json")).unwrap(),
    )
    .unwrap();
    let special = tokenizer["added_tokens"].as_array().unwrap();
    for (index, token) in special.iter().enumerate() {
        let text = token["content"].as_str().unwrap();
        if ["<s>", "<pad>"].contains(&text) {
            let (out, _) = done(CONVERT, &made(text).write(&at.path().join(format!("begins{index}"))));
            assert_eq!(ends(&out), json!(200), "{text} ends no turn");
            continue;
        }
        let (out, said) = done(CONVERT, &made(text).write(&at.path().join(format!("turn{index}"))));
        assert_eq!(ends(&out), json!([200, token["id"]]), "{text}");
        assert!(said.contains(text), "{said}");
    }
    let (out, _) = done(CONVERT, &made("\n").write(&at.path().join("none")));
    assert_eq!(ends(&out), json!(200));
}

#[test]
fn settings_of_a_quantization_that_is_no_more() {
    let at = tempfile::tempdir().unwrap();
    let each = [
        ("quantization_config", json!({"quant_method": "bitsandbytes", "load_in_4bit": true})),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4, "group_size": 128})),
        ("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 128]})),
        ("quantization", json!({"bits": 4, "group_size": 64})),
    ];
    let (plain, _) = done(CONVERT, &llama(2).write(&at.path().join("plain")));
    for (index, (key, value)) in each.into_iter().enumerate() {
        let model = llama(2).set(key, value).write(&at.path().join(index.to_string()));
        let (out, said) = done(CONVERT, &model);
        assert!(said.contains("all weights are plain"), "{said}");
        assert_eq!(read(&out), read(&plain));
        assert_eq!(config(&out), config(&plain));
        let (out, _) = done("convert --model {model} --mlx-path {out}", &model);
        assert!(
            config(&out).get("quantization").is_none() && config(&out).get("quantization_config").is_none()
        );
        done("eval --model {model} --windows 1 --sequence-length 32", &model);
    }
}

/// A quantized llama in which some layers have schemes of their own, as a source.
fn quantized(at: &std::path::Path, recipe: &str) -> Made {
    let model = llama(2).write(&at.join("dense"));
    let file = at.join("recipe.toml");
    std::fs::write(&file, recipe).unwrap();
    let (out, _) = done(&format!("{CONVERT} --recipe-file {}", file.display()), &model);
    let mut made = llama(2);
    made.config = config(&out);
    made.tensors = read(&out)
        .into_iter()
        .map(|(name, (dtype, shape, bytes))| {
            let dtype = match dtype.as_str() {
                "U32" => "U32",
                _ => "BF16",
            };
            (name, (dtype, shape, bytes))
        })
        .collect();
    made
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const DECODE: &str = "convert -d --model {model} --mlx-path {out}";

#[test]
fn widths_of_the_model_decide_between_two_schemes() {
    let at = tempfile::tempdir().unwrap();
    // 4 bits in groups of 128 have the shapes of 8 bits in groups of 64.
    let source = quantized(at.path(), &format!("[[layer]]\npath = \"{Q}\"\ngroup_size = 128"));
    let (right, _) = done(DECODE, &source.write(&at.path().join("listed")));
    let mut unlisted = source.clone();
    for key in ["quantization", "quantization_config"] {
        unlisted.config[key].as_object_mut().unwrap().remove(Q);
    }
    let (out, _) = done(DECODE, &unlisted.write(&at.path().join("unlisted")));
    assert_eq!(read(&out), read(&right), "the hidden size tells");
    let (_, said) = done("inspect {model}", &at.path().join("unlisted"));
    assert!(said.contains("group size 128"), "{said}");

    let unknown = unlisted.clone().set("model_type", json!("minimax"));
    refused(DECODE, &unknown.write(&at.path().join("unknown")), &[Q, "or more than one"]);

    // 8 bits in groups of 32 have the shapes of the shared 4 bits in groups of 64.
    let source = quantized(at.path(), &format!("[[layer]]\npath = \"{Q}\"\nbits = 8\ngroup_size = 32"));
    let (right, _) = done(DECODE, &source.write(&at.path().join("listed8")));
    let mut unlisted = source;
    for key in ["quantization", "quantization_config"] {
        unlisted.config[key].as_object_mut().unwrap().remove(Q);
    }
    let (out, _) = done(DECODE, &unlisted.write(&at.path().join("unlisted8")));
    assert_eq!(read(&out), read(&right));
}

#[test]
fn entries_go_with_their_layers() {
    let at = tempfile::tempdir().unwrap();
    let source = quantized(at.path(), &format!("[[layer]]\npath = \"{Q}\"\nbits = 8\ngroup_size = 64"));
    let (right, _) = done(DECODE, &source.write(&at.path().join("source")));
    // Entries that a vision-language build wrote with another prefix.
    let prefixed = |made: &Made| {
        let mut made = made.clone();
        for key in ["quantization", "quantization_config"] {
            let map = made.config[key].as_object_mut().unwrap();
            let entry = map.remove(Q).unwrap();
            map.insert(format!("language_model.{Q}"), entry);
        }
        made
    };
    let (out, _) = done(DECODE, &prefixed(&source).write(&at.path().join("prefixed")));
    assert_eq!(read(&out), read(&right));
    let (out, _) = done("convert --model {model} --mlx-path {out}", &at.path().join("prefixed"));
    assert_eq!(config(&out)["quantization"][Q], json!({"bits": 8, "group_size": 64, "mode": "affine"}));
    assert!(
        config(&out)["quantization"].get(format!("language_model.{Q}")).is_none(),
        "renamed with its tensors"
    );
    let (_, said) = done("inspect {model} --verify", &out);
    assert!(said.contains("mlx_lm will load it"), "{said}");
}

/// A quantized checkpoint of the zoo as a source, with one layer at 8 bits.
fn quantized_zoo(at: &std::path::Path, name: &str, layer: &str) -> Made {
    let zoo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo").join(name);
    let file = at.join("recipe.toml");
    std::fs::write(&file, format!("[[layer]]\npath = \"{layer}\"\nbits = 8")).unwrap();
    let model = at.join(format!("{name}.link"));
    std::os::unix::fs::symlink(&zoo, &model).unwrap();
    let (out, _) = done(&format!("{CONVERT} --recipe-file {}", file.display()), &model);
    let tensors = read(&out).into_iter().map(|(name, (dtype, shape, bytes))| {
        let dtype = ["U32", "BF16", "F32"].into_iter().find(|known| *known == dtype).unwrap();
        (name, (dtype, shape, bytes))
    });
    Made { config: config(&out), tensors: tensors.collect(), files: Vec::new() }
}

#[test]
fn entries_under_names_that_the_family_changes() {
    let at = tempfile::tempdir().unwrap();
    let layer = "language_model.model.layers.0.mlp.down_proj";
    let source = quantized_zoo(at.path(), "qwen3_5", layer);
    let (right, _) = done(DECODE, &source.write(&at.path().join("source")));
    let hubs = |name: &str| name.replacen("language_model.model.", "model.language_model.", 1);
    let mut renamed = source.clone().renamed(hubs);
    for key in ["quantization", "quantization_config"] {
        let map = renamed.config[key].as_object_mut().unwrap();
        *map = map.iter().map(|(path, entry)| (hubs(path), entry.clone())).collect();
    }
    let (out, _) = done(DECODE, &renamed.write(&at.path().join("renamed")));
    assert_eq!(read(&out), read(&right));
    let (out, _) = done("convert --model {model} --mlx-path {out}", &at.path().join("renamed"));
    assert_eq!(config(&out)["quantization"], source.config["quantization"]);
}

#[test]
fn entries_of_experts_that_are_stacked() {
    let at = tempfile::tempdir().unwrap();
    let layer = "model.layers.1.mlp.switch_mlp.up_proj";
    let source = quantized_zoo(at.path(), "qwen3_moe", layer);
    let (right, _) = done(DECODE, &source.write(&at.path().join("source")));
    let entry = source.config["quantization"][layer].clone();
    let experts = source.tensors[&format!("{layer}.weight")].1[0];
    let expert = |index: usize| format!("model.layers.1.mlp.experts.{index}.up_proj");
    let mut apart = source.clone();
    for leaf in ["weight", "scales", "biases"] {
        let (dtype, shape, bytes) = apart.tensors.remove(&format!("{layer}.{leaf}")).unwrap();
        let size = bytes.len() / experts;
        for (index, part) in bytes.chunks_exact(size).enumerate() {
            apart.add(&format!("{}.{leaf}", expert(index)), (dtype, shape[1..].to_vec(), part.to_vec()));
        }
    }
    for key in ["quantization", "quantization_config"] {
        let map = apart.config[key].as_object_mut().unwrap();
        map.remove(layer);
        map.extend((0..experts).map(|index| (expert(index), entry.clone())));
    }
    let (out, _) = done(DECODE, &apart.write(&at.path().join("apart")));
    assert_eq!(read(&out), read(&right));

    apart.config["quantization"][expert(1)]["bits"] = json!(4);
    refused(DECODE, &apart.write(&at.path().join("unequal")), &[layer, "differently"]);
}

#[test]
fn what_is_no_token_id_ends_nothing() {
    let at = tempfile::tempdir().unwrap();
    for (index, (eos, expected)) in [
        (json!("2"), json!([2])),
        (json!([2, "</s>", 3.0, -5, null]), json!([2])),
        (json!([[2, 3], [4]]), json!([2])),
        (json!(2.5), json!([2])),
    ]
    .into_iter()
    .enumerate()
    {
        let model = llama(1).set("eos_token_id", eos).write(&at.path().join(index.to_string()));
        let (out, said) = done(CONVERT, &model);
        // Nothing is left but the tokenizer's own.
        assert_eq!(config(&out)["eos_token_id"], expected);
        assert!(said.contains("no token id"), "{said}");
    }
    let model = llama(1).set("eos_token_id", json!(2)).file("generation_config.json", "[1, 2]");
    let (out, said) = done(CONVERT, &model.write(&at.path().join("list")));
    assert!(
        !out.join("generation_config.json").exists() && said.contains("generation_config.json"),
        "{said}"
    );
    let floats = llama(1)
        .set("eos_token_id", json!(3))
        .file("generation_config.json", "{\"eos_token_id\": 4, \"temperature\": NaN}");
    let (out, _) = done(CONVERT, &floats.write(&at.path().join("floats")));
    let written = std::fs::read_to_string(out.join("generation_config.json")).unwrap();
    assert!(written.contains("\"temperature\": NaN") && !written.contains("__float__"), "{written}");
}

#[test]
fn entries_that_say_something_else_than_the_layer() {
    let at = tempfile::tempdir().unwrap();
    let source = quantized(at.path(), "");
    for (index, entry) in [
        json!(false),
        json!({}),
        json!({"bits": 8, "group_size": 64}),
        json!({"bits": 4, "group_size": 64, "foo": 1}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut made = source.clone();
        made.config["quantization"][Q] = entry;
        let (out, said) =
            done("convert --model {model} --mlx-path {out}", &made.write(&at.path().join(index.to_string())));
        assert!(said.contains("that is written instead"), "{said}");
        assert_eq!(config(&out)["quantization"][Q], json!({"group_size": 64, "bits": 4, "mode": "affine"}));
        let (_, said) = done("inspect {model} --verify", &out);
        assert!(said.contains("mlx_lm will load it"), "{said}");
    }
    let mut odd = source;
    odd.config["quantization"][Q] = json!("4bit");
    refused("inspect {model} --verify", &odd.write(&at.path().join("odd")), &[Q, "4bit"]);
}
