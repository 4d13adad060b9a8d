//! How much memory an evaluation will need, from headers alone.

use super::EvaluationSettings;
use super::head::TILE;
use crate::Error;
use crate::data::Windows;
use crate::walk::{Residency, Walk};
use crate::{Model, threads_or_all};

/// What the resident memory of an evaluation is made of, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// Blocks in float32: the largest, or all of them.
    pub blocks: u64,
    /// Activations of a wave of windows between blocks, and final states.
    pub states: u64,
    /// What threads hold within a block.
    pub scratch: u64,
    /// Tiles of heads and logits.
    pub head: u64,
    /// The program, headers, tokens.
    pub fixed: u64,
    /// The largest sum at any time.
    pub peak: u64,
}

/// Predicts the peak resident memory of [`super::evaluate`].
///
/// # Errors
/// As [`Walk::open`].
pub fn memory(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
) -> Result<Memory, Error> {
    let threads = threads_or_all(settings.threads) as u64;
    let (tokens, count) = (windows.sequence_length as u64, windows.picked.len() as u64);
    let mut sum = Memory { blocks: 0, states: 0, scratch: 0, head: 0, fixed: 0, peak: 0 };
    // What earlier parts of the work have left: resident blocks, final states.
    let (mut left, mut walking) = (0, 0);
    for model in reference.into_iter().chain([model]) {
        let walk = Walk::open(model)?;
        let (blocks, hidden) = (walk.block_bytes(), walk.decoder.hidden_size as u64);
        let wave = (walk.wave(windows.sequence_length) as u64).min(count);
        let resident = walk.residency(settings.low_memory, windows) == Residency::Resident;
        let held = if resident { blocks.iter().sum() } else { blocks.iter().copied().max().unwrap_or(0) };
        let states = wave * tokens * walk.state_elements() as u64 * 4;
        let finals = count * tokens * hidden * 4;
        let scratch = walk.scratch_bytes(windows.sequence_length) * threads.min(wave);
        walking = walking.max(left + held + states.max(finals) + scratch);
        left += finals + if resident { held } else { 0 };
        sum.blocks = sum.blocks.max(held);
        sum.states += finals;
        sum.scratch = sum.scratch.max(scratch);
        sum.head += 2 * TILE as u64 * hidden * 4 + threads * 2 * tokens * TILE as u64 * 4;
    }
    sum.fixed = (24 << 20) + model.checkpoint.tensors().len() as u64 * 2_000;
    sum.peak = sum.fixed + walking.max(left + sum.head);
    Ok(sum)
}
