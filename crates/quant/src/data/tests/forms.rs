//! Every form that a row comes in, and templates that take each of them.

use super::*;

/// Roles, contents, names and arguments of calls, names of tools.
const TOOLS: &str = "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments|items %} {{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}{% for t in tools or [] %} tool {{ t.function.name }}{% endfor %}";

/// Needs a content in every message, and that calls are there where the field is.
const PLUS: &str = "{% for m in messages %}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endif %}{{ '[' + m.role + ']' + m.content }}{% endfor %}";

/// A row read from each kind of file that can hold it.
fn expect(row: &serde_json::Value, template: &str, text: &str) {
    let tokenizer = with_templates(template, None);
    text_of("row.jsonl", row.to_string().as_bytes(), &tokenizer, text);
    text_of("row.json", serde_json::to_string_pretty(&json!([row])).unwrap().as_bytes(), &tokenizer, text);
}

fn user(content: impl Into<serde_json::Value>) -> serde_json::Value {
    json!({"role": "user", "content": content.into()})
}

#[test]
fn arguments_as_text_are_parsed() {
    let call = |call: serde_json::Value| json!({"messages": [user("x"), {"role": "assistant", "content": "", "tool_calls": call}]});
    let function =
        |arguments: &str| json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}]);
    expect(&call(function(r#"{"a": 3, "b": [1]}"#)), TOOLS, "[user]x[assistant] a=3 b=[1]");
    expect(&call(function(r#" {"a": NaN, "b": "x"}"#)), TOOLS, "[user]x[assistant] a=None b=x");
    let whole_list = function(r#"{"a": 3}"#).to_string();
    expect(&call(json!(whole_list)), TOOLS, "[user]x[assistant] a=3");
    let name = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.arguments.a }}{% endfor %}{{ m.function_call.arguments.b if m.function_call }}{% endfor %} end of it";
    expect(&call(json!([{"name": "f", "arguments": "{\"a\": \"flat\"}"}])), name, "flat end of it");
    let old = json!({"messages": [{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"b\": \"old\"}"}}]});
    expect(&old, name, "old end of it");
    // What is no JSON object stays as it is.
    let raw = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %} end of it";
    for text in ["{not json", "3", "[1]", "plain words"] {
        expect(&call(function(text)), raw, &format!("{text} end of it"));
    }
}

#[test]
fn tools_come_as_lists_or_text() {
    let (f, g) = (
        json!({"type": "function", "function": {"name": "f"}}),
        json!({"type": "function", "function": {"name": "g"}}),
    );
    let row = |tools: serde_json::Value| json!({"messages": [user("x")], "tools": tools});
    for tools in [
        json!([f, g]),
        json!(json!([f, g]).to_string()),
        json!([f.to_string(), g.to_string()]),
        json!([{"type": "function", "function": {"name": "f", "strict": null}}, g]),
    ] {
        expect(&row(tools), TOOLS, "[user]x tool f tool g");
    }
    expect(&row(f), TOOLS, "[user]x tool f");
    let asked = "{{ messages[0].content }}{% if tools is not none %} with tools{% endif %} here";
    for none in [json!(null), json!(""), json!("[]"), json!([]), json!("null"), json!(" ")] {
        expect(&row(none), asked, "x here");
    }
    for (tools, expected) in [
        (json!("f, g"), "line 1: tools is text that is no JSON"),
        (json!(7), "line 1: tools is a number, not a list"),
        (json!([f_name()]), "line 1: tool 0 is a string, not an object"),
    ] {
        let error = read_file("a.jsonl", row(tools).to_string().as_bytes(), &demo()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A text needs no tools, whatever stands there.
    text_of("a.jsonl", br#"{"text": "One two", "tools": "none, sorry"}"#, &demo(), "One two");
}

fn f_name() -> &'static str {
    "f"
}

#[test]
fn a_row_with_tools_takes_the_template_for_tools() {
    let tokenizer =
        with_templates("plain {{ messages[0].content }}", Some("tools {{ messages[0].content }}"));
    let with = json!({"messages": [user("x")], "tools": [{"type": "function", "function": {"name": "f"}}]});
    text_of("a.jsonl", with.to_string().as_bytes(), &tokenizer, "tools x");
    for tools in [json!(null), json!([]), json!("[]")] {
        let row = json!({"messages": [user("x")], "tools": tools});
        text_of("a.jsonl", row.to_string().as_bytes(), &tokenizer, "plain x");
    }
    let asked = json!({"prompt": "p", "completion": "c", "tools": "[{\"function\": {\"name\": \"f\"}}]"});
    text_of("a.jsonl", asked.to_string().as_bytes(), &tokenizer, "tools p");
}

#[test]
fn padding_is_removed_at_every_depth() {
    let padded = json!({"messages": [
        {"role": "user", "content": "x", "tool_calls": null, "name": null},
        {"role": "assistant", "content": "y", "tool_calls": [{"id": null, "function": {"name": "f", "arguments": {"a": 1, "b": null}}}]},
    ], "tools": [{"function": {"name": "g", "parameters": {"properties": {"p": null, "q": {"type": "string", "enum": null}}}}}]});
    expect(&padded, PLUS, "[user]xf[assistant]y");
    let all = "{{ messages[1].tool_calls | tojson }} {{ tools | tojson }}";
    expect(
        &padded,
        all,
        "[{\"function\": {\"name\": \"f\", \"arguments\": {\"a\": 1}}}] [{\"function\": {\"name\": \"g\", \"parameters\": {\"properties\": {\"q\": {\"type\": \"string\"}}}}}]",
    );
    // A message's own content may be null: it only calls tools.
    let null = json!({"messages": [user("x"), {"role": "assistant", "content": null, "name": null}]});
    let keys = "{% for m in messages %}{% for k in m %}{{ k }} {% endfor %}{% endfor %}";
    expect(&null, keys, "role content role content ");
    let text = json!({"messages": null, "text": "One two", "prompt": "p", "completion": null});
    expect(&text, PLUS, "One two");
}

#[test]
fn contents_are_given_as_the_template_takes_them() {
    let text_only = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}";
    let printed = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let parts_only = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}";
    let both = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}";
    let by_role = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ m.content + '' }}{% endif %}{% endfor %}";
    let rows = [
        json!([user([json!({"type": "text", "text": "One two"})].to_vec()), {"role": "assistant", "content": "three"}]),
        json!([user("One two"), {"role": "assistant", "content": [{"type": "text", "text": "thr"}, {"type": "text", "text": "ee"}]}]),
        json!([
            {"role": "user", "content": [{"type": "image", "image": "a.png", "text": null}, {"type": "text", "text": "One two", "image": null}]},
            {"role": "assistant", "content": ["three"]},
        ]),
    ];
    for template in [text_only, printed, parts_only, both, by_role] {
        for (index, messages) in rows.iter().enumerate() {
            let row = json!({"messages": messages});
            // A template that takes the first part alone gets what it can take.
            if template == by_role && index == 1 {
                continue;
            }
            expect(&row, template, "[user]One two[assistant]three");
        }
    }
}

#[test]
fn prompts_and_completions_are_text_or_messages() {
    let reply = json!([{"role": "assistant", "content": "y"}]);
    for (prompt, completion, expected) in [
        (json!("x"), json!("y"), "[user]x[assistant]y"),
        (json!([user("x")]), reply.clone(), "[user]x[assistant]y"),
        (json!([{"role": "system", "content": "s"}, user("x")]), json!("y"), "[system]s[user]x[assistant]y"),
        (json!("x"), reply, "[user]x[assistant]y"),
    ] {
        expect(&json!({"prompt": prompt, "completion": completion}), PLUS, expected);
    }
    for (row, expected) in [
        (json!({"prompt": 3, "completion": []}), "prompt is a number, not a string"),
        (json!({"prompt": "x", "completion": []}), "completion is a list of no messages"),
        (json!({"prompt": [{"content": "x"}], "completion": "y"}), "prompt: message 0 has no role"),
    ] {
        let error = read_file("a.jsonl", row.to_string().as_bytes(), &demo()).unwrap_err().to_string();
        assert!(
            error.contains("line 1") && error.contains(expected) && error.contains("; hint: "),
            "{error}"
        );
    }
}

#[test]
fn conversations_have_other_names_for_roles() {
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let conversation = |turns: serde_json::Value| json!({"conversations": turns});
    for (row, expected) in [
        (conversation(json!([turn("human", "x"), turn("gpt", "y")])), "[user]x[assistant]y"),
        (
            conversation(json!([turn("System", "s"), turn("USER", "x"), turn("chatgpt", "y")])),
            "[System]s[user]x[assistant]y",
        ),
        (
            conversation(json!([
                turn("user", "x"),
                turn("bard", "y"),
                turn("observation", "z"),
                turn("model", "w")
            ])),
            "[user]x[assistant]y[tool]z[assistant]w",
        ),
        (conversation(json!([user("x"), {"role": "assistant", "content": "y"}])), "[user]x[assistant]y"),
        (
            conversation(json!(
                json!([turn("human", "x"), turn("function_call", "{\"name\": 1}")]).to_string()
            )),
            "[user]x[assistant]{\"name\": 1}",
        ),
        (json!({"conversation": [turn("human", "x")], "language": "en"}), "[user]x"),
        (json!({"system": "s", "conversations": [turn("human", "x")]}), "[system]s[user]x"),
        (
            json!({"system": "s", "conversations": [turn("system", "own"), turn("human", "x")]}),
            "[system]own[user]x",
        ),
        (
            json!({"system": "", "conversations": [turn("human", "x"), {"from": "gpt", "content": "y", "weight": 1}]}),
            "[user]x[assistant]y",
        ),
    ] {
        expect(&row, PLUS, expected);
    }
    for (turns, expected) in [
        (json!([]), "conversations is empty"),
        (json!("hello"), "conversations is a string, not a list"),
        (json!([{"from": "human"}]), "message 0 has no content"),
        (json!([{"value": "x"}]), "message 0 has no role"),
        (json!([3]), "message 0 is a number, not an object"),
    ] {
        let row = conversation(turns).to_string();
        let error = read_file("a.jsonl", row.as_bytes(), &demo()).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains(expected), "{error}");
    }
}

#[test]
fn instructions_and_questions_are_answered() {
    for (row, expected) in [
        (json!({"instruction": "x", "input": "", "output": "y"}), "[user]x[assistant]y"),
        (json!({"instruction": "x", "input": "more", "output": "y"}), "[user]x\n\nmore[assistant]y"),
        (
            json!({"instruction": "x", "context": "more", "response": "y", "category": "qa"}),
            "[user]x\n\nmore[assistant]y",
        ),
        (json!({"instruction": "x", "output": "y", "system": "s"}), "[system]s[user]x[assistant]y"),
        (json!({"question": "x", "answer": "y"}), "[user]x[assistant]y"),
        (json!({"instruction": "x", "output": "y", "text": "whole"}), "whole"),
        (json!({"messages": [user("m")], "text": "whole", "conversations": []}), "[user]m"),
    ] {
        expect(&row, PLUS, expected);
    }
    text_of(
        "a.jsonl",
        br#"{"instruction": "Who", "input": "me", "output": "you"}"#,
        &plain(),
        "Who\n\nme\nyou",
    );
}

#[test]
fn columns_that_were_found_are_named() {
    let many: serde_json::Map<_, _> = (0..40).map(|index| (format!("column{index}"), json!(1))).collect();
    for (name, content, expected) in [
        (
            "a.jsonl",
            br#"{"id": 1, "content": "x"}"#.to_vec(),
            "line 1: neither text, nor prompt and completion, nor messages, nor conversations, nor instruction and output; hint: the columns found are id, content;",
        ),
        ("a.jsonl", b"{}".to_vec(), "found are none;"),
        (
            "a.json",
            br#"[{"text": "x"}, {"question": "x", "answers": []}]"#.to_vec(),
            "row 2: neither text, nor prompt and completion, nor messages, nor conversations, nor instruction and output; hint: the columns found are question, answers;",
        ),
        (
            "a.csv",
            b"id,body\n1,x".to_vec(),
            "columns: neither text, nor prompt and completion, nor messages, nor conversations, nor instruction and output; hint: the columns found are id, body;",
        ),
        ("a.tsv", b"instruction\tinput\nx\ty".to_vec(), "found are instruction, input;"),
        ("a.jsonl", serde_json::to_vec(&many).unwrap(), "column11, ...;"),
        ("a.jsonl", br#"{"prompt": "x", "chosen": "y"}"#.to_vec(), "found are prompt, chosen;"),
    ] {
        let error = read_file(name, &content, &demo()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
}

#[test]
fn rows_that_the_template_refuses_are_left_out() {
    let raises = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ messages[0].content }}";
    let misses = "{{ '' + messages[0].name }}{{ messages[0].content }}";
    let good = json!({"messages": [{"role": "user", "content": "fine", "name": "n"}]}).to_string();
    let bad = json!({"messages": [{"role": "assistant", "content": "x"}]}).to_string();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.jsonl");
    let windows = |lines: &[&String], template: &str, on_refusal: OnRefusal| {
        std::fs::write(&path, lines.iter().fold(String::new(), |all, line| all + line + "\n\n")).unwrap();
        let pick = Pick::EvenlySpaced { windows: 0 };
        let data = DataSource::Path(path.clone());
        Windows::read_with(&data, &with_templates(template, None), 6144, 2, pick, on_refusal)
    };
    for (template, reason) in [(raises, "roles must alternate"), (misses, "line 3: ")] {
        for lines in [&[&good, &bad][..], &[&good, &bad, &good, &bad, &good], &[&good, &bad, &good, &good]] {
            let made = windows(lines, template, OnRefusal::LeaveOut).unwrap();
            let source = &made.sources[0];
            let refused = lines.iter().filter(|line| **line == &bad).count();
            assert_eq!((source.rows_left_out, source.documents), (refused, lines.len() - refused));
            let first = source.first_left_out.as_deref().unwrap();
            assert!(first.starts_with("line 3: ") && first.contains(reason), "{first}");
            let said = source.left_out().unwrap();
            assert!(
                said.starts_with(&format!("{refused} of {} rows left out: line 3: ", lines.len())),
                "{said}"
            );
            let error = windows(lines, template, OnRefusal::Stop).unwrap_err().to_string();
            assert!(
                error.contains("a.jsonl, line 3: chat template of") && error.contains("; hint: "),
                "{error}"
            );
        }
        let error = windows(&[&good, &bad, &bad], template, OnRefusal::LeaveOut).unwrap_err().to_string();
        let expected = "a.jsonl, line 3: the model's chat template refuses the row (and in all 2 of 3): ";
        assert!(error.contains(expected) && error.contains("; hint: "), "{error}");
    }
    let clean = windows(&[&good, &good], raises, OnRefusal::Stop).unwrap();
    assert_eq!((clean.sources[0].rows_left_out, clean.sources[0].left_out()), (0, None));
    // A template that is broken or does not end is no matter of rows.
    for (template, expected) in [
        ("{% if %}", "is no template: syntax error"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "does not come to an end",
        ),
    ] {
        let error = windows(&[&good], template, OnRefusal::LeaveOut).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
