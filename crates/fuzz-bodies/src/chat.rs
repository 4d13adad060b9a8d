//! Chat templates and the rows that they are given.

use arbitrary::{Arbitrary as _, Unstructured};
use mlx_format::checkpoint::Directory;
use mlx_quant::model::Tokenizer;
use mlx_quant::{DataSource, Pick, Windows};
use serde_json::{Map, Value, json};

use crate::guard::panics;
use crate::work::{TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, assert_helps, parts, work, write};

/// How deeply values of generated rows are nested.
const DEPTH: usize = 5;

/// Messages of a generated row.
const MESSAGES: usize = 6;

/// What a conversation is made of.
struct Row {
    messages: Vec<Value>,
    tools: Option<Value>,
    prompt: bool,
}

/// A template, a NUL byte, and the row that it is given: a JSON object with `messages` and `tools`, or any other bytes, of which
/// messages are made (roles, parts, calls of tools, nulls, nested values). A row gives the same text each time, and as a line of
/// a data set its tokens.
///
/// # Panics
/// If it does not, or an error does not help.
pub fn chat(bytes: &[u8]) {
    let [template, row] = parts(bytes);
    write("chat/tokenizer.json", TOKENIZER);
    write("chat/tokenizer_config.json", TOKENIZER_CONFIG);
    write("chat/chat_template.jinja", template);
    let directory = Directory::open(&work().join("chat")).expect("a directory");
    let tokenizer = match Tokenizer::load(&directory) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert_helps(&error, "chat_template.jinja"),
    };
    let (row, before) = (Row::of(row), panics());
    let text = match tokenizer.render_chat(&row.messages, row.tools.as_ref(), row.prompt) {
        Ok(text) => text,
        Err(error) => {
            assert_helps(&error, "chat_template.jinja");
            // What is said of a thread that never began is said of one that panicked, too.
            let silent = error.to_string().contains("no thread could render it");
            assert!(!silent || panics() == before, "the thread of the template panicked");
            return;
        }
    };
    if !row.prompt {
        check_line(&tokenizer, &row, &text);
    }
}

/// The row as a line of data.
fn check_line(tokenizer: &Tokenizer, row: &Row, text: &str) {
    let line = json!({"messages": row.messages, "tools": row.tools}).to_string();
    let path = write("chat.jsonl", line.as_bytes());
    let (data, pick) = (DataSource::Path(path.clone()), Pick::EvenlySpaced { windows: 0 });
    let windows = match Windows::read(&data, tokenizer, VOCABULARY, 2, pick) {
        Ok(windows) => windows,
        // Messages without a role and the like, and texts of no or one token.
        Err(error) => return assert_helps(&error, &path.display().to_string()),
    };
    // Other rows are brought into the form that templates take: JSON text parsed, nulls stripped, parts joined.
    if !row.is_plain() {
        return;
    }
    let text = tokenizer.render_conversation(&row.messages, None).unwrap_or_else(|_| text.to_owned());
    let expected = tokenizer.encode(&text).expect("every byte has a token");
    let found: Vec<u32> = windows.picked.iter().flat_map(|window| window.tokens.clone()).collect();
    assert_eq!(windows.sources[0].tokens, expected.len());
    assert_eq!(found, expected[..found.len()]);
}

impl Row {
    /// Whether messages are nothing but a role and a text.
    fn is_plain(&self) -> bool {
        let plain = |message: &Value| {
            message.as_object().is_some_and(|fields| {
                fields.len() == 2
                    && ["role", "content"].iter().all(|key| fields.get(*key).is_some_and(Value::is_string))
            })
        };
        self.tools.is_none() && self.messages.iter().all(plain)
    }

    fn of(bytes: &[u8]) -> Self {
        if let Ok(Value::Object(mut row)) = serde_json::from_slice(bytes)
            && let Some(Value::Array(messages)) = row.remove("messages")
        {
            let prompt = row.remove("add_generation_prompt") == Some(Value::Bool(true));
            return Self { messages, tools: row.remove("tools").filter(|tools| !tools.is_null()), prompt };
        }
        let mut bytes = Unstructured::new(bytes);
        Self::generated(&mut bytes).unwrap_or(Self { messages: Vec::new(), tools: None, prompt: true })
    }

    fn generated(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let prompt = bytes.arbitrary()?;
        let tools = if bytes.ratio(1, 3)? { Some(value(bytes, DEPTH)?) } else { None };
        let mut messages = Vec::new();
        while !bytes.is_empty() && messages.len() < MESSAGES {
            messages.push(message(bytes)?);
        }
        Ok(Self { messages, tools, prompt })
    }
}

fn message(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    const ROLES: [&str; 7] = ["user", "assistant", "system", "tool", "developer", "ipython", ""];
    let mut message = Map::new();
    message.insert("role".to_owned(), (*bytes.choose(&ROLES)?).into());
    let content = match bytes.int_in_range(0..=4)? {
        0 | 1 => text(bytes)?,
        2 => Value::Null,
        3 => Value::Array(several(bytes, part)?),
        _ => value(bytes, DEPTH)?,
    };
    message.insert("content".to_owned(), content);
    if bytes.ratio(1, 3)? {
        message.insert("tool_calls".to_owned(), Value::Array(several(bytes, call)?));
    }
    if bytes.ratio(1, 4)? {
        let name = *bytes.choose(&["name", "reasoning_content", "tool_call_id", "thinking"])?;
        message.insert(name.to_owned(), value(bytes, 2)?);
    }
    Ok(Value::Object(message))
}

fn part(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    Ok(match bytes.int_in_range(0..=3)? {
        0 | 1 => json!({"type": "text", "text": text(bytes)?}),
        2 => json!({"type": "image", "image": null}),
        _ => value(bytes, 2)?,
    })
}

fn call(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    let function = json!({"name": text(bytes)?, "arguments": value(bytes, DEPTH)?});
    Ok(if bytes.ratio(1, 2)? { json!({"type": "function", "function": function}) } else { function })
}

fn several(
    bytes: &mut Unstructured<'_>,
    one: fn(&mut Unstructured<'_>) -> arbitrary::Result<Value>,
) -> arbitrary::Result<Vec<Value>> {
    (0..bytes.int_in_range(0..=3)?).map(|_| one(bytes)).collect()
}

fn text(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    const TEXTS: [&str; 6] = [
        "",
        " Be brief. ",
        "<think>\nhm\n</think>\n\nA model.",
        "naïve 😀",
        "{{ messages }}",
        "\u{0}\r\n</s>",
    ];
    Ok(if bytes.ratio(1, 2)? { (*bytes.choose(&TEXTS)?).into() } else { String::arbitrary(bytes)?.into() })
}

/// Any JSON value.
fn value(bytes: &mut Unstructured<'_>, depth: usize) -> arbitrary::Result<Value> {
    Ok(match bytes.int_in_range(0..=if depth == 0 { 6 } else { 8 })? {
        0 => Value::Null,
        1 => bool::arbitrary(bytes)?.into(),
        2 => i64::arbitrary(bytes)?.into(),
        3 => u64::arbitrary(bytes)?.into(),
        4 => f64::arbitrary(bytes)?.into(),
        5 | 6 => text(bytes)?,
        7 => (0..bytes.int_in_range(0..=4)?)
            .map(|_| value(bytes, depth - 1))
            .collect::<arbitrary::Result<Vec<_>>>()?
            .into(),
        _ => {
            let mut map = Map::new();
            for _ in 0..bytes.int_in_range(0..=4)? {
                let key = String::arbitrary(bytes)?;
                map.insert(key, value(bytes, depth - 1)?);
            }
            Value::Object(map)
        }
    })
}
