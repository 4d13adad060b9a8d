//! Tensors of the engine as arrays of a file, and back. All there is of the engine in what is kept.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};
use mlx_format::checkpoint::{Array, Arrays};

/// Tensors of float32.
///
/// # Errors
/// Another dtype.
pub(crate) fn from_candle(
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<BTreeMap<String, Array<'static>>> {
    let array = |(name, tensor): (String, Tensor)| {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        Ok((name, Array::new(tensor.dims(), values)))
    };
    tensors.into_iter().map(array).collect()
}

/// The same back.
///
/// # Errors
/// Another dtype.
pub(crate) fn to_candle(arrays: Arrays<'static>) -> Result<BTreeMap<String, Tensor>> {
    let tensor = |(name, array): (String, Array<'static>)| {
        let shape = array.shape.clone();
        let values =
            array.into_f32().ok_or_else(|| candle_core::Error::msg(format!("{name} is not float32")))?;
        Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?))
    };
    arrays.into_iter().map(tensor).collect()
}
