//! What people type: models by position, flag, id and URL; names that are nearly right; amounts without a unit; outputs in new places.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use assert_cmd::Command;
use mlx_quant_hub_fixture::Kind;
use predicates::prelude::*;
use predicates::str::{contains, starts_with};

use crate::common::{hub, knows, mlx_quant, two_blocks};

/// The program in a directory, with words separated by blanks.
fn run(directory: &Path, line: &str) -> Command {
    let mut run = mlx_quant();
    run.current_dir(directory).args(line.split_whitespace());
    run
}

/// Refused before any work, with all of these words.
fn refused(directory: &Path, line: &str, words: &[&str]) {
    let made = run(directory, line).assert().code(2);
    let said = String::from_utf8_lossy(&made.get_output().stderr).into_owned();
    for word in words {
        assert!(said.contains(word), "{line}: no {word:?} in\n{said}");
    }
}

#[test]
fn amounts_have_units() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    for (line, words) in [
        ("recommend --memory 16", &["--memory: 16 has no unit", "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"][..]),
        ("recommend --time 60", &["--time: 60 has no unit", "s, min, h, d"]),
        ("recommend --size 4.2XB", &["--size: 4.2XB has the unit \"XB\"", "GB"]),
        ("dynamic-quant --target-size 4.2", &["--target-size: 4.2 has no unit", "GiB"]),
        ("dynamic-quant --target-size 4.2XB", &["--target-size: 4.2XB has the unit \"XB\"", "GiB"]),
        ("recommend --target-bpw 0", &["--target-bpw 0 is no number of bits", "such as 4.5"]),
    ] {
        refused(here, line, words);
    }
    run(here, "recommend --memory 16GB --time 60min --quiet").assert().success();
    assert_eq!(std::fs::read_dir(here).unwrap().count(), 0);
}

/// Every command that reads a model takes it by its place and by its flag.
#[test]
fn a_model_by_place_or_flag() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    two_blocks(here, "Qwen3-8B");
    let small = "--n-samples 2 --sequence-length 48 --dry-run";
    for line in [
        "convert -q --dry-run".to_owned(),
        "inspect".to_owned(),
        "recommend".to_owned(),
        "eval --windows 1 --sequence-length 48".to_owned(),
        format!("compare --methods basic {small}"),
        format!("awq {small}"),
        format!("gptq {small}"),
        format!("dynamic-quant {small}"),
        "dwq --iters 2 --batch-size 2 --valid-samples 1 --n-samples 4 --sequence-length 48 --dry-run"
            .to_owned(),
        format!("quantize --recipe awq+gptq {small}"),
    ] {
        let (command, rest) = line.split_once(' ').unwrap_or((&line, ""));
        for model in ["./Qwen3-8B", "-m ./Qwen3-8B"] {
            let made = run(here, &format!("{command} {model} {rest}")).assert().success();
            made.stderr(starts_with("model    ./Qwen3-8B\n"));
        }
        refused(
            here,
            &format!("{command} ./Qwen3-8B --model ./other {rest}"),
            &["./Qwen3-8B and --model ./other are two models"],
        );
        // Forgotten, and said at once; not where nothing is to be said.
        run(here, &line)
            .assert()
            .success()
            .stderr(starts_with("model    the built-in demo model (--model takes your own)\n"));
    }
    let twice = "inspect ./Qwen3-8B --hf-path ./Qwen3-8B";
    run(here, twice).assert().success().stderr(starts_with("model    ./Qwen3-8B\n"));
    for line in ["inspect --quiet", "convert -q --dry-run --quiet", "recommend --quiet"] {
        run(here, line).assert().success().stderr("");
    }
}

#[test]
fn near_names_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    two_blocks(here, "Qwen3-8B");
    std::fs::write(here.join("chats.jsonl"), "").unwrap();
    std::fs::write(here.join("recipe.toml"), "").unwrap();
    let id = "an id on the hub is ORG/NAME, as Qwen/Qwen3-8B";
    for (line, words) in [
        ("inspect gpt2", &["gpt2: there is no such directory", "give the path of a directory", id][..]),
        ("inspect Qwen3-8b", &["Qwen3-8b: there is no such directory", "did you mean Qwen3-8B?", id]),
        ("recommend ./Qwen38B", &["did you mean ./Qwen3-8B?"]),
        (
            "eval --reference ./Qwen3-8 -m ./Qwen3-8B",
            &["./Qwen3-8: there is no such", "did you mean ./Qwen3-8B?"],
        ),
        ("dwq --quantized-model ./Qwen-8B", &["./Qwen-8B: there is no such", "did you mean ./Qwen3-8B?"]),
        ("upload ./Qwen-8B --upload-repo a/b", &["did you mean ./Qwen3-8B?"]),
        (
            "gptq --data chats.jsnol",
            &["chats.jsnol: there is no such file or directory", "did you mean chats.jsonl?", "ORG/NAME"],
        ),
        ("compare --eval-data ./chat.jsonl", &["did you mean ./chats.jsonl?"]),
        ("convert -q --recipe-file recpie.toml", &["recpie.toml", "did you mean recipe.toml?"]),
        ("quantize --recipe awq+gtpq", &["there is no method \"gtpq\"", "did you mean gptq?"]),
        ("compare --methods basci", &["there is no method \"basci\"", "did you mean basic?"]),
        ("convrt", &["similar subcommand", "convert"]),
        ("recommend --model ./Qwen3-8B/config.jsn", &["did you mean ./Qwen3-8B/config.json?"]),
    ] {
        refused(here, line, words);
    }
    // Nothing is guessed where nothing is near.
    run(here, "inspect ./llama").assert().code(2).stderr(contains("did you mean").not());
    // What may be an id is asked of the hub first.
    refused(here, "gptq --data ./nothing/chats.jsonl", &["there is no such file or directory"]);
    run(here, "inspect ./Qwen3-8B/../Qwen3-8b").assert().code(2).stderr(contains("did you mean"));
}

/// An id that the hub does not have may have been meant for something here.
#[test]
fn ids_that_are_nowhere_may_be_here() {
    let directory = tempfile::tempdir().unwrap();
    let (here, hub) = (directory.path(), hub());
    std::fs::create_dir(here.join("models")).unwrap();
    two_blocks(&here.join("models"), "Qwen3-8B");
    let mut inspect = run(here, "inspect models/Qwen3-8b");
    let said = knows(&mut inspect, &hub, here).assert().code(2);
    said.stderr(
        contains("no repository models/Qwen3-8b")
            .and(contains("did you mean models/Qwen3-8B, which is here?")),
    );
}

#[test]
fn pages_of_the_hub_are_models() {
    let directory = tempfile::tempdir().unwrap();
    let (here, hub) = (directory.path(), hub());
    let model = two_blocks(here, "model");
    hub.add_directory(Kind::Model, "Qwen/Qwen3-8B", &model);
    let text = "A text that is long enough for a window or two of a small model. ".repeat(40);
    let rows =
        vec![("a/train.jsonl".to_owned(), format!("{}\n", serde_json::json!({"text": text})).into_bytes())];
    hub.add(Kind::Dataset, "allenai/c4", rows);
    let with_hub = |line: &str| {
        let mut run = run(here, line);
        knows(&mut run, &hub, here);
        run
    };
    for (page, word) in [
        ("https://huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B/", "Qwen/Qwen3-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "Qwen/Qwen3-8B@main"),
        ("https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json", "Qwen/Qwen3-8B@main"),
        ("hf.co/Qwen/Qwen3-8B?library=mlx", "Qwen/Qwen3-8B"),
        (&format!("{}/Qwen/Qwen3-8B/tree/main", hub.endpoint()), "Qwen/Qwen3-8B@main"),
    ] {
        with_hub(&format!("inspect {page}"))
            .assert()
            .success()
            .stderr(starts_with(format!("model    {word}\n")));
    }
    let page = "https://huggingface.co/datasets/allenai/c4/blob/main/a/train.jsonl";
    let line = format!("gptq ./model --data {page} --n-samples 2 --sequence-length 32 --dry-run");
    with_hub(&line).assert().success().stdout(contains("train.jsonl"));
    let recommended = with_hub("recommend https://hf.co/Qwen/Qwen3-8B/tree/main").assert().success();
    let output = contains("--mlx-path Qwen3-8B-basic-4bit");
    recommended.stdout(contains("--model Qwen/Qwen3-8B@main").and(output));
    for (page, word) in [
        ("https://huggingface.co/gpt2", "ORG/NAME"),
        ("https://huggingface.co/datasets/allenai/c4", "page of a dataset"),
        ("https://example.com/Qwen/Qwen3-8B", "example.com is not the hub"),
    ] {
        with_hub(&format!("inspect {page}")).assert().code(2).stderr(contains(word).and(contains("hint: ")));
    }
}

#[test]
fn directories_above_an_output_are_made() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let small = "--n-samples 2 --sequence-length 48 --eval-windows 0";
    run(here, "convert -q --mlx-path a/b/c").assert().success();
    run(here, &format!("gptq --mlx-path ./d/e {small}")).assert().success();
    assert!(here.join("a/b/c/config.json").is_file() && here.join("d/e/config.json").is_file());
    let left = || {
        let mut names: Vec<_> =
            std::fs::read_dir(here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for line in [
        "convert -q --dry-run --mlx-path x/y/z".to_owned(),
        format!("gptq --dry-run --mlx-path x/y/z {small}"),
    ] {
        run(here, &line).assert().success();
        assert_eq!(left(), ["a", "d"], "{line}");
    }
    for line in [
        "convert -q --model ./nothing --mlx-path x/y/z",
        "convert -q --q-group-size 128 --model ./a/b/c --mlx-path x/y/z",
        "gptq --model ./a/b/c --mlx-path x/y/z",
        "gptq --data ./nothing --mlx-path x/y/z",
        "convert -q --mlx-path a/b/c/config.json/x",
    ] {
        refused(here, line, &["hint: "]);
        assert_eq!(left(), ["a", "d"], "{line}");
    }
    assert!(here.join("a/b/c/config.json").is_file());
}

/// A problem is told once, however many errors pass it on.
#[test]
fn a_recipe_file_that_matches_nothing() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("r.toml"), "[[layer]]\npath = \"*.nope\"\nbits = 6\n").unwrap();
    let made = run(directory.path(), "convert -q --recipe-file r.toml").assert().code(2);
    let said = String::from_utf8_lossy(&made.get_output().stderr).into_owned();
    assert_eq!(said.matches("*.nope").count(), 1, "{said}");
    assert_eq!(said.matches("hint: ").count(), 1, "{said}");
}

#[test]
fn gptq_says_what_embeddings_cost() {
    let directory = tempfile::tempdir().unwrap();
    let small = "--n-samples 2 --sequence-length 48 --dry-run";
    let said =
        "gptq keeps embeddings and head at 6 bits: 4.906 bits per weight; with --fallback-bits 4 it is 4.506";
    run(directory.path(), &format!("gptq {small}")).assert().success().stderr(contains(said));
    for other in ["gptq --fallback-bits 4", "awq", "gptq --bits 6"] {
        let made = run(directory.path(), &format!("{other} {small}")).assert().success();
        made.stderr(contains("gptq keeps").not());
    }
    run(directory.path(), "gptq --help").assert().success().stdout(contains("4.5 bits per weight"));
}

/// Help of a command says nothing of another one.
#[test]
fn help_belongs_to_its_command() {
    let help = |command: &str| {
        let made = mlx_quant().args([command, "--help"]).assert().success();
        let text = String::from_utf8(made.get_output().stdout.clone()).unwrap();
        text.split("Examples:").next().unwrap().to_owned()
    };
    for command in ["convert", "awq", "gptq", "dynamic-quant"] {
        assert!(!help(command).contains("dwq"), "{command} speaks of dwq");
    }
    for command in
        ["awq", "gptq", "dynamic-quant", "dwq", "quantize", "eval", "compare", "recommend", "inspect"]
    {
        let text = help(command);
        assert!(
            !text.contains("convert always") && !text.contains("convert draws"),
            "{command} speaks of convert"
        );
        assert!(!text.contains("a window ") && !text.contains("Tokens a window"), "{command}: per window");
    }
}
