//! Opening a checkpoint and running it.

use std::path::Path;

use mlx_quant::Model;
use mlx_quant::model::{Decoder, Forward, Tap, Weights};
use safetensors::SafeTensors;

use crate::common::open_path;

pub(crate) fn open(directory: &Path) -> Model {
    open_path(directory).unwrap()
}

/// The oracle's windows, all of one length.
pub(crate) fn windows(directory: &Path) -> Vec<Vec<u32>> {
    let bytes = std::fs::read(directory.join("oracle.safetensors")).unwrap();
    let oracle = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = oracle.tensor("tokens").unwrap();
    let id = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    let ids: Vec<u32> = tokens.data().chunks_exact(4).map(id).collect();
    ids.chunks_exact(tokens.shape()[1]).map(<[u32]>::to_vec).collect()
}

pub(crate) fn slices(windows: &[Vec<u32>]) -> Vec<&[u32]> {
    windows.iter().map(Vec::as_slice).collect()
}

/// What an error says.
pub(crate) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Logits of windows of one length, row-major, as the fused kernels make them.
pub(crate) fn run(
    weights: &Weights<'_>,
    decoder: &Decoder,
    windows: &[&[u32]],
    tap: &mut dyn Tap,
) -> Result<Vec<f32>, String> {
    let device = mlx_quant_engine::cpu();
    let forward = Forward::new(decoder, windows[0].len(), &device).map_err(text)?;
    let mut state = forward.embed(weights, windows).map_err(text)?;
    for (index, block) in decoder.blocks.iter().enumerate() {
        let parameters = weights.load(&block.prefix, &device).map_err(text)?;
        state = forward.block(index, &parameters, state, tap).map_err(text)?;
    }
    let last = weights.load_last(decoder, &device).map_err(text)?;
    let hidden = forward.finish(&last, &state).map_err(text)?;
    let logits = forward.logits(&last, &hidden).map_err(text)?;
    logits.to_vec().map_err(text)
}

/// Opens, describes and runs a model.
pub(crate) fn logits(model: &Model, windows: &[&[u32]]) -> Result<Vec<f32>, String> {
    let weights = Weights::open(&model.checkpoint, &model.config).map_err(text)?;
    let decoder = weights.decoder(&model.config, false).map_err(text)?;
    run(&weights, &decoder, windows, &mut ())
}

/// Position of the first element whose bits differ.
pub(crate) fn first_difference(a: &[f32], b: &[f32]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())
}
