//! `mlx-quant compare` as people run it.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

use crate::common::{cache, document, mlx_quant, two_blocks, weights};

const SMALL: [&str; 8] = ["--n-samples", "5", "--sequence-length", "96", "--windows", "3", "--iters", "3"];

/// On a model of two blocks beside the output, which is made if it is not there.
fn small(methods: &str, output: &Path) -> Command {
    let model = output.with_file_name("two-blocks");
    if !model.exists() {
        two_blocks(output.parent().unwrap(), "two-blocks");
    }
    let mut run = comparison(methods, output);
    run.arg("--model").arg(model);
    run
}

fn comparison(methods: &str, output: &Path) -> Command {
    let mut run = mlx_quant();
    run.args(["compare", "--methods", methods]).args(SMALL).arg("--output").arg(output);
    run
}

/// Everything but what depends on the hour.
/// Takes out what differs from run to run, however deep it lies.
fn strip(value: &mut Value, names: &[&str]) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !names.contains(&name.as_str()));
            fields.values_mut().for_each(|field| strip(field, names));
        }
        Value::Array(all) => all.iter_mut().for_each(|one| strip(one, names)),
        _ => {}
    }
}

fn timeless(document: &Value) -> String {
    let mut document = document.clone();
    document["seconds"] = Value::Null;
    document["rankings"]["speed"] = Value::Null;
    let verdicts = document["rankings"]["verdicts"].as_array_mut().unwrap();
    for verdict in verdicts {
        strip(verdict, &["seconds", "faster"]);
    }
    for entry in document["entries"].as_array_mut().unwrap() {
        entry["seconds"] = Value::Null;
        entry["peak_memory"] = Value::Null;
        entry["resumed"] = Value::Null;
        entry["evaluation"]["seconds"] = Value::Null;
        entry["evaluation"]["reference_cached"] = Value::Null;
        entry["distilled"]["resumed_steps"] = Value::Null;
    }
    document.to_string()
}

#[test]
fn ranks_methods_and_its_commands_make_the_same_models() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let model = two_blocks(directory.path(), "model");
    let mut run = comparison("basic,gptq,dynamic,dwq", &output);
    let made = document(run.args(["--keep", "all", "--bits", "3"]).arg("--model").arg(&model));
    let entries = made["entries"].as_array().unwrap();
    let sizes: Vec<f64> = entries.iter().map(|entry| entry["bits_per_weight"].as_f64().unwrap()).collect();
    // All have the same bits per weight.
    assert!(sizes.iter().all(|size| (size - sizes[0]).abs() < 0.01), "{sizes:?}");
    let kl = |entry: &Value| entry["evaluation"]["kl_mean"].as_f64().unwrap();
    let quality: Vec<f64> = made["rankings"]["quality"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ranked| kl(&entries[usize::try_from(ranked["entry"].as_u64().unwrap()).unwrap()]))
        .collect();
    assert!(quality.is_sorted(), "{quality:?}");
    assert_eq!(made["rankings"]["quality"][3]["entry"], 0, "round to nearest is the worst");
    assert_eq!(made["rankings"]["speed"][0], 0, "and the fastest");
    assert!(made["rankings"]["guide"].as_str().unwrap().contains("At 3 bits"));

    // The page names commands; each makes what the comparison made.
    let page = std::fs::read_to_string(output.join("report.html")).unwrap();
    for (name, place) in [
        ("convert -q", "rtn-3bit"),
        ("gptq", "gptq-3bit"),
        ("dynamic-quant", "dynamic-3bit"),
        ("dwq", "dwq-3bit"),
    ] {
        let start =
            page.find(&format!("<pre>mlx-quant {name} ")).unwrap_or_else(|| panic!("{name} is not shown"))
                + 5;
        let line = &page[start..start + page[start..].find("</pre>").unwrap()];
        // Slashes are escaped.
        let line = line.replace("&#x2f;", "/");
        let again = directory.path().join(format!("again-{place}"));
        let mut run = mlx_quant();
        run.args(line.split_whitespace().skip(1))
            .arg("--quiet")
            .arg("--mlx-path")
            .arg(&again)
            .assert()
            .success();
        assert!(weights(&again) == weights(&output.join("models").join(place)), "{line}");
    }
    assert!(page.contains("prefers-color-scheme") && page.matches("<svg").count() >= 3);
    assert_eq!(page.matches("<svg").count(), page.matches("viewBox=").count(), "plots scale");
    for part in ["http://", "https://", "<script", "src="] {
        let own = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!own.contains(part), "{part}");
    }
    let markdown = std::fs::read_to_string(output.join("report.md")).unwrap();
    assert!(markdown.contains("| basic |") && markdown.contains("Calibration: 5 windows of 96 tokens"));
    assert!(std::fs::read_to_string(output.join("report.svg")).unwrap().starts_with("<svg"));
}

#[test]
fn killed_it_goes_on_with_the_method_it_was_in() {
    let directory = tempfile::tempdir().unwrap();
    let whole = document(&mut comparison("basic,awq,gptq,dwq", &directory.path().join("whole")));
    for (name, at) in [("early", "awq-4bit"), ("late", "dwq-4bit")] {
        let output = directory.path().join(name);
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("mlx-quant"));
        child
            .args(["compare", "--quiet", "--methods", "basic,awq,gptq,dwq"])
            .args(SMALL)
            .arg("--output")
            .arg(&output);
        let mut child = child.env("XDG_CACHE_HOME", cache()).spawn().unwrap();
        let partial = output.join("models").join(format!(".{at}.partial"));
        let start = Instant::now();
        let under_way = || (2..8).any(|block| partial.join(format!(".state-{block}-0.safetensors")).exists());
        while !under_way() {
            assert!(start.elapsed() < Duration::from_secs(120), "{at} was never reached");
            assert!(child.try_wait().unwrap().is_none(), "it was done before {at}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let first = std::fs::metadata(output.join("work/rtn-4bit.json")).unwrap().modified().unwrap();
        let made = document(&mut comparison("basic,awq,gptq,dwq", &output));
        assert_eq!(timeless(&made).replace(name, "whole"), timeless(&whole), "{name}");
        let again = std::fs::metadata(output.join("work/rtn-4bit.json")).unwrap().modified().unwrap();
        assert_eq!(first, again, "a finished method was made again");
        let resumed: Vec<bool> = made["entries"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["resumed"].as_bool().unwrap())
            .collect();
        let expected = ["rtn", "awq", "gptq", "dwq"].map(|recipe| format!("{recipe}-4bit") == at);
        assert_eq!(resumed, expected, "{name}");
    }
}

#[test]
fn more_methods_join_and_the_best_stays() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    comparison("basic", &output).arg("--quiet").assert().success();
    assert!(output.join("models/rtn-4bit").exists());
    let made = document(&mut comparison("basic,gptq,dwq", &output));
    assert_eq!(made["entries"].as_array().unwrap().len(), 3);
    assert!(output.join("models/dwq-4bit").exists() && !output.join("models/rtn-4bit").exists());
    // What it was made from is remembered.
    comparison("basic", &output)
        .args(["--seed", "7"])
        .assert()
        .code(2)
        .stderr(contains("other settings").and(contains("hint:")));
    // And nothing of the shared work is left lying about.
    let left: Vec<_> =
        std::fs::read_dir(output.join("work")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_str().unwrap().ends_with(".json")), "{left:?}");
}

/// Nobody waits for the last method to see the first.
#[test]
fn each_method_has_its_row_as_soon_as_it_is_measured() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let said = || {
        let made = small("basic,gptq", &output).assert().success();
        let (stdout, stderr) = (made.get_output().stdout.clone(), made.get_output().stderr.clone());
        (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    };
    let (table, rows) = said();
    let places = ["[1/2] basic", "      KL ", "[2/2] gptq", "      KL ", "kept "];
    let mut rest = rows.as_str();
    for text in places {
        let at = rest.find(text).unwrap_or_else(|| panic!("{text:?} does not follow: {rows}"));
        rest = &rest[at + text.len()..];
    }
    let figures: Vec<&str> = rows.lines().filter_map(|line| line.strip_prefix("      KL ")).collect();
    for (row, name) in figures.iter().zip(["basic", "gptq"]) {
        let kl = row.split(',').next().unwrap();
        let line = table.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        assert!(line.contains(kl) && row.contains("bits per weight"), "{row} and {line}");
    }
    assert!(!rows.contains("by an earlier run") && figures.len() == 2);
    let (again, rows) = said();
    assert!(again == table && rows.matches("(by an earlier run)").count() == 2, "{rows}");
    small("basic,gptq", &output).arg("--quiet").assert().success().stderr("");
}

#[test]
fn models_that_were_to_stay_stay() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    small("basic,search", &output).args(["--quiet", "--keep", "all"]).assert().success();
    small("basic,search", &output).args(["--quiet", "--keep", "none"]).assert().success();
    assert!(output.join("models/rtn-4bit").exists() && output.join("models/search-4bit").exists());
    // What was not kept is missed aloud.
    let other = directory.path().join("other");
    small("basic", &other).args(["--quiet", "--keep", "none"]).assert().success();
    small("basic", &other).args(["--keep", "all"]).assert().success().stderr(contains("did not keep it"));
}

#[test]
fn one_set_of_hessians_serves_all() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let made = document(small("gptq,awq", &output).arg("--share-statistics"));
    let kl = |index: usize| made["entries"][index]["evaluation"]["kl_mean"].as_f64().unwrap();
    assert!(kl(0) > 0.0 && kl(0) < kl(1) && kl(1) < 0.2, "{} {}", kl(0), kl(1));
    let other = document(&mut small("gptq", &directory.path().join("other")));
    assert_ne!(made["entries"][0]["evaluation"]["kl_mean"], other["entries"][0]["evaluation"]["kl_mean"]);
}

#[test]
fn a_plan_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    small("basic,gptq,dynamic+awq+gptq+dwq", &output)
        .arg("--dry-run")
        .assert()
        .success()
        .stdout(contains("peak memory").and(contains("dynamic+awq+gptq+dwq")));
    assert!(!output.exists());
}

/// Exit code 2, a hint, and nothing written.
#[test]
fn refuses_what_it_cannot_do() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let cases: &[(&[&str], &str)] = &[
        (&["--methods", "basic,magic"], "no method"),
        (&["--methods", "gptq,gptq"], "twice"),
        (&["--methods", "basic,rtn"], "twice"),
        (&["--methods", ""], "no method"),
        (&["--methods", "gptq+awq"], "cannot follow"),
        (&["--bits", "7"], "7 bits"),
        (&["--bits", "4,4"], "twice"),
        (&["--group-size", "48"], "group size 48"),
        (&["--eval-data", "/nonexistent"], "/nonexistent"),
        (&["--data", "/nonexistent"], "/nonexistent"),
        (&["--model", "/nonexistent"], "/nonexistent"),
        (&["--sequence-length", "1"], "sequence"),
    ];
    for (arguments, text) in cases {
        let mut run = mlx_quant();
        run.arg("compare")
            .args(*arguments)
            .arg("--output")
            .arg(&output)
            .assert()
            .code(2)
            .stderr(contains(*text));
        assert!(!output.exists(), "{arguments:?}");
    }
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("letter.txt"), "dear").unwrap();
    comparison("basic", &output).assert().code(2).stderr(contains("something else").and(contains("hint:")));
}

#[test]
fn another_comparison_begins_anew_where_it_is_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    small("basic,search", &output).args(["--keep", "all"]).assert().success();
    let other = |flags: &[&str], output: &Path| {
        let mut run = small("search", output);
        run.args(["--seed", "77"]).args(flags).assert()
    };
    let kept = || output.join("models/rtn-4bit/config.json").exists();
    other(&[], &output).code(2).stderr(contains("with other settings (--restart"));
    assert!(kept());
    other(&["--restart"], &output).success();
    assert!(!kept() && !output.join("work/rtn-4bit.json").exists());
    assert!(output.join("models/search-4bit/config.json").exists());
    // What is no comparison is nobody's to remove.
    let mine = directory.path().join("mine");
    std::fs::create_dir_all(mine.join("work")).unwrap();
    std::fs::write(mine.join("work/notes"), "mine").unwrap();
    other(&["--restart"], &mine).code(2);
    assert!(mine.join("work/notes").exists());
}
