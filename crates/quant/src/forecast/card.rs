//! What a card does in a second, measured through the engine that runs compute with.
//!
//! A card has to be asked for much at once, and how much depends on the card: products grow until one takes
//! milliseconds. What is recorded is done in order, so that a number of the last result is there when all is done.

use std::path::Path;
use std::time::{Duration, Instant};

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::rounding::How;
use mlx_quant_engine::{Device, Factor, GramSum, Result, Tensor};
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::kept;
use crate::session::SEARCH;

/// Raised when what is measured changes.
const VERSION: u32 = 2;

/// A measurement with what it holds for.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u32,
    /// The engine's name: the adapter and its driver.
    engine: String,
    card: CardRates,
}

/// Rates of a card.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CardRates {
    /// Floating-point operations a second in matrix products.
    pub products: f64,
    /// Operations a second in searches of grids.
    pub search: f64,
    /// Operations a second in rounding with a Hessian: its factor and codes.
    pub rounding: f64,
    /// Bytes a second that go to the card.
    pub upload: f64,
    /// Bytes a second that come back.
    pub fetch: f64,
}

/// Shapes `(tokens, in, out)` of products, each with many more operations than the one before.
const PRODUCTS: [(usize, usize, usize); 4] =
    [(256, 256, 256), (512, 768, 768), (2048, 2048, 2048), (8192, 4096, 4096)];
/// Sizes of Hessians, and of the weights that are rounded with them.
const SIZES: [usize; 4] = [128, 512, 2048, 4096];
/// Numbers that go to the card and come back.
const BROUGHT: usize = 4 << 20;

impl CardRates {
    /// What [`CardRates::keep`] wrote into a file for this card and driver.
    pub fn known(path: &Path, device: &Device) -> Option<Self> {
        let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let Self { products, search, rounding, upload, fetch } = kept.card;
        let all = [products, search, rounding, upload, fetch];
        let sound = all.iter().all(|rate| rate.is_finite() && *rate > 0.0);
        (sound && kept.version == VERSION && kept.engine == device.name()).then_some(kept.card)
    }

    /// Writes the rates into a file for later runs. Its directory is made if it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub fn keep(self, path: &Path, device: &Device) -> std::io::Result<()> {
        let kept = Kept { version: VERSION, engine: device.name(), card: self };
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent)?;
            kept::sweep(parent, |name| name.starts_with("card-"));
        }
        kept::write(path, serde_json::to_string_pretty(&kept)?.as_bytes())
    }

    /// Measures for about `time`; building kernels comes on top of it.
    ///
    /// # Errors
    /// What goes wrong on the card.
    pub fn measure(device: &Device, time: Duration) -> std::result::Result<Self, Error> {
        let measured = || -> Result<Self> {
            let (upload, fetch) = brought(device, time.mul_f64(0.15))?;
            Ok(Self {
                products: products(device, time.mul_f64(0.4))?,
                search: searches(device, time.mul_f64(0.2))?,
                rounding: roundings(device, time.mul_f64(0.25))?,
                upload,
                fetch,
            })
        };
        let rates = measured().map_err(WeightsError::from)?;
        // A run that follows is not charged with this.
        device.reset_peak();
        Ok(rates)
    }
}

/// Numbers between -1 and 1 in no order.
fn numbers(rows: usize, columns: usize, device: &Device) -> Result<Tensor> {
    let number = |at: usize| (at.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
    Tensor::from_vec((0..rows * columns).map(number).collect(), (rows, columns), device)
}

/// Waits until a matrix is there, and everything that was asked for before it.
fn wait(matrix: &Tensor) -> Result<()> {
    matrix.narrow(0, 0, 1)?.narrow(1, 0, 1)?.to_vec().map(drop)
}

/// Seconds of one run, the best of as many as there is time for; the first builds kernels and does not count.
fn best(time: Duration, mut run: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    wait(&run()?)?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < time || best.is_infinite() {
        let round = Instant::now();
        wait(&run()?)?;
        best = best.min(round.elapsed().as_secs_f64());
    }
    Ok(best.max(1e-9))
}

/// A task that takes longer is large enough to tell a rate, and the next one would take up to 64 times as long.
const ENOUGH: f64 = 0.03;

/// The best rate of tasks of growing size, up to one that is large enough; a quick one tells how long launches take, not
/// what a card can do. A task gives its operations and its seconds.
fn growing(sizes: usize, mut task: impl FnMut(usize) -> Result<(f64, f64)>) -> Result<f64> {
    let mut rate = 0f64;
    for size in 0..sizes {
        let (operations, seconds) = match task(size) {
            Ok(done) => done,
            // A small card has no room for the larger ones.
            Err(_) if size > 0 => break,
            Err(error) => return Err(error),
        };
        rate = rate.max(operations / seconds);
        if seconds > ENOUGH {
            break;
        }
    }
    Ok(rate)
}

fn products(device: &Device, time: Duration) -> Result<f64> {
    growing(PRODUCTS.len(), |size| {
        let (m, k, n) = PRODUCTS[size];
        let (x, weight) = (numbers(m, k, device)?, numbers(n, k, device)?);
        let seconds = best(time / 8, || device.linear(&x, &weight, None))?;
        Ok((2.0 * (m * k * n) as f64, seconds))
    })
}

fn scheme() -> Result<Scheme> {
    Scheme::affine(4, 64).map_err(|error| mlx_quant_engine::Error::msg(error.to_string()))
}

fn searches(device: &Device, time: Duration) -> Result<f64> {
    let scheme = scheme()?;
    growing(SIZES.len(), |size| {
        let size = SIZES[size];
        let (weight, weights) = (numbers(size, size, device)?, vec![1.0; size]);
        let how = How::Nearest { weights: &weights };
        let seconds = best(time / 8, || Ok(device.round(&weight, scheme, FloatType::Bf16, how)?.1))?;
        Ok(((size * size) as f64 * SEARCH, seconds))
    })
}

/// Of a factor, and of codes by it: the operations that a forecast counts for them.
fn roundings(device: &Device, time: Duration) -> Result<f64> {
    let scheme = scheme()?;
    growing(SIZES.len(), |size| {
        let size = SIZES[size];
        let weight = numbers(size, size, device)?;
        let mut sum = GramSum::new(size, device)?;
        sum.add(&numbers(2 * size, size, device)?)?;
        let gram = sum.finish()?;
        let run = || {
            let factor = Factor::new(&gram, (0..size).collect(), 0.01)?;
            let factor = factor.ok_or_else(|| mlx_quant_engine::Error::msg("a matrix has no factor"))?;
            let how = How::Compensated { factor: &factor, block_size: 128, sweeps: 0 };
            Ok(device.round(&weight, scheme, FloatType::Bf16, how)?.1)
        };
        Ok((crate::session::rounding_operations(size as f64, size as f64, 3.0), best(time / 8, run)?))
    })
}

/// Bytes a second that go to a card, and that come back.
fn brought(device: &Device, time: Duration) -> Result<(f64, f64)> {
    let values = vec![0.5f32; BROUGHT];
    let bytes = (BROUGHT * 4) as f64;
    let there = Tensor::from_slice(&values, (BROUGHT / 1024, 1024), device)?;
    let up = best(time / 2, || Tensor::from_slice(&values, (BROUGHT / 1024, 1024), device))?;
    let (start, mut back) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < time / 2 || back.is_infinite() {
        let round = Instant::now();
        there.read(|numbers| std::hint::black_box(numbers[0]))?;
        back = back.min(round.elapsed().as_secs_f64());
    }
    Ok((bytes / up, bytes / back.max(1e-9)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any engine can be measured so; the processor is always there.
    #[test]
    fn every_rate_is_measured_and_kept_for_one_engine() {
        let device = mlx_quant_engine::cpu();
        let rates = CardRates::measure(&device, Duration::from_millis(200)).unwrap();
        for rate in [rates.products, rates.search, rates.rounding, rates.upload, rates.fetch] {
            assert!(rate.is_finite() && rate > 1e6, "{rates:?}");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/card-x.json");
        assert_eq!(CardRates::known(&path, &device), None);
        rates.keep(&path, &device).unwrap();
        let found = CardRates::known(&path, &device).unwrap();
        assert!((found.products / rates.products - 1.0).abs() < 1e-9);
        // Another driver is another engine.
        let other = Device::new(mlx_quant_engine::Cpu::in_batches(4));
        assert_eq!(CardRates::known(&path, &other), None);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [("\"version\": 2", "\"version\": 1"), ("\"search\": ", "\"search\": -"), ("}", "")]
        {
            assert!(text.contains(from), "{text}");
            std::fs::write(&path, text.replace(from, to)).unwrap();
            assert_eq!(CardRates::known(&path, &device), None, "{from}");
        }
    }

    #[test]
    fn tasks_grow_until_one_is_large_enough() {
        let mut done = Vec::new();
        let rate = growing(4, |size| {
            done.push(size);
            // Launches are all that the first two take; behind the third there is no need for a fourth.
            Ok([(1e6, 5e-3), (1e8, 1e-2), (1e10, 1.0), (1e12, 1.0)][size])
        });
        assert_eq!((rate.unwrap(), done), (1e10, vec![0, 1, 2]));
    }
}
