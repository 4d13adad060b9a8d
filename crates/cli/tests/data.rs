//! Text of many forms and sizes through the whole command: what is said, what is in the JSON, what is refused.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::common::{document, mlx_quant, two_blocks};

/// Refuses what does not begin with a user's turn.
const RAISES: &str = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must | alternate') }}{% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}";

struct Place {
    root: tempfile::TempDir,
}

impl Place {
    /// A directory with a small model whose template is `RAISES`.
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let model = two_blocks(root.path(), "model");
        std::fs::write(model.join("chat_template.jinja"), RAISES).unwrap();
        Self { root }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A file of conversations, each begun by that role.
    fn chats(&self, name: &str, roles: &[&str]) {
        let line = |role: &&str| {
            let said = "Words that are said, and more of them. ".repeat(30);
            json!({"messages": [{"role": role, "content": said}]}).to_string() + "\n"
        };
        std::fs::write(self.at(name), roles.iter().map(line).collect::<String>()).unwrap();
    }

    fn run(&self, line: &str) -> assert_cmd::Command {
        let mut run = mlx_quant();
        run.current_dir(self.root.path()).args(line.split_whitespace());
        run
    }
}

fn valid(schema: &str, document: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas").join(format!("{schema}.schema.json"));
    let schema: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let problems: Vec<String> = jsonschema::validator_for(&schema)
        .unwrap()
        .iter_errors(document)
        .map(|error| error.to_string())
        .collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

fn stderr(run: &mut assert_cmd::Command, code: i32) -> String {
    let made = run.output().unwrap();
    let text = String::from_utf8(made.stderr).unwrap();
    assert_eq!(made.status.code(), Some(code), "{text}");
    text
}

const EVAL: &str = "eval --model model --windows 2 --sequence-length 32 --data";
const GPTQ: &str =
    "gptq --model model --n-samples 4 --sequence-length 32 --eval-windows 0 --mlx-path made --data";

#[test]
fn rows_that_are_left_out_are_counted_and_told() {
    let place = Place::new();
    place.chats("chats.jsonl", &["user", "user", "assistant", "user", "tool"]);
    let expected = "chats.jsonl: 2 of 5 rows left out: line 3: ";
    let evaluation = document(&mut place.run(&format!("{EVAL} chats.jsonl")));
    valid("eval", &evaluation);
    let source = &evaluation["sources"][0];
    assert_eq!((&source["rows_left_out"], &source["documents"]), (&json!(2), &json!(3)));
    assert!(source["first_left_out"].as_str().unwrap().contains("roles must | alternate"));
    let plan = document(&mut place.run(&format!("{EVAL} chats.jsonl --dry-run")));
    valid("eval", &plan);
    let said = stderr(&mut place.run(&format!("{EVAL} chats.jsonl")), 0);
    assert!(said.contains("warning: ") && said.contains(expected) && said.contains("--strict"), "{said}");
    let shown = place.run(&format!("{EVAL} chats.jsonl --dry-run")).output().unwrap().stdout;
    assert!(String::from_utf8(shown).unwrap().contains("2 of 5 rows left out: line 3: "));
    // The card keeps it, in a cell of its table.
    let said = stderr(&mut place.run(&format!("{GPTQ} chats.jsonl")), 0);
    assert!(said.contains(expected), "{said}");
    let card = std::fs::read_to_string(place.at("made/README.md")).unwrap();
    assert!(card.contains("| calibration rows | 2 of 5 rows left out: line 3: "), "{card}");
    assert!(card.contains("roles must \\| alternate"), "{card}");
}

#[test]
fn strict_runs_and_most_rows_refused_write_nothing() {
    let place = Place::new();
    place.chats("one.jsonl", &["user", "user", "assistant", "user"]);
    place.chats("most.jsonl", &["user", "assistant", "assistant"]);
    std::fs::write(place.at("no.jsonl"), "{\"id\": 1, \"body\": \"x\"}\n").unwrap();
    for (data, expected) in [
        ("one.jsonl --strict", "one.jsonl, line 3: chat template of"),
        ("most.jsonl", "most.jsonl, line 2: the model's chat template refuses the row (and in all 2 of 3): "),
        ("no.jsonl", "no.jsonl, line 1: neither text"),
    ] {
        for command in [EVAL, GPTQ] {
            let said = stderr(&mut place.run(&format!("{command} {data}")), 2);
            assert!(said.contains("error: ") && said.contains(expected) && said.contains("hint: "), "{said}");
            assert!(!place.at("made").exists() && !place.at(".made.partial").exists());
        }
    }
    let said = stderr(&mut place.run(&format!("{EVAL} no.jsonl")), 2);
    assert!(said.contains("the columns found are id, body;"), "{said}");
    // No row is refused: nothing is said.
    place.chats("fine.jsonl", &["user", "user"]);
    let said = stderr(&mut place.run(&format!("{EVAL} fine.jsonl --strict")), 0);
    assert!(!said.contains("left out") && !said.contains("read "), "{said}");
}

#[test]
fn a_sample_of_a_large_file_is_told() {
    let place = Place::new();
    let line = json!({"text": "Words that are said, and more of them. ".repeat(1000)}).to_string() + "\n";
    let mut file = std::io::BufWriter::new(std::fs::File::create(place.at("large.jsonl")).unwrap());
    let count = (66 << 20) / line.len();
    (0..count).for_each(|_| file.write_all(line.as_bytes()).unwrap());
    file.into_inner().unwrap();
    let plan = document(&mut place.run(&format!("{EVAL} large.jsonl --dry-run")));
    valid("eval", &plan);
    let source = &plan["data"]["sources"][0];
    assert_eq!((&source["extent"], &source["bytes_total"]), (&json!("spread"), &json!(count * line.len())));
    let read = source["bytes_read"].as_u64().unwrap();
    assert!((8 << 20..9 << 20).contains(&read), "{read}");
    let said = stderr(&mut place.run(&format!("{EVAL} large.jsonl --dry-run")), 0);
    let expected = "large.jsonl: read 8.";
    assert!(said.contains(expected) && said.contains(" MB of 69.2 MB, evenly spaced"), "{said}");
}
