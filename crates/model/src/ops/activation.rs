//! Activations and gated linear units in one pass over memory.

use candle_core::{Result, Tensor, bail};

/// An elementwise function of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x` times the normal distribution function of `x`.
    Gelu,
    /// The approximation of [`Activation::Gelu`] with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x`.
    Identity,
    /// gpt-oss, of a gate and an up: `gate * sigmoid(alpha * gate) * (up + 1)`, with the gate clamped to at most
    /// `limit` and up to `-limit..=limit`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of the inputs.
        limit: f32,
    },
}

pub(super) fn check(gate: &Tensor, up: &Tensor) -> Result<()> {
    if gate.dims() == up.dims() {
        return Ok(());
    }
    bail!("glu: gate {:?} and up {:?} differ", gate.dims(), up.dims())
}

fn plain_sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

pub(super) fn plain(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu()?.sqr(),
        Activation::Sigmoid => plain_sigmoid(x),
        Activation::Softplus => x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?,
        Activation::Identity => Ok(x.clone()),
        Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"),
    }
}

pub(super) fn glu_plain(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    if let Activation::ClampedSwiglu { alpha, limit } = glu {
        let gate = gate.minimum(f64::from(limit))?;
        let up = up.clamp(-limit, limit)?;
        return (&gate * plain_sigmoid(&(&gate * f64::from(alpha))?)?)? * (up + 1.0)?;
    }
    plain(gate, glu)? * up
}

pub(super) fn fused(x: &Tensor, activation: Activation) -> Result<Tensor> {
    plain(x, activation)
}

pub(super) fn glu_fused(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    glu_plain(gate, up, glu)
}
