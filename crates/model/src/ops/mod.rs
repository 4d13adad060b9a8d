//! Neural network operations over [`candle_core::Tensor`] in float32, each in two forms.
//!
//! [`Kernels::Plain`] is made of candle's own differentiable operations: it runs on every device and is what
//! the tests compare with. [`Kernels::Fused`] runs on CPU alone, and exists for three reasons: candle's CPU
//! matmul reaches about half of what faer does; candle passes over memory once per elementary operation; and
//! candle's own fused operations drop gradients without a word, where these have a backward.
//!
//! A fused operation runs on its caller's thread and sums in a fixed order, so callers spread windows over
//! threads as they like: the result for a batch is, bit for bit, that of each of its rows alone.
//! (The same machine is meant: faer multiplies differently on AVX2, AVX-512 and NEON.)

#![allow(
    clippy::inline_always,
    reason = "a loop gets the instruction set of its caller only where it is inlined"
)]

mod activation;
mod attention;
mod delta;
pub mod exp;
mod linear;
mod loss;
mod norm;
mod residual;
mod rotary;
mod rows;
pub mod running;
mod slices;
pub mod slopes;
mod trained;

use candle_core::{Device, Result, Tensor};

pub use activation::Activation;
pub use attention::AttentionSettings;
pub use rotary::Pairing;
pub use trained::{Codes, Notebook, Observed, by_group, observed_linear, packed_linear, seeded};

/// Which form of the operations runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// One pass on the caller's thread; tensors on CPU alone.
    Fused,
    /// Candle's own operations; any device.
    Plain,
}

impl Kernels {
    /// Fused on CPU, plain elsewhere.
    pub fn for_device(device: &Device) -> Self {
        if device.is_cpu() { Self::Fused } else { Self::Plain }
    }

    /// `x [.., k] @ weight [n, k]^T (+ bias [n])`, as `[.., n]`.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        linear::check(x, weight, bias)?;
        match self {
            Self::Fused => linear::fused(x, weight, bias),
            Self::Plain => linear::plain(x, weight, bias),
        }
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    ///
    /// `weight` is `[d]`, or `[h, d]` for `x [.., h, d]`: a weight for each head.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn rms_norm(self, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        norm::check(x, weight, "weight of rms_norm")?;
        match self {
            Self::Fused => norm::rms_fused(x, weight, eps),
            Self::Plain => norm::rms_plain(x, weight, eps),
        }
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis.
    ///
    /// `weight` and `bias` are `[d]`, or `[h, d]` for `x [.., h, d]`.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn layer_norm(
        self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        norm::check(x, weight, "weight of layer_norm")?;
        norm::check(x, bias, "bias of layer_norm")?;
        match self {
            Self::Fused => norm::layer_fused(x, weight, bias, eps),
            Self::Plain => norm::layer_plain(x, weight, bias, eps),
        }
    }

    /// `x + factor * y`, tensors of one shape.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn add(self, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
        residual::check(x, y)?;
        match self {
            Self::Fused => residual::fused(x, y, factor),
            Self::Plain => residual::plain(x, y, factor),
        }
    }

    /// Rotates the first `2 * r` features of each head of `x [batch, tokens, heads, d]` by the angles whose
    /// cosines and sines are `cos` and `sin`, both `[tokens, r]`; the other features pass unchanged.
    ///
    /// The fused form has no gradient with respect to the angles.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn rotary(self, x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
        rotary::check(x, cos, sin)?;
        match self {
            Self::Fused => rotary::fused(x, cos, sin, pairing),
            Self::Plain => rotary::plain(x, cos, sin, pairing),
        }
    }

    /// Causal attention: `q [batch, tokens, heads, d]`, `k [batch, tokens, kv_heads, d]`,
    /// `v [batch, tokens, kv_heads, dv]` give `[batch, tokens, heads, dv]`.
    ///
    /// Head `h` reads key and value head `h / (heads / kv_heads)`.
    ///
    /// # Errors
    /// Shapes that do not fit together; a window of no tokens.
    pub fn attention(
        self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        settings: &AttentionSettings,
    ) -> Result<Tensor> {
        attention::Shapes::of(q, k, v, settings)?;
        match self {
            Self::Fused => attention::fused(q, k, v, settings),
            Self::Plain => attention::plain(q, k, v, settings),
        }
    }

    /// The gated delta rule over the tokens of each head, whose state `S [key_dim, value_dim]` begins as zeros:
    /// `S = decay * S`, `S = S + k (beta * (v - S^T k))^T`, `o = S^T q`.
    ///
    /// `q` and `k` `[batch, tokens, heads, key_dim]`, `v [batch, tokens, heads, value_dim]`, `decay` and `beta`
    /// `[batch, tokens, heads]` give `o [batch, tokens, heads, value_dim]`.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn gated_delta(
        self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        beta: &Tensor,
    ) -> Result<Tensor> {
        delta::check(q, k, v, decay, beta)?;
        match self {
            Self::Fused => delta::fused(q, k, v, decay, beta),
            Self::Plain => delta::plain(q, k, v, decay, beta),
        }
    }

    /// `activation(x)`, element by element.
    ///
    /// # Errors
    /// [`Activation::ClampedSwiglu`], which needs two inputs.
    pub fn activate(self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match self {
            Self::Fused => activation::fused(x, activation),
            Self::Plain => activation::plain(x, activation),
        }
    }

    /// `glu(gate) * up`, element by element; for [`Activation::ClampedSwiglu`] as said there.
    ///
    /// # Errors
    /// `gate` and `up` of different shapes.
    pub fn glu(self, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
        activation::check(gate, up)?;
        match self {
            Self::Fused => activation::glu_fused(gate, up, glu),
            Self::Plain => activation::glu_plain(gate, up, glu),
        }
    }

    /// Softmax over the last axis.
    ///
    /// # Errors
    /// A scalar.
    pub fn softmax(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Fused => loss::softmax_fused(x),
            Self::Plain => loss::softmax_plain(x),
        }
    }

    /// `KL(softmax(reference / temperature) || softmax(logits / temperature))` of each row, in nats:
    /// two `[n, vocabulary]` give `[n]`. The gradient is with respect to `logits` alone.
    ///
    /// # Errors
    /// Shapes that differ or are not matrices.
    pub fn kl_divergence(self, reference: &Tensor, logits: &Tensor, temperature: f64) -> Result<Tensor> {
        loss::check(reference, logits)?;
        match self {
            Self::Fused => loss::kl_fused(reference, logits, temperature),
            Self::Plain => loss::kl_plain(reference, logits, temperature),
        }
    }
}
