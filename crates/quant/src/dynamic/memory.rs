//! How much memory and arithmetic a measurement needs, from headers alone.

use serde::Serialize;

use super::candidates::{ELEMENTS, all};
use super::observe::observed_paths;
use crate::data::Windows;
use crate::walks::Walk;
use crate::walks::{a_token, backward_bytes};
use crate::{Error, Model, threads_or_all};

/// Candidates of the searched grid, operations for each weight.
const SEARCH: f64 = 53.0 * 8.0;

/// What the resident memory of a measurement is made of, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SensitivityMemory {
    /// A block in float32, while it is read and used.
    pub block: u64,
    /// What windows leave in front of each block, and their gradients.
    pub trail: u64,
    /// What threads hold: a block's graph each, or a tile of logits.
    pub graph: u64,
    /// What the process holds already.
    pub fixed: u64,
    /// Of all.
    pub peak: u64,
}

/// Windows that are under way together, at most.
pub(crate) fn windows_together(
    walk: &Walk<'_>,
    windows: &Windows,
    threads: usize,
    low_memory: bool,
) -> usize {
    walk.trail(windows.sequence_length, threads, low_memory).min(windows.picked.len())
}

/// Predicts the peak resident memory of [`super::sensitivities`] in a process that holds `resident` bytes, and the floating-point
/// operations of measuring and of judging candidates.
///
/// # Errors
/// As [`Walk::open`].
pub fn sensitivity_needs(
    model: &Model,
    windows: &Windows,
    threads: usize,
    low_memory: bool,
    resident: u64,
) -> Result<(SensitivityMemory, f64, f64), Error> {
    let walk = Walk::open(model)?;
    let threads = threads_or_all(threads);
    let tokens = windows.sequence_length as u64;
    let together = windows_together(&walk, windows, threads, low_memory);
    let (trail, graph) = backward_bytes(&walk, tokens, together, threads);
    let mut memory = SensitivityMemory {
        block: walk.block_bytes().into_iter().max().unwrap_or(0),
        trail,
        graph,
        fixed: resident,
        peak: 0,
    };
    memory.peak = memory.block + memory.trail + memory.graph + memory.fixed;
    let (blocks, head) = a_token(&walk, windows.sequence_length);
    // Forward, once more, gradients of inputs; of the head twice forward.
    let passed = (windows.picked.len() * windows.sequence_length) as f64;
    let measure = passed * (3.0 * blocks + 3.0 * head);
    let mut judge = 0.0;
    for (_, shape) in observed_paths(&walk) {
        let columns = shape.last().copied().unwrap_or(0);
        let judged =
            shape.iter().product::<usize>().min(ELEMENTS * shape.iter().rev().skip(2).product::<usize>());
        judge += judged as f64 * SEARCH * all(columns).count() as f64;
    }
    Ok((memory, measure, judge))
}
