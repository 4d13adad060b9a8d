//! What this machine does in a second: measured once for about two seconds, then kept in the user's cache directory.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use etcetera::BaseStrategy as _;
use mlx_quant::forecast::Machine;
use mlx_quant::threads::threads_or_all;

use crate::printer::{Printer, bytes};

/// `~/.cache/mlx-quant/machine-2.json`, or where XDG_CACHE_HOME says.
fn path(threads: usize) -> Option<PathBuf> {
    let cache = etcetera::choose_base_strategy().ok()?.cache_dir();
    Some(cache.join("mlx-quant").join(format!("machine-{threads}.json")))
}

fn kept(threads: usize) -> Option<Machine> {
    Machine::known(&path(threads)?, threads)
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
        && let Err(error) = machine.keep(&path)
    {
        printer.detail(&format!("the measurement is not kept: {error}"));
    }
    Ok(machine)
}
