//! Multiple-choice questions.

use predicates::str::contains;
use serde_json::{Value, json};

use super::{Fixture, sentences};

const QUESTIONS: &str = r#"{"question": "The 3 small words of line", "choices": ["9", "9 were read.", "nothing"], "answer": 0}
{"question": "The 4 small words of line ", "choices": ["16", "were"], "answer": 1}
"#;

/// Accuracy beside KL, in every form.
#[test]
fn questions_are_answered_beside_text() {
    let fixture = Fixture::new();
    fixture.write("suite.jsonl", QUESTIONS);
    let both = ["--reference", "reference", "--suite", "suite.jsonl"];
    let assert = fixture.eval(&[&both[..], &["--report", "result.md"]].concat()).success();
    let shown = String::from_utf8_lossy(&assert.get_output().stdout).into_owned();
    assert!(
        shown.contains("KL, nats/token") && shown.contains("suite.jsonl: 2 questions, 5 answers"),
        "{shown}"
    );
    assert!(
        shown.contains("acc_norm") && shown.contains("model and reference choose the same answer to"),
        "{shown}"
    );
    let markdown = std::fs::read_to_string(fixture.path("result.md")).unwrap();
    assert!(markdown.contains("\n### suite.jsonl: 2 questions, 5 answers\n"), "{markdown}");
    assert!(markdown.contains("\n| model | acc | acc_norm | acc_bytes |\n"), "{markdown}");
    let found = fixture.json(&both);
    let own = &found["suite"];
    let accuracy = own["acc"].as_f64().unwrap();
    assert!([0.0, 0.5, 1.0].contains(&accuracy) && own["beside"]["reference"]["acc"].is_f64(), "{own}");
    assert!(found["kl_mean"].is_f64() && found["schema_version"] == 3);
    let threads = fixture.json(&[&both[..], &["--threads", "1", "--low-memory"]].concat());
    let timeless = |mut found: Value| {
        found["suite"]["seconds"].take();
        found["suite"].take()
    };
    assert_eq!(timeless(found), timeless(threads));
    fixture
        .eval(&["--suite", "suite.jsonl", "--dry-run"])
        .success()
        .stdout(contains("suite.jsonl: 2 questions"));
}

#[test]
fn questions_that_are_broken() {
    let fixture = Fixture::new();
    let good = QUESTIONS.lines().next().unwrap();
    for (bad, text) in [
        ("{\"question\": \"unfinished", "EOF"),
        (
            "{\"question\": \"Q\", \"choices\": [\"a\", \"b\"], \"answer\": 2}",
            "number 2 (counted from 0) of 2",
        ),
        ("{\"question\": \"Q\", \"choices\": [], \"answer\": 0}", "0 answers"),
    ] {
        fixture.write("suite.jsonl", &format!("{good}\n\n{bad}\n{good}\n"));
        fixture.refuses(&["--suite", "suite.jsonl"], &["suite.jsonl, line 3", text]);
    }
    fixture.refuses(&["--suite", "missing.jsonl"], &["missing.jsonl"]);
    fixture.refuses(&["--suite", "model"], &["model is not a plain file"]);
    let long = json!({"question": sentences(0..200), "choices": ["a", "b"], "answer": 0}).to_string();
    fixture.write("suite.jsonl", &long);
    fixture.refuses(&["--suite", "suite.jsonl"], &["suite.jsonl, line 1", "the model sees"]);
}
