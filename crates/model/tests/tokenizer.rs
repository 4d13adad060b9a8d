//! Token ids and chat templates equal to Hugging Face's; hostile templates end.
//!
//! Expected values: tokenizers 0.23.3 and transformers 5.24 (`apply_chat_template`, clock set to 26 July 2024).
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use std::fmt::Write as _;
use std::path::Path;

use mlx_format::checkpoint::Directory;
use mlx_quant_model::{Tokenizer, TokenizerError};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const DEMO: Directory = Directory::Embedded { name: "demo", files: mlx_quant_demo::FILES };

fn demo_file(name: &str) -> Vec<u8> {
    mlx_quant_demo::FILES.iter().find(|(file, _)| *file == name).unwrap().1.to_vec()
}

/// The demo model's tokenizer with other small files.
fn with_files(files: &[(&str, &str)]) -> Result<Tokenizer, TokenizerError> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), demo_file("tokenizer.json")).unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    Tokenizer::load(&Directory::open(directory.path()).unwrap())
}

fn with_template(template: &str) -> Tokenizer {
    let settings = json!({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}});
    with_files(&[("tokenizer_config.json", &settings.to_string()), ("chat_template.jinja", template)])
        .unwrap()
}

#[test]
fn ids_equal_hugging_face() {
    let tokenizer = Tokenizer::load(&DEMO).unwrap();
    let text = include_str!("../../texts/files/held_out.txt");
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids.len(), 61034);
    assert_eq!(ids[..8], [730, 1498, 4209, 1833, 69, 929, 4966, 298]);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut hash = String::new();
    for byte in Sha256::digest(&bytes) {
        write!(hash, "{byte:02x}").unwrap();
    }
    assert_eq!(hash, "f6fd144d86604ebc9e80496176f241f580d91872323d9fc736c8e2bc8c5a38bf");

    // Special tokens that are written out count as such.
    let text = "Hi <|im_start|>user\n<|end_of_text|> naïve 12345 😀\t\n\n  x";
    let expected = [
        43, 76, 224, 2, 525, 202, 1, 301, 68, 131, 111, 330, 224, 990, 22, 3209, 224, 176, 257, 250, 226,
        201, 298, 224, 1189,
    ];
    assert_eq!(tokenizer.encode(text).unwrap(), expected);

    assert_eq!(tokenizer.prefix(), [0]);
    assert_eq!(tokenizer.end_of_text(), Some(1));
    assert_eq!(tokenizer.highest_id(), 6143);
    assert!(tokenizer.has_chat_template());
}

#[test]
fn long_texts_have_the_ids_of_the_whole() {
    let mut tokenizers = vec![("the demo model's", demo_file("tokenizer.json"))];
    let mut file: Value = serde_json::from_slice(&demo_file("tokenizer.json")).unwrap();
    file["normalizer"] = json!({"type": "Prepend", "prepend": "x"});
    tokenizers.push(("one that puts something in front", file.to_string().into_bytes()));
    file["normalizer"] = json!({"type": "NFKC"});
    file["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    tokenizers.push(("one that puts a space in front", file.to_string().into_bytes()));
    file["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    tokenizers.push(("GPT-2's splits", file.to_string().into_bytes()));
    file["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    tokenizers.push(("no splits", file.to_string().into_bytes()));
    let text = include_str!("../../texts/files/held_out.txt");
    let odd = "  \n\n naïve\r\n\tÅ <|im_start|>\nuser\n e\u{301}\n\u{301}x\n";
    for (name, file) in &tokenizers {
        // Without splits a merge may look far; a shorter text will do there.
        let length = if *name == "no splits" { 2_200_000 } else { 4_000_000 };
        let text = format!("{text}{odd}").repeat(length / text.len());
        let whole = tokenizers::Tokenizer::from_bytes(file).unwrap().encode_fast(&*text, false).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("tokenizer.json"), file).unwrap();
        let ours = Tokenizer::load(&Directory::open(directory.path()).unwrap()).unwrap();
        let ids = ours.encode(&text).unwrap();
        assert!(ids == whole.get_ids(), "{name}");
    }
}

#[test]
fn the_prefix_is_what_hugging_face_puts_in_front() {
    let prefix =
        |settings: &str| with_files(&[("tokenizer_config.json", settings)]).unwrap().prefix().to_vec();
    // By the post-processor, if its first token is the one called BOS.
    assert_eq!(prefix(r#"{"bos_token": {"content": "<|begin_of_text|>"}}"#), [0]);
    assert!(prefix(r#"{"bos_token": "<|im_start|>"}"#).is_empty());
    assert!(prefix("{}").is_empty());
    // By the settings, where they say so.
    assert!(prefix(r#"{"bos_token": "<|begin_of_text|>", "add_bos_token": false}"#).is_empty());
    assert!(prefix(r#"{"bos_token": "<|begin_of_text|>", "add_eos_token": false}"#).is_empty());
    assert_eq!(prefix(r#"{"bos_token": "<|im_start|>", "add_bos_token": true}"#), [2]);
    // special_tokens_map.json fills in.
    let map = r#"{"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}"#;
    let tokenizer = with_files(&[("special_tokens_map.json", map)]).unwrap();
    assert_eq!((tokenizer.prefix(), tokenizer.end_of_text()), (&[0][..], Some(3)));
}

#[test]
fn truncation_and_padding_of_the_file_do_not_apply() {
    let mut file: Value = serde_json::from_slice(&demo_file("tokenizer.json")).unwrap();
    file["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "<|end_of_text|>"});
    let tokenizer = with_files(&[("tokenizer.json", &file.to_string())]).unwrap();
    assert_eq!(tokenizer.encode("one two three four five six").unwrap().len(), 6);
}

#[test]
fn chats_render_as_in_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat");
    let cases: Vec<Value> =
        serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let tokenizer = if name == "demo" {
            Tokenizer::load(&DEMO).unwrap()
        } else {
            with_template(&std::fs::read_to_string(folder.join(name).with_extension("jinja")).unwrap())
        };
        let messages = case["messages"].as_array().unwrap();
        let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let text = tokenizer.render_chat(messages, tools, prompt).unwrap();
        assert_eq!(text, case["expected"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn a_list_of_templates_has_a_default() {
    let settings = json!({"chat_template": [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages | length }} messages"},
    ]});
    let tokenizer = with_files(&[("tokenizer_config.json", &settings.to_string())]).unwrap();
    assert_eq!(tokenizer.render_chat(&[json!({"role": "user"})], None, false).unwrap(), "1 messages");
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let message = [json!({"role": "user", "content": "x"})];
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let list = json!({"chat_template": [{"name": "default", "template": "settings"}, {"name": "tool_use", "template": "settings for tools"}]}).to_string();
    let text = json!({"chat_template": "settings"}).to_string();
    let processor = json!({"chat_template": "processor"}).to_string();
    let (settings, legacy, jinja) = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja");
    for (files, plain, with_tools) in [
        (&[(settings, &*text)][..], "settings", "settings"),
        (&[(settings, &*list)], "settings", "settings for tools"),
        (&[(legacy, &*processor)], "processor", "processor"),
        (&[(legacy, &*list)], "settings", "settings for tools"),
        (&[(settings, &*text), (legacy, &*processor)], "settings", "settings"),
        (&[(settings, &*list), (jinja, "file")], "file", "file"),
        (&[(jinja, "file"), (legacy, &*processor)], "file", "file"),
        (&[(jinja, "file"), ("additional_chat_templates/tool_use.jinja", "more")], "file", "more"),
        (&[(settings, &*list), ("additional_chat_templates/tool_use.jinja", "more")], "settings", "more"),
    ] {
        let tokenizer = with_files(files).unwrap();
        for (tools, expected) in [(None, plain), (Some(&tools), with_tools)] {
            assert_eq!(tokenizer.render_chat(&message, tools, false).unwrap(), expected, "{files:?}");
            assert_eq!(tokenizer.render_conversation(&message, tools).unwrap(), expected, "{files:?}");
        }
    }
    for (file, content) in [(legacy, "["), ("additional_chat_templates/tool_use.jinja", "\u{0}")] {
        let made = with_files(&[(file, content), (jinja, "file")]);
        // What is not needed is not read.
        assert!(made.is_ok(), "{file}");
    }
    let error = with_files(&[(legacy, "[")]).unwrap_err().to_string();
    assert!(error.contains(legacy) && error.contains("; hint:"), "{error}");
}

#[test]
fn contents_take_the_form_that_each_role_has() {
    let text = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}]);
    let parts = json!([
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}, "u"]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        {"role": "tool", "content": [{"text": "t"}]},
    ]);
    let loops = "{%- for p in m.content %}{{ p.text }}{% endfor %}";
    for template in [
        // Text alone, and as its repr would show.
        "{% for m in messages %}{{ m.content + '' }}{% endfor %}".to_owned(),
        "{% for m in messages %}{{ m.content }}{% endfor %}".to_owned(),
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}".to_owned(),
        // Parts alone.
        format!("{{% for m in messages %}}{loops}{{% endfor %}}"),
        "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}".to_owned(),
        // Both, and each for some roles.
        format!(
            "{{% for m in messages %}}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{loops}{{% endif %}}{{% endfor %}}"
        ),
        format!(
            "{{% for m in messages %}}{{% if m.role == 'user' %}}{loops}{{% else %}}{{{{ m.content + '' }}}}{{% endif %}}{{% endfor %}}"
        ),
        format!(
            "{{% for m in messages %}}{{% if m.role in ['tool', 'system'] %}}{loops}{{% else %}}{{{{ m.content + '' }}}}{{% endif %}}{{% endfor %}}"
        ),
        // One that wants a user's message first of all.
        format!(
            "{{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}}{{{{ raise_exception('no user') }}}}{{% endif %}}{{% for m in messages %}}{loops}{{% endfor %}}"
        ),
    ] {
        let tokenizer = with_template(&template);
        for messages in [&text, &parts] {
            let messages = messages.as_array().unwrap();
            assert_eq!(tokenizer.render_conversation(messages, None).unwrap(), "suat", "{template}");
        }
    }
    // A list that is printed as it is has not been understood.
    let tokenizer = with_template(
        "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no text') }}{% endif %}{{ m.content }}{% endfor %}",
    );
    for messages in [&text, &parts] {
        let made = tokenizer.render_conversation(messages.as_array().unwrap(), None);
        assert!(matches!(made, Err(TokenizerError::Template { .. })), "{made:?}");
    }
    // A null content stays one, and messages are handed over as they are where that is asked for.
    let tokenizer = with_template("{% for m in messages %}{{ m.content | tojson }}{% endfor %}");
    let null = [json!({"role": "assistant", "content": null})];
    assert_eq!(tokenizer.render_conversation(&null, None).unwrap(), "null");
    let given = [json!({"role": "user", "content": [{"type": "text", "text": "u"}]})];
    assert_eq!(
        tokenizer.render_chat(&given, None, false).unwrap(),
        "[{\"type\": \"text\", \"text\": \"u\"}]"
    );
    assert_eq!(tokenizer.render_conversation(&given, None).unwrap(), "\"u\"");
}

#[test]
fn a_template_is_compiled_once() {
    // A moment to compile, nothing to render.
    let never = "{{ messages[0].y | upper ~ 'z' }}".repeat(20_000);
    let template = format!("{{% if messages[0].x %}}{never}{{% endif %}}{{{{ messages[0].content }}}}");
    let tokenizer = with_template(&template);
    let message = [json!({"role": "user", "content": "x"})];
    let time = || {
        let start = std::time::Instant::now();
        assert_eq!(tokenizer.render_chat(&message, None, false).unwrap(), "x");
        start.elapsed()
    };
    let first = time();
    let later = (0..20).map(|_| time()).min().unwrap();
    assert!(later * 10 < first, "first {first:?}, later {later:?}");
    // An error does not end it, and threads render side by side.
    assert!(tokenizer.render_chat(&[], None, false).is_err());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(tokenizer.render_chat(&message, None, false).unwrap(), "x"));
        }
    });
}

#[test]
fn hostile_templates_end() {
    let endless = [
        // A billion steps.
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        // Doubled sixty times.
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s | replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
        // Nested a hundred thousand times.
        "{% set n = namespace(s=[1]) %}{% for a in range(99999) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s | tojson }}",
        "{% set n = namespace(s=[1]) %}{% for a in range(99999) %}{% set n.s = [n.s] %}{% endfor %}{{ raise_exception(n.s) }}",
        "{{ 'x' * 4000000000 }}",
        "{{ 'x' | indent(4000000000) }}",
        "{{ 'x'.center(4000000000) }}",
        "{{ '%4000000000d' | format(1) }}",
        "{{ messages | tojson(indent=4000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ];
    for template in endless {
        let start = std::time::Instant::now();
        let result = with_template(template).render_chat(&[json!({"role": "user"})], None, false);
        let error = result.expect_err(template);
        assert!(
            matches!(error, TokenizerError::Runaway { .. } | TokenizerError::Template { .. }),
            "{template}: {error}"
        );
        assert!(start.elapsed().as_secs() < 30, "{template}: {:?}", start.elapsed());
    }
}

#[test]
fn a_long_conversation_is_no_runaway() {
    let turn = |role: &str| json!({"role": role, "content": "word ".repeat(2000)});
    let messages: Vec<Value> = (0..200).flat_map(|_| [turn("user"), turn("assistant")]).collect();
    let text = Tokenizer::load(&DEMO).unwrap().render_chat(&messages, None, false).unwrap();
    assert!(text.len() > 4_000_000);
}

#[test]
fn errors_say_what_to_do() {
    let empty = tempfile::tempdir().unwrap();
    std::fs::write(empty.path().join("tokenizer.model"), "x").unwrap();
    let error = Tokenizer::load(&Directory::open(empty.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json (its tokenizer.model is not read); hint:"), "{error}");

    for (file, content) in [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", "{"),
    ] {
        let error = with_files(&[(file, content)]).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains("; hint:"), "{error}");
    }

    let message = [json!({"role": "user", "content": "Hello"})];
    let plain = with_files(&[]).unwrap();
    assert!(!plain.has_chat_template());
    let error = plain.render_chat(&message, None, false).unwrap_err().to_string();
    assert!(error.contains("has no chat template"), "{error}");

    for (template, expected) in [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{% if %}", "syntax error"),
        ("{{ 'x' + messages[0].missing }}", "chat_template.jinja"),
        ("{{ strftime_now('%Q') }}", "%Q"),
        ("{% include 'x' %}", "chat_template.jinja"),
    ] {
        let error = with_template(template).render_chat(&message, None, false).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("; hint:"), "{template}: {error}");
    }
    assert_eq!(
        with_template("{{ strftime_now('%-m/%-d/%Y %-H:%M %A 100%%') }}")
            .render_chat(&message, None, false)
            .unwrap(),
        "7/26/2024 0:00 Friday 100%"
    );
}
