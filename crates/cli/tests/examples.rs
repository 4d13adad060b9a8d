//! Every example of `--help`, README.md and docs/ runs as it is printed, on a small model under the name that it uses.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mlx_quant_hub_fixture::{Hub, Kind};

use crate::common::{hub, knows, mlx_quant, two_blocks};

/// Longest line of `--help` that is not wrapped.
const WIDTH: usize = 100;

/// Flags whose values are replaced, so that a run takes a second or two, and by what.
const CALIBRATED: [(&str, &str); 3] =
    [("--n-samples", "2"), ("--sequence-length", "64"), ("--eval-windows", "0")];
const LEARNED: [(&str, &str); 2] = [("--learn-steps", "2"), ("--learn-batch", "1")];
const TRAINED: [(&str, &str); 3] = [("--iters", "2"), ("--batch-size", "2"), ("--valid-samples", "1")];

/// `mlx-quant ...` lines of fenced `sh` blocks.
fn of_markdown(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut fence: Option<bool> = None;
    for line in text.lines() {
        match (line.trim().strip_prefix("```"), fence) {
            (Some(kind), None) => fence = Some(matches!(kind, "sh" | "console")),
            (Some(_), Some(_)) => fence = None,
            (None, Some(true)) => lines.extend(command(line)),
            _ => {}
        }
    }
    lines
}

/// Lines of `--help`'s examples.
fn of_help(command_name: &str) -> Vec<String> {
    let mut run = mlx_quant();
    if !command_name.is_empty() {
        run.arg(command_name);
    }
    let shown = run.arg("--help").assert().success();
    let text = String::from_utf8(shown.get_output().stdout.clone()).unwrap();
    let Some((_, examples)) = text.split_once("Examples:") else { panic!("{command_name} has no examples") };
    assert!(examples.lines().all(|line| line.len() <= WIDTH), "{command_name}: a line is too long");
    examples.lines().filter_map(command).collect()
}

/// A command line, without its prompt, comment and what the shell would do with its output.
fn command(line: &str) -> Option<String> {
    let line = line.trim();
    let line = line.strip_prefix("$ ").unwrap_or(line);
    let own = line.starts_with("mlx-quant ") || line.starts_with("mlx_lm.");
    let end = [" | ", " > ", " #"].iter().filter_map(|mark| line.find(mark)).min().unwrap_or(line.len());
    own.then(|| line[..end].trim().to_owned())
}

/// What the documents say is there before the first command: a model, somebody's quantized model, a text and a recipe file; and a hub
/// with a small model under every id.
fn workplace() -> (tempfile::TempDir, Hub) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let model = two_blocks(directory.path(), "Qwen3-8B");
    quantized(directory.path(), "any-mlx-model", "3");
    let hub = hub();
    for id in ["Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.2-3B-Instruct"] {
        hub.add_directory(Kind::Model, id, &model);
    }
    hub.add_directory(Kind::Model, "mlx-community/Qwen3-8B-4bit", &at("any-mlx-model"));
    let text = "Every measure of a model needs a text that it has not seen. ".repeat(20);
    let lines = (0..12).map(|line| serde_json::json!({"text": format!("{line} {text}")}).to_string());
    let lines = lines.collect::<Vec<_>>().join("\n");
    std::fs::write(at("chats.jsonl"), &lines).unwrap();
    let train = ("data/train-00000-of-00006.jsonl".to_owned(), lines.into_bytes());
    hub.add(Kind::Dataset, "allenai/tulu-3-sft-mixture", vec![train]);
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/suite.jsonl");
    std::fs::create_dir(at("docs")).unwrap();
    for name in ["questions.jsonl", "docs/suite.jsonl"] {
        std::fs::copy(&suite, at(name)).unwrap();
    }
    std::fs::write(at("recipe.toml"), "[[layer]]\npath = \"*.mlp.down_proj\"\nbits = 6\n").unwrap();
    (directory, hub)
}

/// Quantizes the workplace's model.
fn quantized(directory: &Path, name: &str, bits: &str) {
    let mut convert = mlx_quant();
    convert.args(["convert", "-q", "--quiet", "--bits", bits, "--model", "Qwen3-8B", "--mlx-path", name]);
    convert.current_dir(directory).assert().success();
}

/// The words of a line with values that make it short.
fn shortened(line: &str) -> Vec<String> {
    let mut words: Vec<String> =
        line.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect();
    let name = words[1].clone();
    let has = |words: &[String], part: &str| words.iter().any(|word| word.contains(part));
    let mut flags: Vec<(&str, &str)> = Vec::new();
    match name.as_str() {
        "awq" | "gptq" | "dynamic-quant" | "dwq" | "quantize" => flags.extend(CALIBRATED),
        "eval" => flags.extend([("--windows", "2"), ("--sequence-length", "64")]),
        "compare" => flags.extend([
            ("--n-samples", "2"),
            ("--sequence-length", "64"),
            ("--windows", "2"),
            ("--iters", "2"),
            ("--learn-steps", "2"),
        ]),
        _ => {}
    }
    if name == "quantize" && has(&words, "learn") {
        flags.extend(LEARNED);
    }
    if name == "dwq" || (name == "quantize" && has(&words, "dwq")) {
        flags.extend(TRAINED);
    }
    for (flag, value) in flags {
        if let Some(at) = words.iter().position(|word| word == flag) {
            words.drain(at..at + 2);
        }
        words.extend([flag.to_owned(), value.to_owned()]);
    }
    words.split_off(1)
}

/// The directory that a line of `--help` writes.
fn output(words: &[String]) -> Option<PathBuf> {
    let after = |flag: &str| {
        words.iter().position(|word| word == flag).and_then(|at| words.get(at + 1)).map(PathBuf::from)
    };
    let usual = match words[0].as_str() {
        "convert" | "awq" | "gptq" | "dynamic-quant" | "dwq" | "quantize" => Some("mlx_model"),
        "compare" => Some("mlx_compare"),
        _ => None,
    };
    after("--mlx-path").or_else(|| after("--output")).or(usual.map(PathBuf::from))
}

/// Runs a line, shortened.
fn run(source: &str, line: &str, (directory, hub): &(tempfile::TempDir, Hub)) {
    let (words, directory) = (shortened(line), directory.path());
    let made = knows(&mut mlx_quant(), hub, directory).args(&words).current_dir(directory).output().unwrap();
    let errors = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{source}: {line}\nas {words:?}\n{errors}");
}

/// Examples of a help stand beside each other: an output of an earlier one makes room.
#[test]
#[cfg_attr(not(feature = "hub"), ignore = "needs --features hub")]
fn help() {
    let (place, mut seen) = (workplace(), BTreeSet::new());
    for (name, bits) in [("Qwen3-8B-4bit", "4"), ("Qwen3-8B-3bit", "3"), ("Qwen3-8B-gptq", "4")] {
        quantized(place.0.path(), name, bits);
    }
    let commands = [
        "",
        "convert",
        "awq",
        "gptq",
        "dynamic-quant",
        "dwq",
        "quantize",
        "inspect",
        "eval",
        "compare",
        "recommend",
        "devices",
        "upload",
        "completions",
        "man",
    ];
    for name in commands {
        let lines = of_help(name);
        assert!(!lines.is_empty(), "{name} shows no example");
        // A line that is printed in several places is run once.
        for line in lines.into_iter().filter(|line| seen.insert(line.clone())) {
            if let Some(output) = output(&shortened(&line)).map(|path| place.0.path().join(path)) {
                let _ = std::fs::remove_dir_all(output);
            }
            run(&format!("{name} --help"), &line, &place);
        }
    }
}

/// As somebody would who reads README.md and then the pages of docs/ by their names, in one directory: what a line makes is what a
/// later one takes, and no two lines make one thing.
#[test]
#[cfg_attr(not(feature = "hub"), ignore = "needs --features hub")]
fn documents_in_their_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (place, mut seen) = (workplace(), BTreeSet::new());
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "md"));
    files.sort();
    files.insert(0, root.join("README.md"));
    assert!(files.len() >= 8, "{files:?}");
    let mut total = 0;
    for file in files {
        let lines = of_markdown(&std::fs::read_to_string(&file).unwrap());
        total += lines.len();
        for line in lines.into_iter().filter(|line| seen.insert(line.clone())) {
            run(&file.display().to_string(), &line, &place);
        }
    }
    assert!(total > 30, "{total} lines only");
}

/// The two commands of a fresh clone.
#[test]
fn readme_begins_with_what_works_without_anything() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("README.md")).unwrap();
    let blocks: Vec<&str> =
        text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks[0], "cargo run --release -- compare\ncargo test --workspace --all-features\n");
}
