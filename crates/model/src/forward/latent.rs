//! Multi-head latent attention, computed.

use mlx_quant_engine::{AttentionSettings, LAST, REST, Result, Tensor};

use super::pass::Pass;
use crate::decoder::{LatentAttention, LatentKeys, LatentQueries};
use crate::parameters::Parameters;

impl LatentAttention {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        // Queries, keys and values are gone when a calibrating walk waits here with all its windows.
        let output = self.attend(pass, x).await?;
        Ok(pass.read(&[&self.output], &output).await?.remove(0))
    }

    /// What heads make of their values, `[batch, tokens, heads * value]`.
    async fn attend(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let (q, down) = match &self.queries {
            LatentQueries::Direct(linear) => {
                let mut read = pass.read(&[linear, &self.down], x).await?;
                (read.remove(0), read.remove(0))
            }
            LatentQueries::LowRank { down, norm, up } => {
                let mut read = pass.read(&[down, &self.down], x).await?;
                let latent = pass.norm(norm, &read.remove(0))?;
                (pass.read(&[up], &latent).await?.remove(0), read.remove(0))
            }
        };
        let q = q.reshape((batch, tokens, self.heads, self.nope + self.rope))?;
        let mut q = match self.table {
            Some(table) => {
                let rotated = pass.rotate(&q.narrow(3, self.nope, self.rope)?, table)?;
                Tensor::cat(&[&q.narrow(3, 0, self.nope)?, &rotated], 3)?
            }
            None => q,
        };
        if let Some(scaling) = &self.query_scaling {
            q = q.broadcast_mul(&scaling.factors(tokens, &q)?)?;
        }

        let latent = pass.norm(&self.norm, &down.narrow(2, 0, self.rank)?)?; // [b, t, rank]
        let shared = down.narrow(2, self.rank, self.rope)?.reshape((batch, tokens, 1, self.rope))?;
        let shared = match self.table {
            Some(table) => pass.rotate(&shared, table)?,
            None => shared,
        };
        let shared = shared.broadcast_as((batch, tokens, self.heads, self.rope))?;
        let (k, v) = self.expand(pass, &latent).await?;
        let k = Tensor::cat(&[&k, &shared], 3)?;

        let settings =
            AttentionSettings { scale: self.scale as f32, window: None, softcap: None, sinks: None };
        let output = pass.engine.attention(&q, &k, &v, &settings)?;
        output.reshape((batch, tokens, self.heads * self.value))
    }

    /// Where keys and values are made by matrices that lie between heads: their modules, and the linears that they amount to,
    /// `[heads * nope, rank]` and `[heads * value, rank]`. Readers of these modules stand in for the linears.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn expansions(&self, parameters: &Parameters) -> Result<Vec<(String, Tensor)>> {
        let LatentKeys::Split { embed_q, unembed_out } = &self.keys else { return Ok(Vec::new()) };
        let module = |name: &str| name.strip_suffix(".weight").unwrap_or(name).to_owned();
        let keys = parameters.tensor(embed_q)?.transpose(1, 2)?;
        let keys = keys.reshape((self.heads * self.nope, self.rank))?;
        let values = parameters.tensor(unembed_out)?.reshape((self.heads * self.value, self.rank))?;
        Ok(vec![(module(embed_q), keys), (module(unembed_out), values)])
    }

    /// Keys without rotation `[batch, tokens, heads, nope]` and values `[batch, tokens, heads, value]`.
    async fn expand(&self, pass: &mut Pass<'_>, latent: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, tokens, _) = latent.dims3()?;
        let by_head = |x: Tensor| x.reshape((batch, tokens, self.heads, REST));
        match &self.keys {
            LatentKeys::Joint(linear) => {
                let both = by_head(pass.read(&[linear], latent).await?.remove(0))?;
                Ok((both.narrow(LAST, 0, self.nope)?, both.narrow(LAST, self.nope, self.value)?))
            }
            LatentKeys::Split { .. } => {
                let mut expanded = self.expansions(pass.parameters)?.into_iter().map(|(path, weight)| {
                    by_head(match pass.parameters.reader(&path) {
                        Some(reader) => reader.read(latent, None, None)?,
                        None => pass.engine.linear(latent, &weight, None)?,
                    })
                });
                let missing = || mlx_quant_engine::Error::msg("latent attention has no expansions");
                let mut next = || expanded.next().unwrap_or_else(|| Err(missing()));
                Ok((next()?, next()?))
            }
        }
    }
}
