//! Softmax and the divergence of two rows of logits.

use candle_core::{D, Result, Tensor, bail};

pub(super) fn check(reference: &Tensor, logits: &Tensor) -> Result<()> {
    if reference.dims() == logits.dims() && logits.rank() == 2 {
        return Ok(());
    }
    bail!("kl_divergence: reference {:?} and logits {:?}", reference.dims(), logits.dims())
}

/// `x` less its largest of each row, which takes no part in the gradient.
fn below_largest(x: &Tensor) -> Result<Tensor> {
    x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)
}

pub(super) fn softmax_plain(x: &Tensor) -> Result<Tensor> {
    let exponentials = below_largest(x)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

fn log_softmax_plain(x: &Tensor) -> Result<Tensor> {
    let x = below_largest(x)?;
    x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

pub(super) fn kl_plain(reference: &Tensor, logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let reference = log_softmax_plain(&(reference.detach() / temperature)?)?;
    let logits = log_softmax_plain(&(logits / temperature)?)?;
    (reference.exp()? * (reference - logits)?)?.sum(D::Minus1)
}

pub(super) fn softmax_fused(x: &Tensor) -> Result<Tensor> {
    softmax_plain(x)
}

pub(super) fn kl_fused(reference: &Tensor, logits: &Tensor, temperature: f64) -> Result<Tensor> {
    kl_plain(reference, logits, temperature)
}
