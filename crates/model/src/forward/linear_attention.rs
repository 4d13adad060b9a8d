//! Mamba 2 and lightning attention, computed.

use mlx_quant_engine::{Activation, LAST, REST, Result, Tensor};

use super::causal::causal_convolution;
use super::pass::{Pass, scaled};
use crate::decoder::{GroupNorm, LightningAttention, Mamba};

impl Pass<'_> {
    /// Over each group of the last axis.
    fn group_norm(&self, norm: &GroupNorm, x: &Tensor) -> Result<Tensor> {
        let width = x.dim(LAST)?;
        let by_group = |x: &Tensor| {
            let front = &x.dims()[..x.rank() - 1];
            x.reshape([front, &[norm.groups, width / norm.groups]].concat())
        };
        let weight = norm.norm.path.as_ref().map(|path| self.parameters.tensor(&format!("{path}.weight")));
        let weight = weight.transpose()?.map(by_group).transpose()?;
        self.engine.rms_norm(&by_group(x)?, weight.as_ref(), norm.norm.epsilon)?.reshape(x.dims())
    }
}

impl Mamba {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        // Everything else is gone when a calibrating walk waits here with all its windows.
        let gated = self.mix(pass, x).await?;
        Ok(pass.read(&[&self.output], &gated).await?.remove(0))
    }

    /// The gated output of all heads, `[batch, tokens, heads * head_dim]`.
    async fn mix(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let (values, convolved) = (self.values(), self.convolved());
        let projected = pass.read(&[&self.input], x).await?.remove(0);
        let gate = projected.narrow(2, 0, values)?;
        let kernel = pass.parameters.tensor(&format!("{}.weight", self.convolution))?;
        let bias = pass.parameters.get(&format!("{}.bias", self.convolution));
        let mixed = causal_convolution(&projected.narrow(2, values, convolved)?, kernel, bias)?;
        let mixed = pass.engine.activate(&mixed, Activation::Silu)?;
        let of_group = |start| {
            let part = mixed.narrow(2, start, self.groups * self.state)?;
            part.reshape((batch, tokens, self.groups, self.state))
        };
        let (keys, queries) = (of_group(values)?, of_group(values + self.groups * self.state)?);
        let value = mixed.narrow(2, 0, values)?.reshape((batch, tokens, self.heads, self.head_dim))?;

        let step = projected.narrow(2, values + convolved, self.heads)?;
        let step = step.broadcast_add(pass.parameters.tensor(&self.step_bias)?)?;
        let [least, most] = self.step_limits;
        let step = pass.engine.activate(&step, Activation::Softplus)?.clamp(least, most)?;
        let rate = pass.parameters.tensor(&self.decay_log)?.exp()?.neg()?;
        let log_decay = step.broadcast_mul(&rate)?;
        let stepped = value.broadcast_mul(&step.unsqueeze(3)?)?;
        let read = pass.engine.linear_attention(&queries, &keys, &stepped, &log_decay)?; // [b, t, heads, head_dim]
        let skip = pass.parameters.tensor(&self.skip)?.reshape((self.heads, 1))?;
        let output = (read + value.broadcast_mul(&skip)?)?.reshape((batch, tokens, values))?;
        self.gated(pass, &gate, output)
    }

    fn gated(&self, pass: &Pass<'_>, gate: &Tensor, output: Tensor) -> Result<Tensor> {
        let gated = |output: &Tensor| pass.engine.glu(gate, output, Activation::Silu);
        match &self.norm {
            None => gated(&output),
            Some(norm) if self.gate_last => gated(&pass.group_norm(norm, &output)?),
            Some(norm) => pass.group_norm(norm, &gated(&output)?),
        }
    }
}

impl LightningAttention {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let gated = self.mix(pass, x).await?;
        Ok(pass.read(&[&self.output], &gated).await?.remove(0))
    }

    /// The gated output of all heads, `[batch, tokens, heads * head_dim]`.
    async fn mix(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let &Self { heads, head_dim, .. } = self;
        let mut read = pass.read(&[&self.projection, &self.gate], x).await?;
        let gate = read.remove(1);
        let all = read.remove(0).reshape((batch, tokens, 3 * heads, head_dim))?;
        let [mut q, mut k] = [all.narrow(2, 0, heads)?, all.narrow(2, heads, heads)?];
        if let Some(norms) = &self.norms {
            q = pass.norm(&norms.q, &q)?;
            if let Some(norm) = &norms.k {
                k = pass.norm(norm, &k)?;
            }
        }
        let q = scaled(pass.rotate(&q, self.rope)?, self.scale)?;
        let k = pass.rotate(&k, self.rope)?;
        let v = all.narrow(2, 2 * heads, heads)?;
        let decays = Tensor::from_slice(&self.log_decays, heads, x.device())?;
        let output =
            pass.engine.linear_attention(&q, &k, &v, &decays.broadcast_as((batch, tokens, heads))?)?;
        let output = pass.group_norm(&self.norm, &output.reshape((batch, tokens, REST))?)?;
        pass.engine.glu(&gate, &output, Activation::Sigmoid)
    }
}
