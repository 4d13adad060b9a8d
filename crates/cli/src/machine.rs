//! What this machine does in a second: measured once for about two seconds, then kept in the user's cache directory.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use etcetera::BaseStrategy as _;
use mlx_quant::forecast::Machine;
use mlx_quant::threads_or_all;
use serde::{Deserialize, Serialize};

use crate::printer::{Printer, bytes};

/// Raised when what is measured changes.
const VERSION: u32 = 1;

/// A measurement with what it holds for.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u32,
    kernels: String,
    machine: Machine,
}

/// `~/.cache/mlx-quant/machine-2.json`, or where XDG_CACHE_HOME says.
fn path(threads: usize) -> Option<PathBuf> {
    let cache = etcetera::choose_base_strategy().ok()?.cache_dir();
    Some(cache.join("mlx-quant").join(format!("machine-{threads}.json")))
}

fn kept(threads: usize) -> Option<Machine> {
    let text = fs_err::read_to_string(path(threads)?).ok()?;
    let kept: Kept = serde_json::from_str(&text).ok()?;
    let Machine { products, rounding, read, write, .. } = kept.machine;
    let sound = [products, rounding, read, write].iter().all(|rate| rate.is_finite() && *rate > 0.0);
    let same = kept.version == VERSION && kept.kernels == mlx_format::simd_name();
    (sound && same && kept.machine.threads == threads).then_some(kept.machine)
}

/// What was measured before, or a look of a few milliseconds.
pub(crate) fn known(threads: usize) -> Result<Machine> {
    let threads = threads_or_all(threads);
    match kept(threads) {
        Some(machine) => Ok(machine),
        None => Ok(Machine::quick(threads, Duration::from_millis(60))?),
    }
}

/// What was measured before, or measured now and kept.
pub(crate) fn measured(threads: usize, anew: bool, printer: Printer) -> Result<Machine> {
    let threads = threads_or_all(threads);
    if let Some(machine) = kept(threads).filter(|_| !anew) {
        return Ok(machine);
    }
    // The user's disk rather than a temporary directory, which is often memory.
    let place = path(threads).and_then(|path| path.parent().map(std::path::Path::to_owned));
    let place =
        place.filter(|place| fs_err::create_dir_all(place).is_ok()).unwrap_or_else(std::env::temp_dir);
    let machine = Machine::measure(threads, &place)?;
    printer.detail(&format!(
        "measured: {:.0} GFLOP/s on {threads} threads, reading {}/s, writing {}/s",
        machine.products / 1e9,
        bytes(machine.read as u64),
        bytes(machine.write as u64)
    ));
    // A place where nothing can be kept only costs two seconds again.
    if let Some(path) = path(threads)
        && let Err(error) = keep(&path, machine)
    {
        printer.detail(&format!("the measurement is not kept: {error:#}"));
    }
    Ok(machine)
}

fn keep(path: &std::path::Path, machine: Machine) -> Result<()> {
    let kept = Kept { version: VERSION, kernels: mlx_format::simd_name().to_owned(), machine };
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let parent = path.parent().context("no directory")?;
    fs_err::create_dir_all(parent)?;
    fs_err::write(&partial, serde_json::to_string_pretty(&kept)?)?;
    Ok(fs_err::rename(&partial, path)?)
}
