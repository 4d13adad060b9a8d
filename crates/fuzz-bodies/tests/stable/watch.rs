//! A target in a process of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mlx_quant::data::hexadecimal;
use mlx_quant_fuzz_bodies::attempt;
use sha2::{Digest as _, Sha256};

use crate::mutate::Mutator;

/// Names, in the environment of a target's process, the file in which it writes down what it tries.
const CURRENT: &str = "MLX_QUANT_FUZZ_CURRENT";

/// What a target may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// After this no further input is begun.
    pub(crate) time: Duration,
    /// Of one input.
    pub(crate) slowest: Duration,
    /// Bytes, beside two stacks of chat templates.
    pub(crate) memory: u64,
}

/// How it ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Passed { executions: u64, seconds: f64 },
    Found { input: PathBuf, reason: String, output: String },
}

/// Tries `known`, the mutator's seeds, and their changes. `test` is the full name of the test that calls this: its process is this
/// program once more, with that test alone.
pub(crate) fn watch(
    test: &str,
    body: fn(&[u8]),
    limits: Limits,
    known: Vec<Vec<u8>>,
    changed: Mutator,
    artifacts: &Path,
) -> Outcome {
    if let Some(current) = std::env::var_os(CURRENT) {
        work(body, limits, known, changed, PathBuf::from(current));
    }
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let directory = directory.unwrap();
    let (current, output) = (directory.path().join("current"), directory.path().join("output"));
    let file = std::fs::File::create(&output).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(CURRENT, &current)
        .env("TMPDIR", directory.path())
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let ended = wait(child, &current, limits.slowest);
    let output = String::from_utf8_lossy(&std::fs::read(output).unwrap()).into_owned();
    let reason = match (ended, tally(&output)) {
        (Ok(()), Some((executions, seconds))) => return Outcome::Passed { executions, seconds },
        (Ok(()), None) => "the process ended without a word".to_owned(),
        (Err(reason), _) => reason,
    };
    let bytes = std::fs::read(&current).unwrap_or_default();
    std::fs::create_dir_all(artifacts).unwrap();
    let hash = hexadecimal(&Sha256::digest(&bytes)[..8]);
    let input = artifacts.join(format!("stable-{hash}"));
    std::fs::write(&input, bytes).unwrap();
    Outcome::Found { input, reason, output }
}

/// Waits for a process, which is killed where it dwells on one input; fails with a reason.
fn wait(mut child: Child, current: &Path, slowest: Duration) -> Result<(), String> {
    let mut last = None;
    let mut since = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return if status.success() { Ok(()) } else { Err(format!("the process ended with {status}")) };
        }
        let changed = std::fs::metadata(current).and_then(|metadata| metadata.modified()).ok();
        if changed != last {
            (last, since) = (changed, Instant::now());
        }
        if since.elapsed() > slowest {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("an input took longer than {} seconds", slowest.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

const TALLY: &str = "executions and seconds: ";

fn tally(output: &str) -> Option<(u64, f64)> {
    let line = output.lines().find_map(|line| line.strip_prefix(TALLY))?;
    let (executions, seconds) = line.split_once(' ')?;
    Some((executions.parse().ok()?, seconds.parse().ok()?))
}

/// What the target's process does.
fn work(body: fn(&[u8]), limits: Limits, known: Vec<Vec<u8>>, mut changed: Mutator, current: PathBuf) -> ! {
    bound_memory(limits.memory);
    // As much stack as a main thread has.
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let worked = thread.spawn(move || {
        let start = Instant::now();
        let mut executions = 0u64;
        let mut attempt = |bytes: &[u8]| {
            std::fs::write(&current, bytes).unwrap();
            attempt(body, bytes);
            executions += 1;
        };
        for bytes in known.iter().chain(changed.seeds()) {
            attempt(bytes);
        }
        while !changed.seeds().is_empty() && start.elapsed() < limits.time {
            attempt(&changed.change());
        }
        println!("\n{TALLY}{executions} {:.3}", start.elapsed().as_secs_f64());
    });
    worked.unwrap().join().unwrap();
    std::process::exit(0)
}

/// An allocation beyond it fails, which ends the process.
#[cfg(unix)]
fn bound_memory(bytes: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // Stacks are reserved whole.
    let bytes = bytes + (512 << 20);
    for resource in [Resource::Data, Resource::Core] {
        let maximum = getrlimit(resource).maximum;
        let wanted = if resource == Resource::Core { 0 } else { bytes };
        let current = Some(maximum.map_or(wanted, |maximum| wanted.min(maximum)));
        setrlimit(resource, Rlimit { current, maximum }).unwrap();
    }
}

#[cfg(not(unix))]
fn bound_memory(_: u64) {}
