//! The cases that the project collected from public reports, made anew: 19 inputs, and what must happen to each.

use serde_json::{Value, json};

use crate::common::mlx_quant;
use crate::model::{CONVERT, HIDDEN, config, done, llama, random, raw, read, refused};

#[test]
fn checkpoints_that_are_not_what_config_says() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    let mut extra = llama(2);
    extra.add_layer(2);
    refused(CONVERT, &extra.write(&path("extra_layer")), &["model.layers.2"]);
    refused(
        CONVERT,
        &llama(2).without("model.norm.weight").write(&path("no_final_norm")),
        &["model.norm.weight"],
    );
    let adapter =
        llama(2).with("model.layers.0.self_attn.q_proj.lora_A.default.weight", random(3, &[8, HIDDEN]));
    refused(CONVERT, &adapter.write(&path("adapter_beside")), &["lora_A"]);
    let int8 = llama(2)
        .with("model.layers.0.self_attn.q_proj.weight", raw("I8", &[HIDDEN, HIDDEN], 1))
        .with("model.layers.0.self_attn.q_proj.SCB", raw("F32", &[HIDDEN], 0));
    refused(CONVERT, &int8.write(&path("int8_unexplained")), &["q_proj.weight"]);
    let eval = "eval --model {model} --windows 1 --sequence-length 32";
    refused(
        eval,
        &llama(2).without("lm_head.weight").write(&path("untied_without_head")),
        &["lm_head.weight"],
    );
    let stop = llama(2).set("eos_token_id", json!([10, 11, 12]));
    let stop = stop.file("generation_config.json", json!({"eos_token_id": 10}));
    let (out, _) = done(CONVERT, &stop.write(&path("stop_tokens")));
    assert_eq!(config(&out)["eos_token_id"], json!([10, 11, 12]));
}

#[test]
fn files_that_are_fine() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    let (right, _) = done(CONVERT, &llama(2).write(&path("one")));
    let shards = ["layers-0.safetensors", "outside.safetensors"];
    let (out, _) = done(CONVERT, &llama(2).write_shards(&path("shards_of_any_name"), &shards, &shards));
    assert_eq!(read(&out), read(&right));
    let other = ["model-00001-of-00002.safetensors"];
    let (out, said) = done(
        CONVERT,
        &llama(2).write_shards(&path("index_of_another_build"), &["model.safetensors"], &other),
    );
    assert_eq!((read(&out), said.contains("left aside")), (read(&right), true));
    let left =
        llama(2).set("quantization_config", json!({"quant_method": "bitsandbytes", "load_in_4bit": true}));
    let (out, said) = done(CONVERT, &left.write(&path("settings_left_over")));
    assert!(said.contains("bitsandbytes"), "{said}");
    assert!(!config(&out).to_string().contains("bitsandbytes"));
}

#[test]
fn wrappers_and_experts() {
    let at = tempfile::tempdir().unwrap();
    let mut llava = llama(2).renamed(|name| {
        if name == "lm_head.weight" { name.to_owned() } else { format!("language_model.{name}") }
    });
    llava.config = json!({
        "model_type": "llava", "text_config": llava.config, "vision_config": {"hidden_size": HIDDEN},
        "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "bfloat16"
    });
    llava.add(
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        random(3, &[HIDDEN, HIDDEN]),
    );
    llava.add("multi_modal_projector.mm_input_projection_weight", random(4, &[HIDDEN, HIDDEN]));
    let model = llava.write(&at.path().join("vision_tower"));
    let (out, said) = done(&format!("{CONVERT} --text-only"), &model);
    assert!(said.contains("2 tensors of vision or audio"), "{said}");
    assert!(read(&out).keys().all(|name| !name.contains("vision") && !name.contains("projector")));
    let (out, said) = done(CONVERT, &model);
    assert!(!said.contains("dropped") && config(&out).get("vision_config").is_some(), "{said}");
    for name in
        llava.tensors.keys().filter(|name| !name.starts_with("language_model") && *name != "lm_head.weight")
    {
        assert_eq!(read(&out)[name].2, llava.tensors[name].2, "{name}");
    }

    let mut experts = llama(2).set("model_type", json!("minimax")).set("num_local_experts", json!(4));
    experts.tensors.retain(|name, _| !name.contains(".mlp."));
    for layer in 0..2 {
        let path = |rest: &str| format!("model.layers.{layer}.block_sparse_moe.{rest}");
        experts.add(&path("gate.weight"), random(5, &[4, HIDDEN]));
        for expert in 0..4 {
            for (name, shape) in [("w1", [64, HIDDEN]), ("w2", [HIDDEN, 64]), ("w3", [64, HIDDEN])] {
                experts.add(&path(&format!("experts.{expert}.{name}.weight")), random(6, &shape));
            }
        }
    }
    refused(CONVERT, &experts.write(&at.path().join("experts_one_by_one")), &["experts.0.w1.weight"]);
}

const TOOLS: &str = "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}\
    {% for k, v in c.function.arguments|items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}\
    {% for t in tools or [] %}{{ t.function.name }}{% endfor %}";
const PLUS: &str = "{% for m in messages %}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endif %}\
    {{ '[INST]' + m.content }}{% endfor %}";
const RAISE: &str = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}\
    {% for m in messages %}{{ m.content }}{% endfor %}";

/// Text of about 2,600 characters.
fn long() -> String {
    " the quick brown fox jumps over the lazy dog".repeat(60)
}

/// Evaluates on a file of that name and content, and gives what was said.
#[track_caller]
fn reads(name: &str, content: &[u8], template: Option<&str>) -> String {
    let at = tempfile::tempdir().unwrap();
    let made = llama(1);
    let model = match template {
        Some(template) => made.file("chat_template.jinja", template),
        None => made,
    };
    let model = model.write(&at.path().join("model"));
    let data = at.path().join(name);
    std::fs::write(&data, content).unwrap();
    let flags = ["--windows", "1", "--sequence-length", "64"];
    let output = mlx_quant()
        .args(["eval", "--model"])
        .arg(model)
        .arg("--data")
        .arg(data)
        .args(flags)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(0), "{name}: {text}");
    text
}

fn lines(rows: &[Value]) -> Vec<u8> {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    (lines.join("\n") + "\n").into_bytes()
}

#[test]
fn texts_that_are_fine() {
    let long = long();
    let call = json!({"type": "function", "function": {"name": "f", "arguments": "{\"a\": 3}"}});
    let row = json!({"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "", "tool_calls": [call]}]});
    reads("arguments_as_text.jsonl", &lines(&[row]), Some(TOOLS));
    let tools = "[{\"type\":\"function\",\"function\":{\"name\":\"g\"}}]";
    reads(
        "tools_as_text.jsonl",
        &lines(&[json!({"messages": [{"role": "user", "content": long}], "tools": tools})]),
        Some(TOOLS),
    );
    let parts = json!([{"type": "text", "text": long}]);
    reads(
        "content_in_parts.jsonl",
        &lines(&[json!({"messages": [{"role": "user", "content": parts}]})]),
        Some(PLUS),
    );
    let mut rows = vec![json!({"messages": [{"role": "user", "content": long}]}); 5];
    rows.push(json!({"messages": [{"role": "assistant", "content": "x"}]}));
    let said = reads("one_row_raises.jsonl", &lines(&rows), Some(RAISE));
    assert!(said.contains("roles must alternate"), "{said}");
    reads("lone_surrogate.jsonl", format!("{{\"text\":\"caf\\udce9 {long}\"}}\n").as_bytes(), None);
    let turns = json!([{"from": "human", "value": long}, {"from": "gpt", "value": "b"}]);
    reads("conversations.jsonl", &lines(&[json!({"conversations": turns})]), Some(PLUS));
    reads("json_list.json", json!([{"text": long}]).to_string().as_bytes(), None);
    reads("packed_lines.jsonl.gz", &gzip(&lines(&[json!({"text": long})])), None);
}

/// gzip without compression (RFC 1952 and 1951): one stored block.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap();
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    packed.extend(length.to_le_bytes());
    packed.extend((!length).to_le_bytes());
    packed.extend(bytes);
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1)))
    });
    packed.extend((!crc).to_le_bytes());
    packed.extend(u32::from(length).to_le_bytes());
    packed
}
