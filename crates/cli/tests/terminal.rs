//! What people see: one bar for the whole job on a terminal, lines in a file, three lines at the end; quiet where nobody
//! looks, no colours where they are not wanted.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use predicates::prelude::*;
use predicates::str::contains;

use crate::common::mlx_quant;

const SMALL: [&str; 6] = ["--n-samples", "4", "--sequence-length", "64", "--eval-windows", "1"];

/// Neither escapes nor carriage returns.
fn plain(bytes: &[u8]) -> String {
    assert!(
        bytes.iter().all(|byte| *byte == b'\n' || *byte >= b' '),
        "control characters in {:?}",
        String::from_utf8_lossy(bytes)
    );
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_file_gets_no_control_characters() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["gptq", "--mlx-path"]).arg(directory.path().join("out")).args(SMALL);
    let made = run.assert().success();
    let text = plain(&made.get_output().stderr);
    let lines: Vec<&str> = text.lines().collect();
    let begin = [
        "model    the built-in demo model",
        "gptq keeps embeddings and head at 6 bits",
        "2 steps: gptq, evaluation; about ",
        "quality  KL ",
        "output   ",
        "run it   mlx_lm.generate --model ",
    ];
    assert_eq!(lines.len(), begin.len(), "what will be done and what was made, and nothing between: {text}");
    assert!(lines.iter().zip(begin).all(|(line, begin)| line.starts_with(begin)), "{text}");
    assert!(plain(&made.get_output().stdout).is_empty());
    // Not even where colours are asked for by force elsewhere.
    let mut refused = mlx_quant();
    let refused = refused.args(["eval", "--model", "/nonexistent"]).env("NO_COLOR", "1").assert().code(2);
    let text = plain(&refused.get_output().stderr);
    assert!(text.starts_with("model    /nonexistent\nerror: ") && text.contains("\nhint: "), "{text}");
}

/// A command on a terminal of so many columns: what it wrote, escapes and all.
#[cfg(target_os = "linux")]
fn on_terminal(line: &str, directory: &std::path::Path, columns: u16) -> String {
    use std::os::fd::{FromRawFd as _, OwnedFd};
    use std::process::Stdio;
    let size = libc::winsize { ws_row: 30, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut ours, mut theirs) = (0, 0);
    // SAFETY: the pointers are to live values or null, as openpty(3) takes them.
    let made = unsafe {
        libc::openpty(&raw mut ours, &raw mut theirs, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    assert_eq!(made, 0);
    // SAFETY: openpty has just opened both, and nobody else has them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    let given = mlx_quant();
    let mut command = std::process::Command::new(given.get_program());
    command.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("TERM", "xterm-256color").current_dir(directory).args(line.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(theirs));
    let mut child = command.spawn().unwrap();
    // Its copy of the other end.
    drop(command);
    let (mut terminal, mut text) = (std::fs::File::from(ours), Vec::new());
    // Linux ends it with an error once nobody writes any more.
    let _ = std::io::Read::read_to_end(&mut terminal, &mut text);
    assert!(child.wait().unwrap().success(), "{line}: {}", String::from_utf8_lossy(&text));
    String::from_utf8_lossy(&text).into_owned()
}

/// What was drawn or printed, piece by piece, without escapes.
#[cfg(target_os = "linux")]
fn pieces(text: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\u{1b}') {
        plain.push_str(&rest[..at]);
        // An escape moves somewhere else.
        plain.push('\n');
        let end = rest[at..].find(|c: char| c.is_ascii_alphabetic()).map_or(rest.len(), |end| at + end + 1);
        rest = &rest[end..];
    }
    plain.push_str(rest);
    let pieces = plain.split(['\n', '\r']).map(|piece| piece.trim_end().to_owned());
    pieces.filter(|piece| !piece.is_empty()).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn no_line_ends_a_bar_that_is_still_needed() {
    let directory = tempfile::tempdir().unwrap();
    // Enough to measure that its step is seen.
    let small = SMALL.join(" ").replace("--eval-windows 1", "--eval-windows 12");
    let text = on_terminal(&format!("dynamic-quant {small}"), directory.path(), 140);
    let all = pieces(&text);
    assert!(!all.iter().any(|piece| piece.contains("/10000")), "a bar without its words: {all:#?}");
    let line = all.iter().position(|piece| piece.starts_with("dynamic: ")).unwrap();
    let drawn = |from: usize, words: &str| {
        all[from..].iter().any(|piece| piece.starts_with('[') && piece.contains(words))
    };
    assert!(drawn(0, "] step 1 of 3, dynamic: sensitivities, "), "{all:#?}");
    assert!(drawn(line, "] step 2 of 3, refine, block "), "no bar after the line: {all:#?}");
    assert!(drawn(line, "] step 3 of 3, evaluation: "), "{all:#?}");
    // What is seen first of a job is what it is expected to take.
    let first = all.iter().find(|piece| piece.starts_with('[')).unwrap();
    assert!(first.contains(" left of "), "{first}");
    assert!(!all.iter().any(|piece| piece.contains(" 0 s left")), "{all:#?}");
    // The bar is gone at the end.
    assert!(all.last().unwrap().starts_with("run it "), "{all:#?}");
}

#[test]
#[cfg(target_os = "linux")]
fn words_fit_the_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let line = |name: &str| format!("gptq --mlx-path {name} {}", SMALL.join(" "));
    for columns in [40, 80] {
        let all = pieces(&on_terminal(&line(&columns.to_string()), directory.path(), columns));
        let bars: Vec<&String> =
            all.iter().filter(|piece| piece.contains("step ") && piece.contains(" of 2, ")).collect();
        assert!(!bars.is_empty(), "{all:#?}");
        let long = bars.iter().find(|bar| bar.chars().count() > usize::from(columns));
        assert_eq!(long, None, "{columns} columns");
        assert_eq!(bars.iter().any(|bar| bar.starts_with('[')), columns == 80, "{bars:#?}");
        assert!(!bars.iter().any(|bar| bar.ends_with(',')), "whole fields: {bars:#?}");
    }
}

#[test]
fn a_file_gets_a_line_for_each_block_at_most() {
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, seconds: &str, flags: &[&str]| {
        let mut run = mlx_quant();
        run.args(["gptq", "--mlx-path"]).arg(directory.path().join(name)).args(SMALL).args(flags);
        run.env("MLX_QUANT_PROGRESS_SECONDS", seconds);
        plain(&run.assert().success().get_output().stderr)
    };
    let text = run("each", "0", &[]);
    let blocks: Vec<&str> = text.lines().filter(|line| line.starts_with("step 1 of 2, gptq, ")).collect();
    assert_eq!(blocks.len(), 9, "eight blocks and the head: {text}");
    assert!(
        blocks[2].starts_with("step 1 of 2, gptq, block 4 of 8, ") && blocks[2].contains(" left of "),
        "{text}"
    );
    assert!(cfg!(not(target_os = "linux")) || blocks.iter().all(|line| line.contains("B (peak ")), "{text}");
    assert!(text.lines().any(|line| line.starts_with("step 2 of 2, evaluation: model, ")), "{text}");
    // None in a run that is shorter than a minute, and none where nobody wants any.
    assert!(!run("minutes", "60", &[]).contains("step 1 of 2"));
    assert_eq!(run("quiet", "0", &["--quiet"]), "");
}

#[test]
fn a_run_that_goes_on_says_where() {
    let directory = tempfile::tempdir().unwrap();
    let given = mlx_quant();
    let mut command = std::process::Command::new(given.get_program());
    command.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.args(["gptq", "--quiet", "--mlx-path", "out"]).args(SMALL).current_dir(directory.path());
    let mut child = command.spawn().unwrap();
    let third = directory.path().join(".out.partial/.state-3-0.safetensors");
    while !third.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its third block");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let mut again = mlx_quant();
    again.args(["gptq", "--mlx-path", "out"]).args(SMALL).current_dir(directory.path());
    let text = plain(&again.assert().success().get_output().stderr);
    let line = text.lines().find(|line| line.contains("goes on")).unwrap_or_else(|| panic!("{text}"));
    let block = line.strip_prefix("gptq: goes on at block ").and_then(|rest| rest.strip_suffix(" of 8"));
    let block: usize = block.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
    assert!((3..=8).contains(&block), "{line}");
}

#[test]
fn every_success_says_how_good_where_and_how_to_run_it() {
    let directory = tempfile::tempdir().unwrap();
    let said = |line: &str| {
        let mut run = mlx_quant();
        run.args(line.split_whitespace()).current_dir(directory.path());
        let text = plain(&run.assert().success().get_output().stderr);
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        assert!(lines.len() >= 3, "{text}");
        lines[lines.len() - 3..].to_vec()
    };
    let small = SMALL.join(" ");
    let dwq = "--iters 1 --batch-size 1 --valid-samples 1";
    for (name, line) in [
        ("convert", "convert -q".to_owned()),
        ("awq", format!("awq {small}")),
        ("unmeasured", "gptq --n-samples 4 --sequence-length 64 --eval-windows 0".to_owned()),
        ("dwq", format!("dwq {dwq} {small}")),
        ("distilled", format!("dwq --quantized-model convert {dwq} {small}")),
        ("search", "quantize --recipe search".to_owned()),
    ] {
        let lines = said(&format!("{line} --mlx-path {name}"));
        let measured = line.contains("--eval-windows 1") && !line.contains("--quantized-model");
        let eval = format!("quality  not measured; `mlx-quant eval --model ./{name}` measures it");
        assert!(
            if measured { lines[0].starts_with("quality  KL ") } else { lines[0] == eval }
                || name == "distilled",
            "{lines:?}"
        );
        assert!(lines[1].starts_with(&format!("output   ./{name}: ")), "{lines:?}");
        assert_eq!(lines[2], format!("run it   mlx_lm.generate --model ./{name} --prompt \"Hello\""));
    }
    let compare = "compare --methods basic,search --windows 1 --n-samples 4 --sequence-length 64 --iters 1";
    let lines = said(&format!("{compare} --output a"));
    assert!(
        lines[0].starts_with("quality  KL ") && lines[1].starts_with("output   ./a/models/"),
        "{lines:?}"
    );
    assert!(said(&format!("{compare} --output b --keep none"))[2].starts_with("output   none was kept"));
}

#[test]
fn colours_are_asked_for() {
    let run = |variables: &[(&str, &str)]| {
        let mut run = mlx_quant();
        run.args(["eval", "--model", "/nonexistent"]).envs(variables.iter().copied());
        String::from_utf8(run.assert().code(2).get_output().stderr.clone()).unwrap()
    };
    assert!(run(&[("CLICOLOR_FORCE", "1")]).contains("\u{1b}["));
    assert!(!run(&[("NO_COLOR", "1")]).contains('\u{1b}'));
    assert!(!run(&[]).contains('\u{1b}'), "stderr is no terminal");
}

#[test]
fn verbose_says_what_each_block_gained() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["gptq", "--verbose", "--mlx-path"]).arg(directory.path().join("out")).args(SMALL);
    let made = run.assert().success();
    let text = plain(&made.get_output().stderr);
    let ratios: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_suffix(" of round-to-nearest's")?.rsplit_once(", ")?.1.parse().ok())
        .collect();
    assert_eq!(ratios.len(), 8, "{text}");
    assert!(ratios.iter().all(|ratio| *ratio > 0.0 && *ratio < 1.0), "{ratios:?}");
    assert!(text.contains("model.layers.7: output error"));
    // The same bytes as without anybody looking.
    let mut quiet = mlx_quant();
    quiet
        .args(["gptq", "--quiet", "--mlx-path"])
        .arg(directory.path().join("quiet"))
        .args(SMALL)
        .assert()
        .success();
    let weights = |name: &str| std::fs::read(directory.path().join(name).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("quiet"));
}

/// The processor itself leaves nothing.
#[test]
fn verbose_says_what_a_card_leaves_to_the_processor() {
    let directory = tempfile::tempdir().unwrap();
    let said = |name: &str, device: &str| {
        let mut run = mlx_quant();
        run.args(["convert", "-q", "--verbose", "--device", device, "--mlx-path"]);
        let made = run.arg(directory.path().join(name)).output().unwrap();
        // Without an adapter, or without the feature, a card is refused.
        (made.status.code() != Some(2)).then(|| {
            assert!(made.status.success());
            let text = plain(&made.stderr);
            text.lines().filter(|line| line.starts_with("on the processor: ")).map(str::to_owned).collect()
        })
    };
    assert_eq!(said("cpu", "cpu"), Some(Vec::<String>::new()));
    let Some(said) = said("card", "gpu:0") else { return };
    assert_eq!(said, ["on the processor: what is rounded without text (reading and writing it take longer)"]);
}

#[test]
fn quiet_is_quiet_and_json_is_one_document() {
    let directory = tempfile::tempdir().unwrap();
    let mut run = mlx_quant();
    run.args(["convert", "-q", "--quiet", "--mlx-path"]).arg(directory.path().join("out"));
    run.assert().success().stdout("").stderr("");
    let mut json = mlx_quant();
    json.args(["inspect", "--json", "--quiet"]).arg(directory.path().join("out"));
    let made = json.assert().success().stderr("");
    serde_json::from_slice::<serde_json::Value>(&made.get_output().stdout).unwrap();
    mlx_quant()
        .args(["convert", "--quiet", "--verbose"])
        .assert()
        .code(2)
        .stderr(contains("cannot be used with"));
    mlx_quant().assert().code(2).stderr(contains("Usage:").or(contains("Examples:")));
}
