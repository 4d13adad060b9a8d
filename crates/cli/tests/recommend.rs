//! `mlx-quant recommend`, and what packages install.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use mlx_quant::forecast::Machine;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

use crate::common::{dense, document, mlx_quant};

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs").join(name)
}

fn recommend(arguments: &[&str]) -> Command {
    let mut run = mlx_quant();
    run.arg("recommend").args(arguments);
    run
}

fn method<'d>(document: &'d Value, name: &str) -> &'d Value {
    document["methods"].as_array().unwrap().iter().find(|one| one["method"] == name).unwrap()
}

/// Parameters as their makers state them, to a percent, and mlx-lm's published figures.
#[test]
fn plans_from_config_json_alone() {
    let known = [
        ("Llama-3.2-3B", 3.21e9),
        ("Mistral-7B-v0.3", 7.25e9),
        ("Llama-2-13b-hf", 13.02e9),
        ("Llama-3.1-70B", 70.55e9),
        ("Qwen3-30B-A3B", 30.53e9),
    ];
    for (name, parameters) in known {
        let made = document(recommend(&["--memory", "32GB"]).arg("--model").arg(config(name)));
        let found = made["parameters"].as_f64().unwrap();
        assert!((found / parameters - 1.0).abs() < 0.01, "{name}: {found}");
        for one in made["methods"].as_array().unwrap() {
            let Some(needs) = one["forecast"].as_object() else { panic!("{name}: {one}") };
            assert!(needs["seconds"].as_f64().unwrap() > 0.0);
            // Within what may be used, or said to be beyond it.
            let memory = needs["peak_memory"].as_u64().unwrap();
            let most = one["memory_at_most"].as_u64().unwrap();
            assert!((most as f64 / memory as f64 - 1.15).abs() < 1e-6, "{most} for {memory}");
            assert_eq!(
                most > 32_000_000_000,
                one["obstacle"].is_string(),
                "{name}: {} needs {most}",
                one["method"]
            );
            // The figure that is compared is the one that is said.
            if let Some(obstacle) = one["obstacle"].as_str() {
                let said =
                    format!("needs up to {} of memory, 32.0 GB may be used", mlx_quant::numbers::bytes(most));
                assert!(obstacle.starts_with(&said), "{obstacle}");
            }
            assert!(memory < 80_000_000_000, "{name}: {} needs {memory}", one["method"]);
        }
    }
    let made = document(recommend(&[]).arg("--model").arg(config("Qwen3-30B-A3B")));
    let theirs = |name: &str| method(&made, name)["mlx_lm"]["memory"].as_u64();
    // mlx-lm PR 280.
    assert!((theirs("dwq").unwrap() as f64 / 115e9 - 1.0).abs() < 0.01);
    assert_eq!(theirs("awq"), None);
    let made = document(recommend(&["--bits", "3"]).arg("--model").arg(config("Mistral-7B-v0.3")));
    assert!(method(&made, "gptq")["mlx_lm"]["source"].as_str().unwrap().contains("2, 4 and 8"));
}

#[test]
fn headers_and_config_agree() {
    let directory = tempfile::tempdir().unwrap();
    let model = dense(directory.path(), "model");
    let bare = directory.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(model.join("config.json"), bare.join("config.json")).unwrap();
    let of = |path: &Path| document(recommend(&["--memory", "16GB"]).arg("--model").arg(path));
    let (whole, bare) = (of(&model), of(&bare));
    assert_eq!(whole["parameters"], bare["parameters"]);
    let bytes = |made: &Value| method(made, "gptq")["forecast"]["bytes"].as_u64().unwrap();
    assert!(bytes(&whole).abs_diff(bytes(&bare)) < 10_000);
}

#[test]
fn sizes_times_and_memory_decide() {
    let pick = |arguments: &[&str]| -> Value {
        let made = recommend(arguments).args(["--json", "--quiet"]).output().unwrap();
        serde_json::from_slice(&made.stdout).unwrap()
    };
    assert_eq!(pick(&["--quality", "fast"])["recommended"], "basic");
    assert_eq!(pick(&["--quality", "best"])["recommended"], "dynamic+awq+gptq+dwq");
    let made = pick(&["--size", "4MB", "--memory", "16GB"]);
    assert_eq!(made["recommended"], "dynamic+awq+gptq+dwq");
    assert!(made["command"].as_str().unwrap().contains("--target-bpw 4.06"), "{}", made["command"]);
    // Others take the widest that fits.
    assert_eq!(method(&made, "gptq")["bits"], 3);
    let made = pick(&["--time", "0.2s", "--quality", "best"]);
    assert_eq!(made["recommended"], "basic");
    assert!(method(&made, "dwq")["obstacle"].as_str().unwrap().contains("may be used"));
    let nothing = pick(&["--size", "1MB"]);
    assert_eq!(nothing["recommended"], Value::Null);
    recommend(&["--size", "1MB"])
        .assert()
        .code(2)
        .stderr(contains("nothing is possible").and(contains("hint:")));
    // Never above what was asked.
    let made = pick(&["--size", "4MB", "--memory", "16GB"]);
    let bits = method(&made, "dynamic")["target_bpw"].as_f64().unwrap();
    assert!(bits * made["parameters"].as_f64().unwrap() / 8.0 <= 4e6, "{bits}");
}

/// A machine that is always the same, so that what fits does not depend on where a test runs.
fn with_machine(cache: &Path) -> impl Fn(&[&str]) -> Command {
    let machine = Machine { threads: 1, products: 3e11, rounding: 8e9, read: 2e9, write: 1e9, card: None };
    machine.keep(&cache.join("mlx-quant/machine-1.json")).unwrap();
    let cache = cache.to_owned();
    move |arguments| {
        let mut run = recommend(arguments);
        run.args(["--threads", "1"]).env("XDG_CACHE_HOME", &cache);
        run
    }
}

/// Three rows, each with a command of its own; and one for every method that is possible.
#[test]
fn rows_say_what_to_do_in_how_much_time() {
    let cache = tempfile::tempdir().unwrap();
    let on = with_machine(cache.path());
    let rows = |made: &Value| -> Vec<(String, String)> {
        let rows = made["rows"].as_array().unwrap().iter();
        let method = |row: &Value| row["choice"]["method"].as_str().unwrap_or("nothing").to_owned();
        rows.map(|row| (row["when"].as_str().unwrap().to_owned(), method(row))).collect()
    };
    let row = |when: &str, method: &str| (when.to_owned(), method.to_owned());
    // A day's work is no advice for an hour.
    let made = document(on(&["--memory", "64GB"]).arg(config("Llama-3.2-3B")));
    let found = rows(&made);
    assert_eq!(found[0], row("now", "basic"));
    assert!(found[1].0 == "within an hour" && found[2].0 == "overnight" && found.len() == 3, "{found:?}");
    let choices: Vec<&Value> = made["rows"].as_array().unwrap().iter().map(|row| &row["choice"]).collect();
    let seconds = |choice: &Value| choice["forecast"]["seconds"].as_f64().unwrap();
    assert!(seconds(choices[1]) <= 3600.0 && seconds(choices[2]) <= 36000.0);
    let middle = |choice: &Value| {
        (choice["expected_kl"]["low"].as_f64().unwrap() * choice["expected_kl"]["high"].as_f64().unwrap())
            .sqrt()
    };
    assert!(middle(choices[0]) > middle(choices[1]) && middle(choices[1]) > middle(choices[2]));
    let commands: Vec<&str> = choices.iter().map(|choice| choice["command"].as_str().unwrap()).collect();
    let path = |command: &&str| {
        command.split_whitespace().skip_while(|word| *word != "--mlx-path").nth(1).unwrap().to_owned()
    };
    let paths: std::collections::BTreeSet<String> = commands.iter().map(path).collect();
    assert!(paths.len() == 3 && paths.iter().all(|path| path.starts_with("Llama-3.2-3B-")), "{paths:?}");
    // At 8 bits nothing slower is noticeably closer.
    let made = document(on(&["--memory", "64GB", "--bits", "8"]).arg(config("Llama-3.2-3B")));
    assert_eq!(rows(&made), [row("now", "basic"), row("within an hour", "basic"), row("overnight", "basic")]);
    assert_eq!(
        (&made["rows"][2]["same_as"], &made["recommended"]),
        (&serde_json::json!(0), &serde_json::json!("basic"))
    );
    // What does not fit is said in the row.
    let made = document(on(&["--memory", "1GB"]).arg(config("Llama-3.1-70B")));
    assert!(made["rows"][2]["why"].as_str().unwrap().contains("1.00 GB may be used"), "{}", made["rows"][2]);
    let shown = on(&["--memory", "64GB", "--time", "2h"]).arg(config("Llama-3.2-3B")).assert().success();
    shown.stdout(contains("within an hour").and(contains("within 2 h")).and(contains("overnight").not()));
    // As wide as a terminal.
    let shown = |arguments: &[&str], model: &str| {
        let shown = on(arguments).arg(model).current_dir(config("")).assert().success();
        let shown = String::from_utf8(shown.get_output().stdout.clone()).unwrap();
        assert!(shown.lines().count() > 30, "{shown}");
        for line in shown.lines() {
            assert!(line.chars().count() <= 80, "{line}\n{shown}");
        }
        shown
    };
    shown(&["--memory", "64GB"], "Llama-3.2-3B");
    shown(&["--memory", "64GB", "--bits", "6"], "./Llama-3.1-70B");
    let shown = shown(&["--memory", "64GB"], "Qwen3-30B-A3B");
    assert!(
        shown.lines().any(|line| line.trim_start().starts_with("awq ") && line.ends_with("cannot")),
        "{shown}"
    );
}

/// Every command that is printed is one: it plans what was foreseen.
#[test]
fn commands_are_as_printed() {
    let directory = tempfile::tempdir().unwrap();
    let made = document(&mut recommend(&["--n-samples", "2", "--sequence-length", "48", "--iters", "2"]));
    let choices = made["methods"].as_array().unwrap().iter();
    let rows = made["rows"].as_array().unwrap().iter().map(|row| &row["choice"]);
    let mut run = 0;
    for choice in choices.chain(rows) {
        let command = choice["command"].as_str().unwrap();
        let words = command.strip_prefix("mlx-quant ").unwrap().split_whitespace();
        let mut dry = mlx_quant();
        let plan = document(dry.args(words).arg("--dry-run").current_dir(directory.path()));
        // Dynamic spends up to its budget once it has measured.
        if choice["target_bpw"].is_null() {
            assert_eq!(plan["bits_per_weight"], choice["forecast"]["bits_per_weight"], "{command}");
        }
        run += 1;
    }
    assert_eq!(run, 12);
    let shown = recommend(&[]).assert().success();
    let shown = String::from_utf8(shown.get_output().stdout.clone()).unwrap().replace(" \\\n    ", " ");
    let every = document(&mut recommend(&[]));
    for choice in every["methods"].as_array().unwrap() {
        assert!(
            shown.contains(choice["command"].as_str().unwrap()),
            "{}
{shown}",
            choice["command"]
        );
    }
}

/// Types without a decoder convert, and that is said.
#[test]
fn what_only_converts_is_still_planned() {
    let directory = tempfile::tempdir().unwrap();
    let model = dense(directory.path(), "model");
    let path = model.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"llama\"", "\"unheard_of\"");
    std::fs::write(&path, text).unwrap();
    let made = document(recommend(&[]).arg("--model").arg(&model));
    assert_eq!(made["recommended"], "basic");
    assert!(method(&made, "gptq")["obstacle"].as_str().unwrap().contains("no decoder description"));
    // What is in the way of eight methods is said once.
    let shown = recommend(&[]).arg("--model").arg(&model).assert().success();
    let shown = String::from_utf8(shown.get_output().stdout.clone()).unwrap();
    assert_eq!(shown.matches("no decoder description").count(), 1, "{shown}");
    let named = "awq, dynamic, gptq, dwq, dynamic+awq+gptq, gptq+learn, dynamic+awq+gptq+dwq, dynamic+awq+gptq+learn+dwq: model type";
    assert!(shown.split_whitespace().collect::<Vec<_>>().join(" ").contains(named), "{shown}");
}

/// Measured once, then kept.
#[test]
fn the_machine_is_remembered() {
    let cache = tempfile::tempdir().unwrap();
    let rate = |more: &[&str]| {
        let mut run = recommend(more);
        document(run.args(["--threads", "1"]).env("XDG_CACHE_HOME", cache.path()))["machine"].clone()
    };
    let first = rate(&[]);
    assert!(first["products"].as_f64().unwrap() > 1e8 && first["threads"] == 1);
    assert_eq!(rate(&[]), first);
    assert!(cache.path().join("mlx-quant/machine-1.json").is_file());
    assert_ne!(rate(&["--measure"]), first);
}

/// Exit code 2 and a hint.
#[test]
fn refuses_what_it_cannot_read() {
    let directory = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(directory.path().join("config.json"), text).unwrap();
    let refused = |text: &str| {
        recommend(&[]).arg("--model").arg(directory.path()).assert().code(2).stderr(contains(text));
    };
    write(r#"{"model_type": "new_one", "num_hidden_layers": 2}"#);
    refused("new_one");
    // Numbers that lie are refused, and cost nothing.
    let lie = |key: &str, value: &str| {
        let text = std::fs::read_to_string(config("Qwen3-30B-A3B").join("config.json")).unwrap();
        let line = text.lines().find(|line| line.contains(&format!("\"{key}\""))).unwrap().to_owned();
        write(&text.replace(&line, &format!("  \"{key}\": {value},")));
    };
    for (key, value) in [
        ("num_hidden_layers", "1000000000"),
        ("num_experts", "100000"),
        ("hidden_size", "100000000"),
        ("moe_intermediate_size", "1000000000"),
    ] {
        lie(key, value);
        refused("more than any model has");
    }
    write(r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}"#);
    refused("num_attention_heads");
    write(
        r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 100}"#,
    );
    refused("intermediate_size");
    write("{");
    refused("config.json");
    for (arguments, text) in [
        (["--memory", "lots"], "--memory: \"lots\" is no size"),
        (["--time", "soon"], "--time: \"soon\" is no time"),
        (["--size", "big"], "--size: \"big\" is no size"),
        (["--bits", "7"], "7 bits"),
        (["--target-bpw", "NaN"], "--target-bpw"),
        (["--target-bpw", "0"], "--target-bpw"),
        (["--n-samples", "1000000000"], "--n-samples"),
        (["--iters", "99999999999999999"], "--iters"),
    ] {
        recommend(&arguments).assert().code(2).stderr(contains(text));
    }
}

#[test]
fn packages_find_what_they_install() {
    let directory = tempfile::tempdir().unwrap();
    for (shell, part) in
        [("bash", "complete -F"), ("zsh", "#compdef mlx-quant"), ("fish", "complete -c mlx-quant")]
    {
        mlx_quant()
            .args(["completions", shell])
            .assert()
            .success()
            .stdout(contains(part).and(contains("dynamic-quant")));
    }
    mlx_quant().arg("man").arg(directory.path()).assert().success();
    let page = std::fs::read_to_string(directory.path().join("mlx-quant-compare.1")).unwrap();
    assert!(page.contains("share\\-statistics") && page.contains("Examples:"));
    assert!(directory.path().join("mlx-quant.1").exists());
    mlx_quant().arg("--version").assert().success().stdout(
        contains(if cfg!(feature = "hub") { "features: demo, hub, parquet" } else { "features: demo" })
            .and(contains("kernels:")),
    );
    mlx_quant()
        .arg("-V")
        .assert()
        .success()
        .stdout(predicate::str::diff(format!("mlx-quant {}\n", env!("CARGO_PKG_VERSION"))));
}
