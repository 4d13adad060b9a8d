//! How much memory and arithmetic a distillation needs, from headers alone.

use mlx_quant_model::decoder::{Layer, Linear};
use serde::Serialize;

use super::DwqSettings;
use super::grids::Grid;
use crate::data::Windows;
use crate::evaluate::TILE;
use crate::plan::{Job, Plan};
use crate::walk::Walk;
use crate::{Error, Model, threads_or_all};

/// What the resident memory of a distillation is made of, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DwqMemory {
    /// Scales and centers, Adam's moments, the best values and gradients.
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

/// float32 numbers a token of a block's graph holds, about: activations and their gradients.
fn graph_width(walk: &Walk<'_>) -> usize {
    let rows = |linear: &Linear| {
        let shape = walk.weights.shape(&format!("{}.weight", linear.path)).unwrap_or(&[]);
        shape.iter().rev().nth(1).copied().unwrap_or(0)
    };
    let block = |block: &mlx_quant_model::decoder::Block| -> usize {
        let routed = block.layers().find_map(|layer| match layer {
            Layer::Moe(moe) => Some(moe.router.top_k),
            _ => None,
        });
        let sites = block.sites();
        let own = sites.iter().filter(|site| site.expert.is_none_or(|expert| expert < routed.unwrap_or(1)));
        let outputs: usize = own.flat_map(|site| &site.readers).map(|linear| rows(linear)).sum();
        // Outputs, what is made of them, and norms and residual sums.
        2 * outputs + 8 * walk.decoder.hidden_size
    };
    walk.decoder.blocks.iter().map(block).max().unwrap_or(0)
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
    let grids = plan.items.iter().map(|item| match &item.job {
        Job::Quantize { view, scheme, .. } if scheme.bits() < 8 => {
            Grid::bytes(view.elements() as u64, scheme.group_size() as u64)
        }
        _ => 0,
    });
    let packed = plan.layout.specs().iter().filter(|spec| spec.name.ends_with(".scales"));
    let packed: u64 = packed.map(|spec| spec.shape.iter().product::<usize>() as u64 * 40).sum();
    let block = walk.block_bytes().into_iter().max().unwrap_or(0);
    let batch = (settings.batch_size as u64).max(threads);
    let state = walk.state_elements() as u64 * 4 * tokens;
    let running = threads.min(batch);
    let tile = tokens * TILE as u64 * 4 * 4 + (TILE * walk.decoder.hidden_size * 4 * 3) as u64;
    let graph = graph_width(&walk) as u64 * tokens * 4;
    // The gradient of one weight at a time.
    let largest = walk
        .weights
        .shapes()
        .filter(|(name, _)| walk.decoder.blocks.iter().any(|block| name.starts_with(&*block.prefix)))
        .map(|(_, shape)| shape.iter().rev().take(2).product::<usize>() as u64 * 4)
        .max()
        .unwrap_or(0);
    let mut memory = DwqMemory {
        grids: grids.sum::<u64>().max(packed),
        block: block + block / 4,
        trail: batch * state * (walk.decoder.blocks.len() as u64 + 4),
        graph: running * (graph + largest).max(tile),
        fixed: resident,
        peak: 0,
    };
    memory.peak = memory.grids + memory.block + memory.trail + memory.graph + memory.fixed;
    Ok(memory)
}

/// Floating-point operations: forward, once more, gradients of inputs and of weights; of the teacher forward once.
///
/// # Errors
/// As [`Walk::open`].
pub fn dwq_operations(
    model: &Model,
    windows: &Windows,
    held_out: &Windows,
    settings: &DwqSettings,
) -> Result<f64, Error> {
    let walk = Walk::open(model)?;
    let a_token = |walk: &Walk<'_>| -> (f64, f64) {
        let matrix = |path: &str| {
            let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]);
            2.0 * shape.iter().rev().take(2).product::<usize>() as f64
        };
        let mut blocks = 0.0;
        for block in &walk.decoder.blocks {
            let routed = block.layers().find_map(|layer| match layer {
                Layer::Moe(moe) => Some(moe.router.top_k),
                _ => None,
            });
            for site in block.sites() {
                if site.expert.is_none_or(|expert| expert < routed.unwrap_or(1)) {
                    blocks += site.readers.iter().map(|reader| matrix(&reader.path)).sum::<f64>();
                }
            }
        }
        (blocks, matrix(walk.head_path()))
    };
    let (blocks, head) = a_token(&walk);
    let trained = (settings.iterations * settings.batch_size * windows.sequence_length) as f64;
    let looks = 11.0 * (held_out.picked.len() * held_out.sequence_length) as f64;
    let taught = ((windows.picked.len() + held_out.picked.len()) * windows.sequence_length) as f64;
    // Of the head twice forward for both, then gradients of both.
    Ok(trained * (4.0 * blocks + 6.0 * head) + looks * (blocks + 4.0 * head) + taught * blocks)
}
