//! Every target on stable Rust: its regressions, its seeds, then seeds with changes until time is up.
//!
//! Each target runs in a process of its own, which writes down what it tries before it tries it. So a panic, an overflow
//! of the stack, an allocation beyond [`MEMORY`] and an endless loop all leave the input behind, in `fuzz/artifacts`. What coverage would
//! find, these tests do not: cargo-fuzz does (fuzz/README.md). They hold the bodies and what was found before.
//!
//! `MLX_QUANT_FUZZ_SECONDS`: how long each target goes on (1). `MLX_QUANT_FUZZ_SEED`: of the changes (1). `MLX_QUANT_FUZZ_INPUT`: a file that
//! is tried instead.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]
#![allow(clippy::print_stdout, reason = "what a run did is to be seen")]

mod inputs;
mod mutate;
mod watch;

use std::path::Path;
use std::time::Duration;

use mlx_quant_fuzz_bodies::{TARGETS, target};

use self::inputs::{dictionary, fuzz, inputs};
use self::watch::{Limits, Outcome, watch};

/// Memory of a target's process, bytes; beside it two stacks of chat templates.
const MEMORY: u64 = 1 << 30;

/// Longest that one input may take, as libfuzzer is told too.
const SLOWEST: Duration = Duration::from_secs(25);

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn run(name: &str) {
    let limits = Limits {
        time: Duration::from_secs(number("MLX_QUANT_FUZZ_SECONDS", 1)),
        slowest: SLOWEST,
        memory: MEMORY,
    };
    let seed = number("MLX_QUANT_FUZZ_SEED", 1);
    let (known, seeds) = match std::env::var_os("MLX_QUANT_FUZZ_INPUT") {
        // Cargo runs tests in the directory of their package, people name files in the repository's.
        Some(file) => (vec![std::fs::read(fuzz().join("..").join(file)).unwrap()], Vec::new()),
        None => (inputs(&fuzz().join("regressions").join(name)), inputs(&fuzz().join("seeds").join(name))),
    };
    let changed = mutate::Mutator::new(seed, seeds, dictionary(name));
    let artifacts = fuzz().join("artifacts").join(name);
    match watch(name, target(name).unwrap().body, limits, known, changed, &artifacts) {
        Outcome::Passed { executions, seconds } => {
            println!("fuzz {name}: seed {seed}, {seconds:.1} s, {executions} executions, no finding");
        }
        Outcome::Found { input, reason, output } => {
            let bytes = std::fs::read(&input).unwrap();
            let (begin, input) = (bytes[..bytes.len().min(2000)].escape_ascii(), input.display());
            panic!(
                "fuzz {name}: seed {seed}: {reason}\n{output}\nthe input is {input}, {} bytes: {begin}\ntry it again: MLX_QUANT_FUZZ_INPUT={input} cargo test -p mlx-quant-fuzz-bodies --test stable {name}",
                bytes.len()
            )
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        const RUN: &[&str] = &[$(stringify!($name)),*];
    };
}

targets! { header index config plan chat jsonl parquet csv recipe sensitivities statistics tokenizer }

#[test]
fn every_target_is_run_and_has_seeds() {
    let all: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(all, RUN);
    let manifest = std::fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in all {
        assert!(!inputs(&fuzz().join("seeds").join(name)).is_empty(), "{name} has no seeds");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml has no {name}");
        assert!(fuzz().join(format!("fuzz_targets/{name}.rs")).is_file(), "{name} has no fuzz target");
    }
    for kind in ["seeds", "regressions"] {
        for entry in std::fs::read_dir(fuzz().join(kind)).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(RUN.contains(&&*name.to_string_lossy()), "{kind} of {name:?}, which is no target");
        }
    }
}

/// Tries a body that breaks its promise on the seed `bad`; gives the reason.
fn planted(test: &str, body: fn(&[u8]), slowest: Duration) -> String {
    let artifacts = tempfile::tempdir().unwrap();
    let limits = Limits { time: Duration::from_secs(1), slowest, memory: MEMORY };
    let changed = mutate::Mutator::new(1, vec![b"good".to_vec(), b"bad".to_vec()], Vec::new());
    match watch(test, body, limits, Vec::new(), changed, artifacts.path()) {
        Outcome::Found { input, reason, .. } => {
            assert_eq!(std::fs::read(input).unwrap(), b"bad");
            reason
        }
        Outcome::Passed { executions, .. } => panic!("nothing was found in {executions} executions"),
    }
}

#[test]
fn a_panic_is_found() {
    let body = |bytes: &[u8]| assert_ne!(bytes, b"bad");
    assert!(planted("a_panic_is_found", body, SLOWEST).contains("signal"));
}

#[test]
fn a_panic_that_is_caught_is_none() {
    let body = |bytes: &[u8]| {
        let bad = bytes == b"bad";
        assert_eq!(std::panic::catch_unwind(|| assert!(!bad)).is_err(), bad);
    };
    let limits = Limits { time: Duration::from_millis(100), slowest: SLOWEST, memory: MEMORY };
    let changed = mutate::Mutator::new(1, vec![b"bad".to_vec()], Vec::new());
    let outcome =
        watch("a_panic_that_is_caught_is_none", body, limits, Vec::new(), changed, Path::new("none"));
    assert!(matches!(outcome, Outcome::Passed { executions: 2.., .. }), "{outcome:?}");
}

#[test]
fn a_stack_overflow_is_found() {
    fn deep(depth: u64) -> u64 {
        if std::hint::black_box(depth) == u64::MAX { 0 } else { deep(depth + 1) + depth }
    }
    let body = |bytes: &[u8]| {
        if bytes == b"bad" {
            std::hint::black_box(deep(0));
        }
    };
    assert!(planted("a_stack_overflow_is_found", body, SLOWEST).contains("signal"));
}

#[test]
fn an_endless_loop_is_found() {
    let body = |bytes: &[u8]| {
        if bytes == b"bad" {
            std::thread::sleep(Duration::MAX);
        }
    };
    assert!(planted("an_endless_loop_is_found", body, Duration::from_secs(1)).contains("1 seconds"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_huge_allocation_is_found() {
    let body = |bytes: &[u8]| {
        if bytes == b"bad" {
            std::hint::black_box(vec![0u8; 3 << 30]);
        }
    };
    assert!(planted("a_huge_allocation_is_found", body, SLOWEST).contains("signal"));
}

#[test]
fn changes_are_the_same_for_a_seed_and_of_every_kind() {
    let of = |seed| {
        let seeds = vec![br#"{"a": 12, "b": [3]}"#.to_vec(), b"other words".to_vec()];
        let mut mutator = mutate::Mutator::new(seed, seeds, vec![b"dictionary".to_vec()]);
        (0..2000).map(|_| mutator.change()).collect::<Vec<_>>()
    };
    let made = of(7);
    assert_eq!(made, of(7));
    assert_ne!(made, of(8));
    let has = |text: &str| made.iter().any(|input| input.windows(text.len()).any(|at| at == text.as_bytes()));
    assert!(has("dictionary"), "words of the dictionary");
    assert!(has("18446744073709551615"), "numbers at the edge");
    assert!(made.iter().any(|input| input.starts_with(br#"{"a""#) && input.ends_with(b"words")), "two seeds");
    let different: std::collections::BTreeSet<_> = made.iter().collect();
    assert!(different.len() > 1800, "{} different inputs", different.len());
}

#[test]
fn dictionaries_are_read_as_libfuzzer_reads_them() {
    assert_eq!(inputs::words("# no\n\"a\\x00\\\"b\"\nname=\"{%\"\n"), [b"a\0\"b".to_vec(), b"{%".to_vec()]);
    assert!(!dictionary("chat").is_empty() && dictionary("no target").is_empty());
    assert!(Path::new(&fuzz().join("dictionaries/chat.dict")).is_file());
}
