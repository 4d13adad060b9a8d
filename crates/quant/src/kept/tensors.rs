//! Tensors of the engine as arrays of a file, and back. The rest of this module knows no engine.

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Array, Arrays};
use mlx_quant_engine::{Device, Error, Result, Tensor};

/// Tensors as arrays.
///
/// # Errors
/// If the device does not answer.
pub(crate) fn from_tensors(
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<BTreeMap<String, Array<'static>>> {
    let array = |(name, tensor): (String, Tensor)| Ok((name, Array::new(tensor.dims(), tensor.to_vec()?)));
    tensors.into_iter().map(array).collect()
}

/// Arrays as tensors.
///
/// # Errors
/// Another dtype than float32; a device without room.
pub(crate) fn to_tensors(arrays: Arrays<'static>, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let tensor = |(name, array): (String, Array<'static>)| {
        let shape = array.shape.clone();
        let values = array.into_f32().ok_or_else(|| Error::msg(format!("{name} is not float32")))?;
        Ok((name, Tensor::from_vec(values, shape, device)?))
    };
    arrays.into_iter().map(tensor).collect()
}
