//! How much memory a calibrated run will need, from headers alone.

use mlx_quant_model::decoder::{Layer, Norm};
use mlx_quant_model::{Producer, Site};
use serde::Serialize;

use super::{QuantizeSettings, wave};
use crate::carry::{CHUNK_BYTES, CHUNKS_PER_THREAD};
use crate::data::Windows;
use crate::evaluate::{EvaluationSettings, memory};
use crate::methods::Method;
use crate::walks::{Walk, backward_bytes};
use crate::{Error, Model, reduce, threads_or_all};

/// Rows of a task of rounding, and how many arrays of them it holds.
const TASK: u64 = crate::methods::ROWS as u64 * 5 * 4;

/// Sixteenths of a block's bytes in float32 that its layers take while they learn.
const LEARNING: u64 = 56;
/// And where they learn on a card: what weights are above their codes before the first step, or what steps have moved
/// and the best codes while they are written.
const LEARNING_ON_CARD: u64 = 24;

/// What the resident memory of a calibrated run is made of, bytes, at the site where it is largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QuantizeMemory {
    /// The block in float32, and its codes.
    pub block: u64,
    /// Activations of all windows within the block; where readers aim at the full-precision stream those on it, and all windows on
    /// it in front of the block.
    pub activations: u64,
    /// Gram matrix, Hessian and factors.
    pub hessians: u64,
    /// The site's readers as they are rounded.
    pub weights: u64,
    /// What learns of the block, its gradients, windows in front of and behind it once more; graphs of threads. Or, before the
    /// first block, what windows leave in front of each, for what changes cost.
    pub learning: u64,
    /// What threads hold.
    pub scratch: u64,
    /// What the process holds already.
    pub fixed: u64,
    /// What measuring the result needs.
    pub evaluation: u64,
    /// The largest sum at any time.
    pub peak: u64,
}

/// Predicts the peak resident memory of [`super::quantize`] in a process that holds `resident` bytes now.
///
/// # Errors
/// As [`Walk::open`].
pub fn quantize_memory(
    model: &Model,
    windows: &Windows,
    settings: &QuantizeSettings,
    resident: u64,
) -> Result<QuantizeMemory, Error> {
    let walk = Walk::open(model)?;
    let threads = threads_or_all(settings.threads);
    let tokens = windows.sequence_length as u64;
    let within = wave(settings, threads, windows).min(windows.picked.len()) as u64;
    let blocks = walk.block_bytes();
    let hidden = walk.decoder.hidden_size as u64;
    let elements = |path: &str| {
        walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]).iter().rev().take(2).product::<usize>()
            as u64
    };
    let gptq = matches!(settings.recipe.rounding(), Method::Gptq | Method::Refine);
    let folds = settings.recipe.folds();
    let aims = settings.statistics.is_none()
        && super::aim::aims(settings.recipe.rounding(), settings.method.correction);
    let sums = reduce::alive(windows.picked.len()) as u64;
    let mut largest = QuantizeMemory::default();
    let (within_a_block, state) = (walk.scratch_bytes(windows.sequence_length), walk.state_elements() as u64);
    // Without a walk, rows are carried a few megabytes at a time.
    let walked = if settings.recipe.walks() { blocks.len() } else { 0 };
    let windows_held = windows.picked.len() as u64 * tokens * 4 * state;
    let graph = crate::walks::graph_bytes(&walk, tokens);
    let running = (threads as u64).min(settings.learn.batch as u64);
    for (block, bytes) in walk.decoder.blocks.iter().zip(&blocks).take(walked) {
        let routed = block.layers().map(|layer| match layer {
            Layer::Moe(moe) => 2 * moe.router.top_k as u64,
            _ => 0,
        });
        let routed = routed.max().unwrap_or(0) * hidden;
        for site in
            block.sites().iter().filter(|site: &&Site<'_>| site.expert.is_none_or(|expert| expert == 0))
        {
            let shape = walk.weights.shape(&format!("{}.weight", site.readers[0].path)).unwrap_or(&[]);
            let size = shape.last().copied().unwrap_or(1) as u64;
            let readers: u64 = site.readers.iter().map(|reader| elements(&reader.path) * 4).sum();
            // The residual stream, the norm's output, and the input itself where it is another.
            let own = if matches!(site.producer, Producer::Norm(_) | Producer::Residual) { 0 } else { size };
            // While windows come, sums of chunks wait for their partners.
            let drift = if aims { (1 + sums) * size * (size + hidden) * 4 } else { 0 };
            let matrices = (1 + u64::from(folds) + if gptq { 3 } else { 0 }).max(sums);
            // A trial of a fold rounds all readers of the norm, experts included.
            let trial = match site.producer {
                Producer::Norm(norm) if folds => whole(&walk, &block.sites(), norm) * 2,
                _ => 0,
            };
            // Where windows pass once for each site, the weights of those they passed are kept too.
            let passed = if within < windows.picked.len() as u64 { *bytes } else { 0 };
            let streams = if aims { 2 } else { 1 };
            let held = if aims && !settings.recipe.learns() { windows_held } else { 0 };
            let mut sum = QuantizeMemory {
                block: bytes + bytes * 5 / 16 + passed,
                activations: streams * within * tokens * 4 * (state + hidden + own + routed) + held,
                hessians: matrices * size * size * 4 + drift,
                weights: trial.max(readers * 2),
                // Of full precision, and as they stand in front of the block that learns.
                learning: if settings.recipe.learns() { bytes + 2 * windows_held } else { 0 },
                scratch: threads as u64 * (size * TASK).max(within_a_block),
                ..QuantizeMemory::default()
            };
            sum.peak = sum.block + sum.activations + sum.hessians + sum.weights + sum.learning + sum.scratch;
            if sum.peak > largest.peak {
                largest = sum;
            }
        }
        if settings.recipe.learns() {
            // Codes, positions, what they decode to, the best codes, the sum of gradients; a thread's gradients and graph.
            let (layers, running) =
                if walk.device.is_card() { (LEARNING_ON_CARD, 0) } else { (LEARNING, running) };
            let mut sum = QuantizeMemory {
                block: *bytes,
                activations: windows_held,
                learning: bytes * layers / 16 + running * (2 * bytes + graph) + 2 * windows_held,
                scratch: threads as u64 * within_a_block,
                ..QuantizeMemory::default()
            };
            sum.peak = sum.block + sum.activations + sum.learning + sum.scratch;
            if sum.peak > largest.peak {
                largest = sum;
            }
        }
    }
    if walked > 0 && settings.recipe.learns() {
        // What changes of what leaves blocks cost, before the first of them; windows are there, and once more in full precision.
        let measured = crate::learn::measured(windows.picked.len());
        let together = walk.trail(windows.sequence_length, threads, settings.low_memory).min(measured);
        let (trail, graph) = backward_bytes(&walk, tokens, together, threads);
        let mut sum = QuantizeMemory {
            block: blocks.iter().copied().max().unwrap_or(0),
            activations: windows_held,
            learning: windows_held + trail + graph,
            scratch: threads as u64 * within_a_block,
            ..QuantizeMemory::default()
        };
        sum.peak = sum.block + sum.activations + sum.learning + sum.scratch;
        if sum.peak > largest.peak {
            largest = sum;
        }
    }
    if walked == 0 {
        largest.scratch = (threads * CHUNKS_PER_THREAD * CHUNK_BYTES) as u64 * 2;
        largest.peak = largest.scratch;
    }
    largest.fixed = resident;
    if let Some(held_out) = &settings.evaluate {
        let quality = EvaluationSettings { threads, low_memory: settings.low_memory, cache: None };
        largest.evaluation = memory(model, Some(model), held_out, &quality, 0)?.peak;
    }
    largest.peak = resident + largest.peak.max(largest.evaluation);
    Ok(largest)
}

/// Bytes in float32 of all that read a norm.
fn whole(walk: &Walk<'_>, sites: &[Site<'_>], norm: &Norm) -> u64 {
    let same = |site: &&Site<'_>| {
        let own = matches!(site.producer, Producer::Norm(own) if own.path == norm.path);
        own && site.expert.is_none_or(|expert| expert == 0)
    };
    let shape = |path: &str| walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]);
    let readers = sites.iter().filter(same).flat_map(|site| &site.readers);
    readers.map(|reader| shape(&reader.path).iter().product::<usize>() as u64 * 4).sum()
}
