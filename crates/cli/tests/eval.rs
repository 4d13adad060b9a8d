//! `mlx-quant eval` as people run it: what it prints and writes, and that bad input ends with exit code 2, a hint, and
//! nothing written.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;
#[path = "eval/suite.rs"]
mod suite;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::{Value, json};

use crate::common::mlx_quant;

const WEIGHTS: &str = "model.safetensors";
const LAYER: &str = "model.layers.1.mlp.down_proj";

/// A directory with a small model (`reference`), its conversion to 4 bits (`model`) and some text (`text.txt`).
struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::converted(&[])
    }

    fn converted(extra: &[&str]) -> Self {
        let fixture = Self { directory: tempfile::tempdir().unwrap() };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo/llama_tied");
        std::fs::create_dir(fixture.path("reference")).unwrap();
        for entry in std::fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), fixture.path("reference").join(entry.file_name())).unwrap();
        }
        let mut convert = mlx_quant();
        convert
            .args(["convert", "-q", "--quiet", "--model"])
            .arg(fixture.path("reference"))
            .arg("--mlx-path");
        convert.arg(fixture.path("model")).args(extra).assert().success();
        fixture.write("text.txt", &sentences(0..80));
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn read_json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.read_json(name);
        change(&mut value);
        self.write(name, &value.to_string());
    }

    /// Changes the header of the converted weights and the data behind it.
    fn edit_weights(&self, change: impl FnOnce(&mut Value, &mut [u8])) {
        let file = self.path("model").join(WEIGHTS);
        let bytes = std::fs::read(&file).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes[8 + length..].to_vec();
        change(&mut header, &mut data);
        let header = header.to_string();
        std::fs::write(file, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat())
            .unwrap();
    }

    /// Files in the directory.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs in the directory, so that arguments are names in it.
    fn run(&self, arguments: &[&str]) -> Assert {
        mlx_quant().arg("eval").args(arguments).current_dir(self.directory.path()).assert()
    }

    /// Evaluates the conversion on the text in small windows.
    fn eval(&self, extra: &[&str]) -> Assert {
        let usual = ["--model", "model", "--windows", "3", "--sequence-length", "32"];
        let data: &[&str] = if extra.iter().any(|argument| argument.starts_with("--data")) {
            &[]
        } else {
            &["--data", "text.txt"]
        };
        self.run(&[&usual, data, extra].concat())
    }

    fn json(&self, extra: &[&str]) -> Value {
        let assert = self.eval(&[&["--json"], extra].concat()).success();
        serde_json::from_slice(&assert.get_output().stdout).unwrap()
    }

    /// Exit code 2, the texts in the error, a hint, nothing on stdout and nothing new in the directory.
    fn refuses(&self, extra: &[&str], texts: &[&str]) {
        let before = self.names();
        let new = ["--report", "new.json"];
        let mut assert = self.eval(&[&new, extra].concat()).code(2).stdout("").stderr(contains("error: "));
        assert = assert.stderr(contains("\nhint: "));
        for text in texts {
            assert = assert.stderr(contains(*text));
        }
        assert_eq!(self.names(), before, "{}", String::from_utf8_lossy(&assert.get_output().stderr));
    }
}

/// Any text, no two parts of it alike.
fn sentences(numbers: std::ops::Range<usize>) -> String {
    let sentence = |number| format!("The {number} small words of line {} were read. ", number * number);
    numbers.map(sentence).collect::<Vec<_>>().concat()
}

#[test]
#[cfg(feature = "demo")]
fn without_arguments_it_measures_the_demo_model() {
    // The numbers of ../shared/tools/evaluate.py: the demo model on its held-out text.
    let assert = mlx_quant().arg("eval").assert().success();
    let text = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0], "demo model (built in) (16.000 bits per weight)");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["data", "windows", "tokens", "perplexity"]);
    assert!(
        lines[2].contains("held_out.txt") && lines[2].contains("8176") && lines[2].contains("18.422"),
        "{text}"
    );
    assert.stderr(contains("tokens/s"));
}

#[test]
fn a_table_with_a_reference() {
    let fixture = Fixture::new();
    let told = contains("\nperplexity 0.9").and(contains(" times the reference's (log-perplexity -"));
    let title = contains("model (").and(contains("bits per weight) against reference\n"));
    let made = fixture.eval(&["--reference", "reference"]).success();
    let table = String::from_utf8(made.get_output().stdout.clone()).unwrap();
    // No terminal: 80 columns, and what was left out is named.
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    assert!(table.contains("not shown at 80 columns: ") && table.contains("KL, nats/token"), "{table}");
    made.stdout(told.and(title)).stderr(contains("tokens/s"));
    let arguments = ["--model", "model", "--reference", "reference", "--data", "text.txt"];
    let small = ["--windows", "3", "--sequence-length", "32"];
    let mut wide = mlx_quant();
    wide.arg("eval").args(arguments).args(small).current_dir(fixture.directory.path()).env("COLUMNS", "200");
    let heads = contains("p99.9").and(contains("top-1 agreement")).and(contains("log difference"));
    wide.assert().success().stdout(heads.and(contains("not shown").not()));
}

#[test]
fn json_is_one_document_with_everything() {
    let fixture = Fixture::new();
    let document = fixture.json(&["--reference", "reference"]);
    let numbers = [
        "perplexity",
        "perplexity_stderr",
        "reference_perplexity",
        "log_perplexity_difference",
        "log_perplexity_difference_stderr",
        "perplexity_ratio",
        "perplexity_ratio_stderr",
        "kl_mean",
        "kl_stderr",
        "kl_p50",
        "kl_p99",
        "kl_p999",
        "kl_max",
        "top1",
        "top1_stderr",
        "bits_per_weight",
        "seconds",
        "predicted_memory_bytes",
    ];
    for name in numbers {
        assert!(document[name].is_number(), "{name}: {document}");
    }
    assert_eq!((&document["tokens"], &document["windows"]), (&json!(3 * 31), &json!(3)));
    assert_eq!((&document["model"], &document["reference"]), (&json!("model"), &json!("reference")));
    assert_eq!((&document["sequence_length"], &document["model_type"]), (&json!(32), &json!("llama")));
    assert_eq!(document["sources"][0]["name"], "text.txt");
    let ordered = ["kl_p50", "kl_p99", "kl_p999", "kl_max"].map(|name| document[name].as_f64().unwrap());
    assert!(ordered.is_sorted() && ordered[0] > 0.0, "{ordered:?}");
    // The ratio is that of the two perplexities beside it, and its error that of the difference.
    let number = |name: &str| document[name].as_f64().unwrap();
    let ratio = number("perplexity") / number("reference_perplexity");
    assert!((number("perplexity_ratio") / ratio - 1.0).abs() < 1e-12, "{document}");
    assert!((number("log_perplexity_difference") - ratio.ln()).abs() < 1e-12, "{document}");
    let paired = number("log_perplexity_difference_stderr");
    assert!(paired < number("perplexity_stderr") / number("perplexity"), "{document}");
    assert_eq!(document["schema_version"], 3);
    let bits = document["bits_per_weight"].as_f64().unwrap();
    assert!((4.5..5.0).contains(&bits), "{bits}");
    let alone = fixture.json(&[]);
    assert!(alone.get("kl_mean").is_none() && alone["perplexity"] == document["perplexity"]);
}

#[test]
fn reports_are_written_by_their_ending() {
    let fixture = Fixture::new();
    let both = ["--reference", "reference", "--report"];
    fixture.eval(&[&both[..], &["result.md"]].concat()).success();
    let markdown = std::fs::read_to_string(fixture.path("result.md")).unwrap();
    let heads = "\n| data | windows | tokens | KL, nats/token | top-1 agreement | perplexity ratio |";
    assert!(markdown.starts_with("## model (") && markdown.contains(heads), "{markdown}");
    assert!(markdown.contains("\n| text.txt | 3 | 93 | "), "{markdown}");
    // An earlier report is replaced.
    fixture.write("result.json", &"an earlier report ".repeat(1000));
    fixture.eval(&[&both[..], &["result.json"]].concat()).success();
    let report = fixture.read_json("result.json");
    let printed = fixture.json(&["--reference", "reference"]);
    for name in ["perplexity", "kl_mean", "top1", "data_hash"] {
        assert!(report[name] == printed[name] && !report[name].is_null(), "{name}");
    }
    for name in ["result.html", "result", "missing/result.md"] {
        let assert = fixture.eval(&["--report", name]).code(2).stdout("");
        assert.stderr(contains("hint: "));
        assert!(!fixture.path(name).exists(), "{name}");
    }
}

#[test]
fn a_refusal_keeps_an_earlier_report() {
    let fixture = Fixture::new();
    fixture.write("result.md", "an earlier report");
    fixture.eval(&["--report", "result.md", "--data", "missing.txt"]).code(2);
    assert_eq!(std::fs::read_to_string(fixture.path("result.md")).unwrap(), "an earlier report");
}

#[test]
fn dry_run_tells_memory_and_computes_nothing() {
    let fixture = Fixture::new();
    // Found only by computing: a scale that is not a number.
    spoil_scales(&fixture, &[0xC0, 0x7F]);
    let before = fixture.names();
    let arguments = ["--dry-run", "--reference", "reference", "--report", "new.md", "--cache", "cache"];
    let shown = contains("peak memory").and(contains("3 of ")).and(contains("perplexity").not());
    fixture.eval(&arguments).success().stdout(shown).stderr("model    model\n");
    assert_eq!(fixture.names(), before);
    let document = fixture.json(&arguments);
    assert!(document["memory"]["peak"].as_u64().unwrap() > 0);
    assert_eq!(document["data"]["windows"], 3);
    let low = fixture.json(&["--dry-run", "--low-memory"]);
    assert!(low["memory"]["peak"].as_u64() <= document["memory"]["peak"].as_u64());
}

#[test]
fn stdout_holds_data_only() {
    let fixture = Fixture::new();
    let table = fixture.eval(&["--quiet"]).success().stderr("");
    let table = String::from_utf8(table.get_output().stdout.clone()).unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
    fixture.eval(&[]).success().stdout(table.clone()).stderr(contains("tokens/s"));
    fixture.eval(&["--verbose", "--low-memory", "--threads", "1"]).success().stdout(table);
    let document = fixture.eval(&["--quiet", "--json"]).success().stderr("");
    serde_json::from_slice::<Value>(&document.get_output().stdout).unwrap();
    fixture.eval(&["--quiet", "--data", "missing.txt"]).code(2).stdout("").stderr(contains("hint: "));
}

#[test]
fn windows_0_takes_all() {
    let fixture = Fixture::new();
    let all = fixture.json(&[]);
    let total = &all["sources"][0]["windows_total"];
    assert!(total.as_u64().unwrap() > 3);
    let arguments =
        ["--model", "model", "--data", "text.txt", "--sequence-length", "32", "--windows", "0", "--json"];
    let output = fixture.run(&arguments).success().get_output().stdout.clone();
    let document: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(document["windows"], *total);
}

#[test]
fn names_of_mlx_lm_work() {
    let fixture = Fixture::new();
    let arguments = [
        "--hf-path",
        "model",
        "--data-path",
        "text.txt",
        "--max-seq-length",
        "32",
        "--windows",
        "3",
        "--json",
    ];
    let output = fixture.run(&arguments).success().get_output().stdout.clone();
    let document: Value = serde_json::from_slice(&output).unwrap();
    let expected = fixture.json(&[]);
    assert_eq!(
        (&document["perplexity"], &document["data_hash"]),
        (&expected["perplexity"], &expected["data_hash"])
    );
}

#[test]
fn files_of_a_directory_are_reported_apart() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.path("data")).unwrap();
    fixture.write("data/first.txt", &sentences(0..60));
    fixture.write("data/second.jsonl", &json!({"text": sentences(60..120)}).to_string());
    let document = fixture.json(&["--data", "data"]);
    assert_eq!(document["by_source"].as_array().unwrap().len(), 2);
    assert_eq!((&document["windows"], &document["by_source"][1]["windows"]), (&json!(6), &json!(3)));
    let rows = contains(" all ").and(contains(" first.txt ")).and(contains(" second.jsonl "));
    fixture.eval(&["--data", "data"]).success().stdout(rows);
}

#[test]
fn the_cache_serves_the_second_run() {
    let fixture = Fixture::new();
    let arguments = ["--reference", "reference", "--cache", "cache"];
    let first = fixture.json(&arguments);
    let second = fixture.json(&arguments);
    assert_eq!((&first["reference_cached"], &second["reference_cached"]), (&json!(false), &json!(true)));
    for name in ["perplexity", "kl_mean", "kl_max", "top1", "reference_perplexity"] {
        assert_eq!(first[name], second[name], "{name}");
    }
    fixture.eval(&arguments).success().stderr(contains("reference from the cache"));
    fixture.refuses(
        &["--reference", "reference", "--cache", "text.txt"],
        &["text.txt", "give another directory"],
    );
    fixture.eval(&["--cache", "cache"]).code(2).stdout("").stderr(contains("--reference"));
}

#[test]
fn windows_without_a_prediction() {
    let fixture = Fixture::new();
    for length in ["0", "1"] {
        let arguments = ["--model", "model", "--data", "text.txt", "--sequence-length", length];
        fixture
            .run(&arguments)
            .code(2)
            .stdout("")
            .stderr(contains("nothing to predict").and(contains("\nhint: ")));
    }
}

#[test]
fn text_shorter_than_a_window() {
    let fixture = Fixture::new();
    fixture.write("short.txt", "A few words.");
    fixture
        .refuses(&["--data", "short.txt"], &["short.txt", "one window needs", "shorter --sequence-length"]);
    fixture.write("empty.txt", "");
    fixture.refuses(&["--data", "empty.txt"], &["empty.txt"]);
}

#[test]
fn data_that_is_missing() {
    let fixture = Fixture::new();
    fixture.refuses(&["--data", "missing.txt"], &["missing.txt"]);
    std::fs::create_dir(fixture.path("empty")).unwrap();
    fixture.write("empty/readme.md", "no data");
    fixture.refuses(&["--data", "empty"], &["empty", "holds no .txt"]);
    fixture.write("text.csv", "a,b");
    fixture.refuses(&["--data", "text.csv"], &["text.csv"]);
}

#[test]
fn lines_that_are_broken() {
    let fixture = Fixture::new();
    let good = json!({"text": sentences(0..40)}).to_string();
    for (bad, text) in
        [("{\"text\": \"unfinished", "column"), ("[1, 2]", "not an object"), ("{\"x\": 1}", "neither text")]
    {
        fixture.write("data.jsonl", &format!("{good}\n\n{bad}\n{good}\n"));
        fixture.refuses(&["--data", "data.jsonl"], &["data.jsonl, line 3", text]);
    }
    std::fs::write(fixture.path("data.jsonl"), b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}\n").unwrap();
    fixture.refuses(&["--data", "data.jsonl"], &["data.jsonl, line 2: not UTF-8"]);
}

#[test]
fn token_ids_beyond_the_vocabulary() {
    let fixture = Fixture::new();
    fixture.edit_json("model/tokenizer.json", |tokenizer| {
        let mut added = tokenizer["added_tokens"][0].clone();
        added["id"] = 512.into();
        added["content"] = "small words".into();
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    });
    fixture.refuses(&[], &["text.txt: token 512 is beyond the model's vocabulary of 512"]);
}

#[test]
#[cfg(feature = "demo")]
fn references_with_another_vocabulary() {
    let fixture = Fixture::new();
    mlx_quant().args(["convert", "--quiet", "--mlx-path"]).arg(fixture.path("other")).assert().success();
    let texts = ["other has a vocabulary of 6144", "model of 512"];
    fixture.refuses(&["--reference", "other", "--cache", "cache"], &texts);
}

#[test]
fn packed_tensors_with_wrong_shapes() {
    let fixture = Fixture::new();
    fixture.edit_weights(|header, _| {
        let shape = &mut header[format!("{LAYER}.scales")]["shape"];
        *shape = json!([shape[1], shape[0]]);
    });
    fixture.refuses(&[], &[LAYER]);
    fixture.refuses(&["--reference", "model"], &[LAYER]);
}

/// Overwrites the beginning of a layer's scales.
fn spoil_scales(fixture: &Fixture, value: &[u8]) {
    fixture.edit_weights(|header, data| {
        let start = header[format!("{LAYER}.scales")]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + value.len()].copy_from_slice(value);
    });
}

#[test]
fn scales_that_are_no_numbers() {
    let cases: [(&[&str], &[u8]); 2] = [(&[], &[0xC0, 0x7F]), (&["--q-mode", "mxfp4"], &[0xFF])];
    for (extra, not_a_number) in cases {
        let fixture = Fixture::converted(extra);
        spoil_scales(&fixture, not_a_number);
        let weight = format!("{LAYER}.weight");
        fixture.refuses(&[], &[&weight, WEIGHTS, "element 0 is "]);
    }
}

#[test]
fn models_that_cannot_be_run() {
    let fixture = Fixture::new();
    fixture.edit_json("model/config.json", |config| config["model_type"] = "new_one".into());
    fixture.refuses(&[], &["new_one", "no decoder description"]);
}

#[test]
fn models_that_are_not_here() {
    let fixture = Fixture::new();
    let hub = fixture.run(&["--model", "org/name"]).code(2).stdout("");
    let why = if cfg!(feature = "hub") { "org/name is not in the cache" } else { "does not know the hub" };
    hub.stderr(contains("\nhint: ").and(contains("org/name")).and(contains(why)));
    fixture.refuses(&["--reference", "org/name"], &["org/name", why]);
    fixture.refuses(&["--reference", "missing"], &["missing"]);
    std::fs::create_dir(fixture.path("empty")).unwrap();
    fixture.refuses(&["--reference", "empty"], &["config.json is missing"]);
}

#[test]
fn chat_templates_that_never_end() {
    let fixture = Fixture::new();
    let message = json!({"messages": [{"role": "user", "content": sentences(0..80)}]});
    fixture.write("chat.jsonl", &message.to_string());
    let templates = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(text='many words ') %}{% for a in range(99999) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ];
    for template in templates {
        fixture.edit_json("model/tokenizer_config.json", |config| config["chat_template"] = template.into());
        let start = Instant::now();
        fixture.refuses(&["--data", "chat.jsonl"], &["chat.jsonl, line 1"]);
        assert!(start.elapsed() < Duration::from_secs(30), "{template}");
        #[cfg(target_os = "linux")]
        in_a_gigabyte(&fixture).code(2).stderr(contains("chat.jsonl, line 1"));
    }
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}";
    fixture.edit_json("model/tokenizer_config.json", |config| config["chat_template"] = template.into());
    assert_eq!(fixture.json(&["--data", "chat.jsonl"])["windows"], 3);
}

/// Evaluates with no more than a gigabyte of address space for data.
#[cfg(target_os = "linux")]
fn in_a_gigabyte(fixture: &Fixture) -> Assert {
    let program = mlx_quant().get_program().to_owned();
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -d 1048576; exec \"$0\" \"$@\""]).arg(program).arg("eval");
    shell.args(["--model", "model", "--data", "chat.jsonl", "--sequence-length", "32", "--threads", "2"]);
    shell.current_dir(fixture.directory.path()).assert()
}

#[test]
fn help_has_examples() {
    let help = contains("Examples:")
        .and(contains("mlx-quant eval --model ./Qwen3-8B-4bit --reference Qwen/Qwen3-8B"));
    mlx_quant().args(["eval", "--help"]).assert().success().stdout(help);
}
