//! The causal convolution that several mixers have.

use mlx_quant_engine::{LAST, REST, Result, Tensor};

/// Causal convolution of each channel with a kernel of its own: `y[t] = sum over j of w[.., j] * x[t - kernel + 1 + j]`.
///
/// `x` `[batch, tokens, channels]`, `weight` `[channels, kernel, 1]` as MLX stores it; before the first token lie zeros.
pub(crate) fn causal_convolution(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, tokens, channels) = x.dims3()?;
    let weight = weight.reshape((channels, REST))?;
    let kernel = weight.dim(LAST)?;
    if kernel == 0 {
        return Err(mlx_quant_engine::Error::msg("a convolution without a kernel"));
    }
    let padded = x.pad_with_zeros(1, kernel - 1, 0)?;
    let mut sum: Option<Tensor> = None;
    for tap in 0..kernel {
        let part =
            padded.narrow(1, tap, tokens)?.broadcast_mul(&weight.narrow(1, tap, 1)?.reshape(channels)?)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => (sum + part)?,
        });
    }
    let sum = sum.ok_or_else(|| mlx_quant_engine::Error::msg("a convolution without a kernel"))?;
    match bias {
        None => Ok(sum),
        Some(bias) => sum.broadcast_add(bias),
    }
}
