//! The gated delta net, computed.

use mlx_quant_engine::{Activation, LAST, REST, Result, Tensor};

use super::causal::causal_convolution;
use super::pass::Pass;
use crate::decoder::{DeltaNet, DeltaProjections};

/// Projections of the input: q, k, v `[batch, tokens, 2 * keys + values]`; z `[batch, tokens, value_heads, value_dim]`;
/// b `[batch, tokens, value_heads]`; a the same, or `[batch, tokens, keys]`.
struct Projected {
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
}

impl DeltaNet {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        // Everything else is gone when a calibrating walk waits here with all its windows.
        let gated = self.mix(pass, x).await?;
        Ok(pass.read(&[&self.output], &gated).await?.remove(0))
    }

    /// The gated output of all heads, `[batch, tokens, value_heads * value_dim]`.
    async fn mix(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let &Self { key_heads, value_heads, key_dim, value_dim, .. } = self;
        let keys = key_heads * key_dim;
        let Projected { qkv, z, b, a } = self.project(pass, x).await?;
        let kernels = self.convolutions.iter().map(|path| pass.parameters.tensor(&format!("{path}.weight")));
        let kernel = Tensor::cat(&kernels.collect::<Result<Vec<_>>>()?, 0)?;
        let qkv = pass.engine.activate(&causal_convolution(&qkv, &kernel, None)?, Activation::Silu)?;
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
        let rate = pass.parameters.tensor(&self.decay_log)?.exp()?;
        let rates = if self.decays_by_feature() {
            step.reshape((batch, tokens, value_heads, key_dim))?
                .broadcast_mul(&rate.reshape((value_heads, 1))?)?
        } else {
            step.broadcast_mul(&rate)?
        };
        let decay = rates.neg()?.exp()?;

        let output = pass.engine.gated_delta(&q, &k, &v, &decay, &beta)?; // [b, t, value_heads, value_dim]
        let normed = pass.norm(&self.norm, &output)?;
        let gated = pass.engine.glu(&z, &normed, self.gate)?;
        gated.reshape((batch, tokens, value_heads * value_dim))
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
        if let DeltaProjections::LowRank { a: [_, a_up], z: [_, z_up], .. } = &self.projections {
            let qkv = Tensor::cat(&[next()?, next()?, next()?], 2)?;
            let (b, a, z) = (next()?, next()?, next()?);
            let a = pass.read(&[a_up], &a).await?.remove(0);
            let z = pass.read(&[z_up], &z).await?.remove(0);
            return Ok(Projected { qkv, z: heads(&z)?, b, a });
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
