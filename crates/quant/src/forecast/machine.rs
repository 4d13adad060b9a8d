//! What a machine does in a second.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use mlx_format::{FloatType, PackedMut, Scheme};
use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::card::CardRates;
use crate::{Error, kept, threads};

/// Raised when what is measured changes.
const VERSION: u32 = 1;

/// A measurement with what it holds for.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u32,
    kernels: String,
    machine: Machine,
}

/// Rates of a machine with all its threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Threads that were measured together.
    pub threads: usize,
    /// Floating-point operations a second in matrix products.
    pub products: f64,
    /// Bytes of bfloat16 input a second that are rounded to nearest.
    pub rounding: f64,
    /// Bytes a second from a file that is in no cache.
    pub read: f64,
    /// Bytes a second into a file, synced.
    pub write: f64,
    /// Of the card, where one computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<CardRates>,
}

/// Features of the products that are timed.
const SIZE: usize = 768;
/// Tokens of them.
const TOKENS: usize = 512;
/// Files written to time a disk, and pieces of 8 MiB in each.
const ROUNDS: usize = 3;
const PIECES: usize = 8;

impl Machine {
    /// The same machine with a card that computes.
    #[must_use]
    pub fn with(self, card: Option<CardRates>) -> Self {
        Self { card, ..self }
    }

    /// Operations a second of a part of the work.
    pub(super) fn rate(&self, part: &str) -> f64 {
        match (self.card, part) {
            (None, _) => self.products * efficiency(part),
            (Some(card), "search" | "candidates") => card.search,
            (Some(card), "rounding") => card.rounding,
            (Some(card), _) => card.products * efficiency(part),
        }
    }

    /// What [`Machine::keep`] wrote into a file on a machine like this, for so many threads.
    pub fn known(path: &Path, threads: usize) -> Option<Self> {
        let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let Self { products, rounding, read, write, .. } = kept.machine;
        let sound = [products, rounding, read, write].iter().all(|rate| rate.is_finite() && *rate > 0.0);
        let same = kept.version == VERSION && kept.kernels == mlx_format::simd_name();
        (sound && same && kept.machine.threads == threads::threads_or_all(threads)).then_some(kept.machine)
    }

    /// Writes the rates into a file for later runs. Its directory is made if it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub fn keep(self, path: &Path) -> std::io::Result<()> {
        let kept =
            Kept { version: VERSION, kernels: mlx_format::simd_name().to_owned(), machine: self.with(None) };
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent)?;
            kept::sweep(parent, |name| name.starts_with("machine-"));
        }
        kept::write(path, serde_json::to_string_pretty(&kept)?.as_bytes())
    }

    /// Measures for about two seconds; the disk is that of `directory`, in which a file comes and goes.
    ///
    /// # Errors
    /// If threads cannot be started or the file cannot be written.
    pub fn measure(threads: usize, directory: &Path) -> Result<Self, Error> {
        let mut machine = Self::quick(threads, Duration::from_secs(1))?;
        (machine.read, machine.write) =
            disk(directory, Duration::from_millis(700)).map_err(|error| Error::state(directory, &error))?;
        Ok(machine)
    }

    /// Times products and rounding for so long; disk rates are those of an ordinary solid-state disk.
    ///
    /// # Errors
    /// If threads cannot be started.
    pub fn quick(threads: usize, time: Duration) -> Result<Self, Error> {
        let pool = threads::pool(threads)?;
        let threads = pool.current_num_threads();
        let products = pool.install(|| products(threads, time.mul_f64(0.8))).map_err(WeightsError::from)?;
        let rounding = pool.install(|| rounding(threads, time.mul_f64(0.2)));
        Ok(Self { threads, products, rounding, read: 1e9, write: 5e8, card: None })
    }
}

/// The best of several rounds, in which each thread computes a product of its own.
fn products(threads: usize, time: Duration) -> mlx_quant_engine::Result<f64> {
    let x = numbers(TOKENS, SIZE)?;
    let w = numbers(SIZE, SIZE)?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < time || best.is_infinite() {
        let round = Instant::now();
        (0..threads).into_par_iter().try_for_each(|_| {
            std::hint::black_box(x.device().linear(&x, &w, None)?);
            Ok::<_, mlx_quant_engine::Error>(())
        })?;
        best = best.min(round.elapsed().as_secs_f64());
    }
    Ok(2.0 * (TOKENS * SIZE * SIZE * threads) as f64 / best.max(1e-9))
}

/// Numbers between -1 and 1 in no order.
fn numbers(rows: usize, columns: usize) -> mlx_quant_engine::Result<Tensor> {
    let number = |at: usize| (at.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
    Tensor::from_vec((0..rows * columns).map(number).collect(), (rows, columns), &mlx_quant_engine::cpu())
}

/// Input bytes a second of rounding to nearest at 4 bits.
fn rounding(threads: usize, time: Duration) -> f64 {
    const ROWS: usize = 128;
    const COLUMNS: usize = 2048;
    let Ok(scheme) = Scheme::affine(4, 64) else { return 1e9 };
    let float = FloatType::Bf16;
    let values: Vec<f32> = (0..ROWS * COLUMNS).map(|i| (i as f32 * 0.7).sin() * 0.02).collect();
    let mut input = vec![0u8; values.len() * float.size()];
    float.narrow(&values, &mut input);
    let one = || {
        let mut weight = vec![0u8; ROWS * scheme.words(COLUMNS) * 4];
        let mut scales = vec![0u8; ROWS * scheme.scale_bytes(COLUMNS, float)];
        let mut biases = vec![0u8; scales.len()];
        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
        // The values are finite.
        let _ = mlx_format::quantize(scheme, float, COLUMNS, &input, out, true);
        std::hint::black_box(weight);
    };
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < time || best.is_infinite() {
        let round = Instant::now();
        (0..threads * 4).into_par_iter().for_each(|_| one());
        best = best.min(round.elapsed().as_secs_f64());
    }
    (input.len() * threads * 4) as f64 / best.max(1e-9)
}

/// Bytes a second read and written: the best of three files that are written, synced, dropped from the cache and read.
fn disk(directory: &Path, time: Duration) -> std::io::Result<(f64, f64)> {
    let mut piece: Vec<u8> = (0..8usize << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let bytes = (PIECES * piece.len()) as f64;
    let rate = |start: Instant| bytes / start.elapsed().as_secs_f64().max(1e-9);
    let (begun, mut best) = (Instant::now(), (0f64, 0f64));
    for round in 0..ROUNDS {
        // A slow disk is timed once.
        if round > 0 && begun.elapsed() > time {
            break;
        }
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        let start = Instant::now();
        for _ in 0..PIECES {
            file.write_all(&piece)?;
        }
        file.as_file().sync_all()?;
        best.1 = best.1.max(rate(start));
        mlx_format::checkpoint::forget_cached(file.as_file());
        let mut again = fs_err::File::open(file.path())?;
        let start = Instant::now();
        while again.read(&mut piece)? > 0 {}
        best.0 = best.0.max(rate(start));
    }
    Ok(best)
}

/// Part of the rate of products that a part of the work reaches, measured on processors.
fn efficiency(part: &str) -> f64 {
    match part {
        "search" | "candidates" => 0.13,
        "folding" => 0.12,
        "rounding" => 0.265,
        "sensitivities" => 0.59,
        "dwq" | "dwq: looks" | "learning" => 0.66,
        "evaluation" => 0.73,
        "teacher" => 0.79,
        _ => 0.65,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_computes_at_its_own_rates() {
        let machine = Machine { threads: 2, products: 1e9, rounding: 2e9, read: 3e9, write: 4e9, card: None };
        let card = CardRates { products: 1e12, search: 2e12, rounding: 3e12, upload: 4e9, fetch: 5e9 };
        let both = machine.with(Some(card));
        assert_eq!((both.rate("search"), both.rate("candidates")), (2e12, 2e12));
        assert_eq!(both.rate("rounding"), 3e12);
        for part in ["forward", "folding", "dwq", "evaluation"] {
            assert!((both.rate(part) / machine.rate(part) - 1e3).abs() < 1e-6, "{part}");
        }
    }

    #[test]
    fn every_rate_is_measured() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::measure(1, directory.path()).unwrap();
        for rate in [machine.products, machine.rounding, machine.read, machine.write] {
            assert!(rate.is_finite() && rate > 1e6, "{machine:?}");
        }
        assert_eq!(machine.threads, 1);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn rates_are_kept_for_a_machine_like_this() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/machine-2.json");
        let machine = Machine { threads: 2, products: 1e9, rounding: 2e9, read: 3e9, write: 4e9, card: None };
        assert_eq!(Machine::known(&path, 2), None);
        let card = CardRates { products: 1e12, search: 2e12, rounding: 3e12, upload: 4e9, fetch: 5e9 };
        machine.with(Some(card)).keep(&path).unwrap();
        assert_eq!(Machine::known(&path, 2), Some(machine));
        assert_eq!(Machine::known(&path, 3), None);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [("\"version\": 1", "\"version\": 0"), ("1000000000.0", "-1.0"), ("}", "")] {
            assert!(text.contains(from), "{text}");
            std::fs::write(&path, text.replace(from, to)).unwrap();
            assert_eq!(Machine::known(&path, 2), None, "{from}");
        }
    }
}
