//! Properties that hold for every family of models, over every checkpoint of the zoo: the copied ones always, all
//! of them where the project's shared data is present. Each prints a table with one line per checkpoint
//! (`--nocapture`) and fails with all that went wrong, not with the first.
//!
//! What the logits are is `oracle.rs`'s subject, and what convert writes `zoo.rs`'s. `MLX_QUANT_SHARED` names the
//! shared directory where it does not lie beside the repository; then run with `--include-ignored`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod fuzz;
mod model;
mod names;
mod numbers;
mod sites;
mod types;
mod windows;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// What a property says of one checkpoint: a cell of its table, or what is wrong.
type Verdict = Result<String, String>;

/// Directories of models in `zoo`, sorted.
fn checkpoints(zoo: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path());
    let mut directories: Vec<PathBuf> = entries.filter(|path| path.join("config.json").is_file()).collect();
    directories.sort();
    assert!(!directories.is_empty(), "no checkpoints in {}", zoo.display());
    directories
}

/// Holds a property against every checkpoint; a panic is a failure like any other.
fn for_all(zoo: &Path, title: &str, property: impl Fn(&Path) -> Verdict) {
    println!("{:<20} {title}", "checkpoint");
    let directories = checkpoints(zoo);
    let mut failed = Vec::new();
    for directory in &directories {
        let name = directory.file_name().unwrap().to_string_lossy();
        let verdict = catch_unwind(AssertUnwindSafe(|| property(directory)));
        match verdict.unwrap_or_else(|_| Err("panicked, see above".to_owned())) {
            Ok(cell) => println!("{name:<20} {cell}"),
            Err(reason) => {
                println!("{name:<20} FAILED: {reason}");
                failed.push(format!("{name}: {reason}"));
            }
        }
    }
    println!("{} checkpoints, {} failed", directories.len(), failed.len());
    assert!(failed.is_empty(), "{title}:\n{}", failed.join("\n"));
}

/// A property as three tests: over the copied checkpoints, over those that are made of seeds, and over the whole zoo.
macro_rules! property {
    ($name:ident, $title:literal, $check:path) => {
        mod $name {
            #[test]
            fn of_the_copied_checkpoints() {
                crate::for_all(&crate::common::fixtures().join("zoo"), $title, $check);
            }

            #[test]
            fn of_the_seeded_checkpoints() {
                crate::for_all(crate::common::seeds::seeded().path(), $title, $check);
            }

            #[test]
            #[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
            fn of_every_zoo_checkpoint() {
                crate::for_all(&crate::common::shared().join("zoo"), $title, $check);
            }
        }
    };
}

property!(names_there_and_back, "HF -> MLX -> HF: bytes restored, tensors dropped", crate::names::round_trip);
property!(
    quantized_equals_decoded,
    "packed layers: logits equal those of -d",
    crate::numbers::quantized_equals_decoded
);
property!(
    batches_do_not_matter,
    "a batch of windows against each alone",
    crate::numbers::batches_do_not_matter
);
property!(threads_do_not_matter, "windows on 1, 2 and 5 threads", crate::numbers::threads_do_not_matter);
property!(
    streaming_equals_resident,
    "blocks read again against blocks kept",
    crate::numbers::streaming_equals_resident
);
property!(a_tap_sees_every_site, "sites seen, of them experts", crate::sites::a_tap_sees_every_site);
property!(windows_are_applied, "sliding layers", crate::windows::windows_are_applied);
property!(damaged_weights_are_found, "tensors removed, of them optional", crate::damage::weights);
property!(wrong_configs_are_found, "what a wrong size is answered with", crate::damage::config);
property!(no_config_panics, "configs tried: refused, failed, ran", crate::fuzz::no_config_panics);
