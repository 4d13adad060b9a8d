//! What this machine does in a second, and each of its cards: measured once for about two seconds, then kept in the
//! user's cache directory.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use etcetera::BaseStrategy as _;
use mlx_quant::forecast::{CardRates, Machine};
use mlx_quant::recipes::Device;
use mlx_quant::threads::threads_or_all;
use mlx_quant_report as report;

use crate::printer::{Printer, bytes};

/// A file in `~/.cache/mlx-quant`, or where XDG_CACHE_HOME says.
fn place(name: &str) -> Option<PathBuf> {
    let cache = etcetera::choose_base_strategy().ok()?.cache_dir();
    Some(cache.join("mlx-quant").join(name))
}

/// `machine-2.json`.
fn path(threads: usize) -> Option<PathBuf> {
    place(&format!("machine-{threads}.json"))
}

/// `card-nvidia-h100-80gb-hbm3.json`: the adapter's name, the second part of its engine's.
fn path_of_card(device: &Device) -> Option<PathBuf> {
    let name = device.name().to_lowercase();
    let name = name.trim_start_matches("gpu ").split(',').next().unwrap_or_default();
    let words: Vec<&str> =
        name.split(|letter: char| !letter.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    place(&format!("card-{}.json", words.join("-")))
}

/// Time for which a card is measured.
const CARD: Duration = Duration::from_millis(1600);

/// What a card does in a second, as measured before, or now and kept; nothing of the processor.
pub(crate) fn card(device: &Device, anew: bool, printer: Printer) -> Result<Option<CardRates>> {
    if !device.is_card() {
        return Ok(None);
    }
    let path = path_of_card(device);
    let kept = path.as_deref().filter(|_| !anew).and_then(|path| CardRates::known(path, device));
    if kept.is_some() {
        return Ok(kept);
    }
    let rates = CardRates::measure(device, CARD)?;
    printer.detail(&format!(
        "measured: {} on {}, {}/s to it, {}/s back",
        report::rate(rates.products),
        device.name(),
        bytes(rates.upload as u64),
        bytes(rates.fetch as u64)
    ));
    tell_kept(path.map(|path| rates.keep(&path, device)), printer);
    Ok(Some(rates))
}

/// A place where nothing can be kept only costs two seconds again.
fn tell_kept(kept: Option<std::io::Result<()>>, printer: Printer) {
    if let Some(Err(error)) = kept {
        printer.detail(&format!("the measurement is not kept: {error}"));
    }
}

fn kept(threads: usize) -> Option<Machine> {
    Machine::known(&path(threads)?, threads)
}

/// What was measured before, or a look of a few milliseconds; of a card its rates.
pub(crate) fn known(threads: usize, device: &Device, printer: Printer) -> Result<Machine> {
    let threads = threads_or_all(threads);
    let machine = match kept(threads) {
        Some(machine) => machine,
        None => Machine::quick(threads, Duration::from_millis(60))?,
    };
    Ok(machine.with(card(device, false, printer)?))
}

/// What was measured before, or measured now and kept.
pub(crate) fn measured(threads: usize, anew: bool, device: &Device, printer: Printer) -> Result<Machine> {
    Ok(processor(threads, anew, printer)?.with(card(device, anew, printer)?))
}

fn processor(threads: usize, anew: bool, printer: Printer) -> Result<Machine> {
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
        "measured: {} on {threads} threads, reading {}/s, writing {}/s",
        report::rate(machine.products),
        bytes(machine.read as u64),
        bytes(machine.write as u64)
    ));
    tell_kept(path(threads).map(|path| machine.keep(&path)), printer);
    Ok(machine)
}
