//! The gated delta net of Qwen3-Next and Qwen 3.5: linear attention whose state is corrected towards each new value.
//!
//! For every head, with keys and queries of unit length: `S = decay * S`, `S += k (beta * (v - S^T k))^T`, `o = S^T q`.
//! Source: arXiv 2412.06464; the layout is `transformers`' `modeling_qwen3_next.py`.

use mlx_quant_engine::{Activation, LAST, REST, Result, Tensor};

use super::causal_convolution;
use crate::decoder::{Linear, Norm};
use crate::forward::Pass;

/// The linears that read the layer's input.
#[derive(Clone, Debug, PartialEq)]
pub enum DeltaProjections {
    /// Qwen3-Next: for each key head q, k, v, z, and for each key head b, a.
    Grouped {
        /// `hidden -> 2 * keys + 2 * values`.
        qkvz: Linear,
        /// `hidden -> 2 * value heads`.
        ba: Linear,
    },
    /// Qwen 3.5: q, k, v of all heads in a row; the rest apart.
    Separate {
        /// `hidden -> 2 * keys + values`.
        qkv: Linear,
        /// `hidden -> values`.
        z: Linear,
        /// `hidden -> value heads`.
        b: Linear,
        /// `hidden -> value heads`.
        a: Linear,
    },
}

impl DeltaProjections {
    /// In the order in which they read.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Grouped { qkvz, ba } => vec![qkvz, ba],
            Self::Separate { qkv, z, b, a } => vec![qkv, z, b, a],
        }
    }
}

/// A gated delta net.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; each key head serves `value_heads / key_heads`.
    pub value_heads: usize,
    /// Features of a key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
    /// Input.
    pub projections: DeltaProjections,
    /// Module of the convolution, `[2 * keys + values, kernel, 1]`.
    pub convolution: String,
    /// Tensor `[value_heads]` added to a.
    pub dt_bias: String,
    /// Tensor `[value_heads]`, logarithm of the decay rate.
    pub decay_log: String,
    /// Of each head's output, before its gate.
    pub norm: Norm,
    /// `values -> hidden`.
    pub output: Linear,
}

/// Projections of the input: q, k, v `[batch, tokens, 2 * keys + values]`; z `[batch, tokens, value_heads, value_dim]`;
/// b and a `[batch, tokens, value_heads]`.
struct Projected {
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
}

impl DeltaNet {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let &Self { key_heads, value_heads, key_dim, value_dim, .. } = self;
        let keys = key_heads * key_dim;
        let Projected { qkv, z, b, a } = self.project(pass, x).await?;
        let kernel = pass.parameters.tensor(&format!("{}.weight", self.convolution))?;
        let qkv = pass.engine.activate(&causal_convolution(&qkv, kernel, None)?, Activation::Silu)?;
        let by_head = |start, heads: usize, dim: usize| {
            qkv.narrow(2, start, heads * dim)?.reshape((batch, tokens, heads, dim))
        };
        let q =
            self.for_value_heads(&(unit(&by_head(0, key_heads, key_dim)?)? / (key_dim as f64).sqrt())?)?;
        let k = self.for_value_heads(&unit(&by_head(keys, key_heads, key_dim)?)?)?;
        let v = by_head(2 * keys, value_heads, value_dim)?;

        let beta = pass.engine.activate(&b, Activation::Sigmoid)?;
        let step = a.broadcast_add(pass.parameters.tensor(&self.dt_bias)?)?;
        let step = pass.engine.activate(&step, Activation::Softplus)?;
        let decay = step.broadcast_mul(&pass.parameters.tensor(&self.decay_log)?.exp()?)?.neg()?.exp()?;

        let output = pass.engine.gated_delta(&q, &k, &v, &decay, &beta)?; // [b, t, value_heads, value_dim]
        let normed = pass.norm(&self.norm, &output)?;
        let gated = pass.engine.glu(&z, &normed, Activation::Silu)?;
        let gated = gated.reshape((batch, tokens, value_heads * value_dim))?;
        Ok(pass.read(&[&self.output], &gated).await?.remove(0))
    }

    /// Each key head repeated for the value heads that it serves.
    fn for_value_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, heads, dim) = x.dims4()?;
        let times = self.value_heads / self.key_heads;
        x.unsqueeze(3)?.broadcast_as([batch, tokens, heads, times, dim])?.reshape((
            batch,
            tokens,
            heads * times,
            dim,
        ))
    }

    async fn project(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Projected> {
        let (batch, tokens, _) = x.dims3()?;
        let &Self { key_heads, value_heads, key_dim, value_dim, .. } = self;
        let heads = |x: &Tensor| x.reshape((batch, tokens, value_heads, value_dim));
        let mut read = pass.read(&self.projections.linears(), x).await?.into_iter();
        let mut next = || read.next().ok_or_else(|| mlx_quant_engine::Error::msg("a projection is missing"));
        if let DeltaProjections::Separate { .. } = self.projections {
            return Ok(Projected { qkv: next()?, z: heads(&next()?)?, b: next()?, a: next()? });
        }
        let served = value_heads / key_heads;
        let values = served * value_dim;
        let qkvz = next()?.reshape((batch, tokens, key_heads, 2 * key_dim + 2 * values))?;
        let ba = next()?.reshape((batch, tokens, key_heads, 2 * served))?;
        let flat = |x: Tensor| x.reshape((batch, tokens, REST));
        let (q, k) = (qkvz.narrow(3, 0, key_dim)?, qkvz.narrow(3, key_dim, key_dim)?);
        let (v, z) = (qkvz.narrow(3, 2 * key_dim, values)?, qkvz.narrow(3, 2 * key_dim + values, values)?);
        let qkv = Tensor::cat(&[flat(q)?, flat(k)?, flat(v)?], 2)?;
        let (b, a) = (flat(ba.narrow(3, 0, served)?)?, flat(ba.narrow(3, served, served)?)?);
        Ok(Projected { qkv, z: heads(&z)?, b, a })
    }
}

/// x / sqrt(sum(x^2) + 1e-6) over the last axis.
fn unit(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(LAST)? + 1e-6)?.sqrt()?)
}
