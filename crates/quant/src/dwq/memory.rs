//! How much memory and arithmetic a distillation needs, from headers alone.

use serde::Serialize;

use super::DwqSettings;
use super::grids::Grid;
use super::norms;
use crate::data::Windows;
use crate::plan::{Job, Plan};
use crate::walks::Walk;
use crate::walks::{a_token, graph_bytes, largest_weight, tile_bytes};
use crate::{Error, Model, threads_or_all};

/// What the resident memory of a distillation is made of, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DwqMemory {
    /// Scales, centers and norms' weights, Adam's moments, the best values and gradients. On a card they are that card's
    /// memory.
    pub grids: u64,
    /// A block in float32 and its codes.
    pub block: u64,
    /// What a batch leaves in front of each block.
    pub trail: u64,
    /// What threads hold: a block's graph each, or a tile of logits.
    pub graph: u64,
    /// What the process holds already.
    pub fixed: u64,
    /// Of all.
    pub peak: u64,
}

/// Predicts the peak resident memory of a distillation of `plan`'s output in a process that holds `resident` bytes.
///
/// # Errors
/// As [`Walk::open`].
pub fn dwq_memory(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &DwqSettings,
    threads: usize,
    resident: u64,
) -> Result<DwqMemory, Error> {
    let walk = Walk::open(model)?;
    let threads = threads_or_all(threads) as u64;
    let tokens = windows.sequence_length as u64;
    let grids = trained_bytes(&walk, plan);
    let on_card = walk.device.is_card();
    let block = walk.block_bytes().into_iter().max().unwrap_or(0);
    let batch = (settings.batch_size as u64).max(threads);
    let state = walk.state_elements() as u64 * 4 * tokens;
    let running = threads.min(batch);
    let tile = tile_bytes(&walk, tokens);
    let graph = graph_bytes(&walk, tokens);
    // The gradient of one weight at a time.
    let largest = largest_weight(&walk);
    let mut memory = DwqMemory {
        grids: if on_card { 0 } else { grids },
        block: block + block / 4,
        trail: batch * state * (walk.decoder.blocks.len() as u64 + 4),
        graph: running * (graph + largest).max(tile),
        fixed: resident,
        peak: 0,
    };
    // While a state is saved nothing else is held, but all of it twice but for the slopes; from a card it comes once.
    let step = memory.grids + memory.block + memory.trail + memory.graph;
    memory.peak = memory.fixed + step.max(grids / 12 * if on_card { 8 } else { 16 });
    Ok(memory)
}

/// What is trained of `plan`'s output, bytes: as [`DwqMemory::grids`], wherever it lies. `walk` is of its source.
pub(crate) fn trained_bytes(walk: &Walk<'_>, plan: &Plan) -> u64 {
    let grids = plan.items.iter().map(|item| match &item.job {
        Job::Quantize { view, scheme, .. } if scheme.bits() < 8 => {
            Grid::bytes(view.elements() as u64, scheme.group_size() as u64)
        }
        _ => 0,
    });
    let packed = plan.layout.specs().iter().filter(|spec| spec.name.ends_with(".scales"));
    let packed: u64 = packed.map(|spec| spec.shape.iter().product::<usize>() as u64 * 48).sum();
    grids.sum::<u64>().max(packed) + norms::bytes(walk)
}

/// Floating-point operations of the teacher, of the training (forward, once more, gradients of inputs and of weights) and of looks at
/// held-out windows.
///
/// # Errors
/// As [`Walk::open`].
pub fn dwq_operations(
    model: &Model,
    windows: &Windows,
    held_out: &Windows,
    settings: &DwqSettings,
) -> Result<(f64, f64, f64), Error> {
    let walk = Walk::open(model)?;
    let (blocks, head) = a_token(&walk, windows.sequence_length);
    let trained = (settings.iterations * settings.batch_size * windows.sequence_length) as f64;
    let every = super::looks_every(settings, held_out.picked.len());
    let looks = (1 + settings.iterations.div_ceil(every)) as f64
        * (held_out.picked.len() * held_out.sequence_length) as f64;
    let taught = ((windows.picked.len() + held_out.picked.len()) * windows.sequence_length) as f64;
    // Of the head twice forward for both, then gradients of both.
    Ok((taught * blocks, trained * (4.0 * blocks + 6.0 * head), looks * (blocks + 4.0 * head)))
}
