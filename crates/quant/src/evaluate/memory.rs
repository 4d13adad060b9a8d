//! How much memory an evaluation will need, from headers alone.

use mlx_format::checkpoint::Directory;

use super::EvaluationSettings;
use crate::Error;
use crate::data::Windows;
use crate::walks::{Residency, Walk, tile_rows};
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
    /// What the process holds already: program, headers, tokenizer, tokens; and weights embedded in it.
    pub fixed: u64,
    /// The largest sum at any time.
    pub peak: u64,
}

/// Predicts the peak resident memory of [`super::evaluate`] in a process that holds `resident` bytes now.
///
/// # Errors
/// As [`Walk::open`].
pub fn memory(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
    resident: u64,
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
        let stays = walk.residency(settings.low_memory, windows) == Residency::Resident;
        let held = if stays { blocks.iter().sum() } else { blocks.iter().copied().max().unwrap_or(0) };
        let states = wave * tokens * walk.state_elements() as u64 * 4;
        let finals = count * tokens * hidden * 4;
        let scratch = walk.scratch_bytes(windows.sequence_length) * threads.min(wave);
        walking = walking.max(left + held + states.max(finals) + scratch);
        left += finals + if stays { held } else { 0 };
        sum.blocks = sum.blocks.max(held);
        sum.states += finals;
        sum.scratch = sum.scratch.max(scratch);
        let rows = tile_rows(&walk.device) as u64;
        sum.head += 2 * rows * hidden * 4 + threads * 2 * tokens * rows * 4;
    }
    let embedded = |model: &Model| match model.checkpoint.directory() {
        // Part of the program: its pages cannot be given back.
        Directory::Embedded { .. } => {
            model.checkpoint.tensors().values().map(|tensor| tensor.bytes() as u64).sum()
        }
        Directory::Path(_) => 0,
    };
    sum.fixed = resident + reference.into_iter().chain([model]).map(embedded).sum::<u64>();
    sum.peak = sum.fixed + walking.max(left + sum.head);
    Ok(sum)
}

/// Floating-point operations of [`super::evaluate`] with a reference, about.
///
/// # Errors
/// As [`Walk::open`].
pub(crate) fn operations(model: &Model, windows: &Windows) -> Result<f64, Error> {
    let (blocks, head) = crate::walks::a_token(&Walk::open(model)?, windows.sequence_length);
    Ok(2.0 * (windows.picked.len() * windows.sequence_length) as f64 * (blocks + head))
}
