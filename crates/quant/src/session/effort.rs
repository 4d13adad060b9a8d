//! How long a calibrated run will take, from headers and a measurement of a few milliseconds.

use std::time::Instant;

use candle_core::{Device, Tensor};
use mlx_quant_model::decoder::{Block, Layer};
use mlx_quant_model::ops::Kernels;
use mlx_quant_model::{Site, WeightsError};

use super::QuantizeSettings;
use crate::data::Windows;
use crate::methods::Method;
use crate::walk::Walk;
use crate::{Error, Model, threads_or_all};

/// Part of the rate of products that a run reaches over all, measured on SmolLM2-135M.
const EFFICIENCY: f64 = 0.6;
/// AWQ: candidates that differ, of those that the grid has, and rows on which each is judged.
const CANDIDATES: f64 = 1.5;
const SAMPLE: f64 = 64.0;

/// Floating-point operations of [`super::quantize`], about: the forward pass, Gram matrices, rounding.
///
/// # Errors
/// As [`Walk::open`].
pub fn operations(model: &Model, windows: &Windows, settings: &QuantizeSettings) -> Result<f64, Error> {
    if !settings.recipe.walks() {
        return Ok(0.0);
    }
    let walk = Walk::open(model)?;
    let tokens = (windows.picked.len() * windows.sequence_length) as f64;
    let sum: f64 = walk.decoder.blocks.iter().map(|block| of_block(&walk, block, tokens, settings)).sum();
    Ok(sum)
}

fn of_block(walk: &Walk<'_>, block: &Block, tokens: f64, settings: &QuantizeSettings) -> f64 {
    let moe = block.layers().find_map(|layer| match layer {
        Layer::Moe(moe) => Some((moe.experts.count as f64, moe.router.top_k as f64)),
        _ => None,
    });
    let (experts, routed) = moe.unwrap_or((1.0, 1.0));
    let of_site = |site: &Site<'_>| -> f64 {
        let shape = walk.weights.shape(&format!("{}.weight", site.readers[0].path)).unwrap_or(&[]);
        let size = shape.last().copied().unwrap_or(1) as f64;
        let rows = |path: &str| {
            let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]);
            shape.iter().rev().nth(1).copied().unwrap_or(0) as f64
        };
        let rows: f64 = site.readers.iter().map(|reader| rows(&reader.path)).sum();
        let (copies, seen) = if site.expert.is_some() { (experts, tokens * routed) } else { (1.0, tokens) };
        let mut sum = seen * (2.0 * rows * size + size * size);
        if matches!(settings.recipe.rounding(), Method::Gptq | Method::Refine) {
            let passes = 3.0 + 2.0 * settings.method.sweeps as f64;
            sum += copies * (passes * rows * size * size + size.powi(3));
        }
        if settings.recipe.folds() {
            let judged = SAMPLE * site.readers.len() as f64;
            sum += copies * CANDIDATES * settings.method.n_grid as f64 * 2.0 * judged * size * size;
        }
        sum
    };
    block.sites().iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)).map(of_site).sum()
}

/// Seconds that so many operations take on this machine, about.
///
/// # Errors
/// If the device has no memory left.
pub fn seconds(operations: f64, threads: usize) -> Result<f64, Error> {
    const SIZE: usize = 512;
    let product = || -> candle_core::Result<f64> {
        let x = Tensor::rand(-1f32, 1f32, (SIZE, SIZE), &Device::Cpu)?;
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let start = Instant::now();
            std::hint::black_box(Kernels::Fused.linear(&x, &x, None)?);
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * (SIZE as f64).powi(3) / best.max(1e-9))
    };
    let rate = product().map_err(WeightsError::from)? * threads_or_all(threads) as f64;
    Ok(operations / (EFFICIENCY * rate))
}
