//! Opening a checkpoint and running it.

use std::path::Path;

use candle_core::Device;
use mlx_quant::Model;
use mlx_quant::model::{Decoder, Forward, Tap, Weights, WeightsError};
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

/// Logits of windows of one length, row-major, as the fused kernels make them.
pub(crate) fn run(
    weights: &Weights<'_>,
    decoder: &Decoder,
    windows: &[&[u32]],
    tap: &mut dyn Tap,
) -> Result<Vec<f32>, WeightsError> {
    let device = Device::Cpu;
    let forward = Forward::new(decoder, windows[0].len(), &device)?;
    let mut state = forward.embed(weights, windows)?;
    for (index, block) in decoder.blocks.iter().enumerate() {
        let parameters = weights.load(&block.prefix, &device)?;
        state = forward.block(index, &parameters, state, tap)?;
    }
    let last = weights.load_last(decoder, &device)?;
    let logits = forward.logits(&last, &forward.finish(&last, &state)?)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// Opens, describes and runs a model.
pub(crate) fn logits(model: &Model, windows: &[&[u32]]) -> Result<Vec<f32>, WeightsError> {
    let weights = Weights::open(&model.checkpoint, &model.config)?;
    let decoder = weights.decoder(&model.config)?;
    run(&weights, &decoder, windows, &mut ())
}

/// Position of the first element whose bits differ.
pub(crate) fn first_difference(a: &[f32], b: &[f32]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())
}
