//! DeepSeek's multi-head latent attention: keys and values of all heads are made from one small latent vector a token.
//!
//! Computed as mlx-lm does for many tokens at once: the latent is expanded to keys and values of every head. A rotated
//! part that all heads share is appended to the keys. Source: arXiv 2405.04434, section 2.1.

use mlx_quant_engine::{AttentionSettings, LAST, REST, Result, Tensor};

use crate::decoder::{Linear, Norm};
use crate::forward::Pass;
use crate::parameters::Parameters;

/// How queries are made.
#[derive(Clone, Debug, PartialEq)]
pub enum LatentQueries {
    /// `hidden -> heads * (nope + rope)`.
    Direct(Linear),
    /// Through a latent vector of their own.
    LowRank {
        /// `hidden -> rank`.
        down: Linear,
        /// Of the latent vector.
        norm: Norm,
        /// `rank -> heads * (nope + rope)`.
        up: Linear,
    },
}

/// How the latent vector becomes keys and values.
#[derive(Clone, Debug, PartialEq)]
pub enum LatentKeys {
    /// `rank -> heads * (nope + value)`, keys before values in each head.
    Joint(Linear),
    /// Split and, for keys, transposed, as MLX stores DeepSeek V3.
    Split {
        /// Tensor `[heads, rank, nope]`: from a query's part without rotation into the latent space.
        embed_q: String,
        /// Tensor `[heads, value, rank]`.
        unembed_out: String,
    },
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentAttention {
    /// Heads.
    pub heads: usize,
    /// Features of a query and key head without rotation.
    pub nope: usize,
    /// Features with rotation, shared by the keys of all heads.
    pub rope: usize,
    /// Features of a value head.
    pub value: usize,
    /// Features of the latent vector.
    pub rank: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Queries.
    pub queries: LatentQueries,
    /// `hidden -> rank + rope`.
    pub down: Linear,
    /// Of the latent vector.
    pub norm: Norm,
    /// Keys and values.
    pub keys: LatentKeys,
    /// `heads * value -> hidden`.
    pub output: Linear,
    /// Index of the rotary embedding.
    pub table: usize,
}

impl LatentAttention {
    /// Linears by what they read; `true` for the layer's input.
    pub(crate) fn sites(&self) -> Vec<(bool, Vec<&Linear>)> {
        let mut sites = Vec::new();
        match &self.queries {
            LatentQueries::Direct(linear) => sites.push((true, vec![linear, &self.down])),
            LatentQueries::LowRank { down, up, .. } => {
                sites.push((true, vec![down, &self.down]));
                sites.push((false, vec![up]));
            }
        }
        if let LatentKeys::Joint(linear) = &self.keys {
            sites.push((false, vec![linear]));
        }
        sites.push((false, vec![&self.output]));
        sites
    }

    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
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
        let rotated = pass.rotate(&q.narrow(3, self.nope, self.rope)?, self.table)?;
        let q = Tensor::cat(&[&q.narrow(3, 0, self.nope)?, &rotated], 3)?;

        let latent = pass.norm(&self.norm, &down.narrow(2, 0, self.rank)?)?; // [b, t, rank]
        let shared = down.narrow(2, self.rank, self.rope)?.reshape((batch, tokens, 1, self.rope))?;
        let shared =
            pass.rotate(&shared, self.table)?.broadcast_as((batch, tokens, self.heads, self.rope))?;
        let (k, v) = self.expand(pass, &latent).await?;
        let k = Tensor::cat(&[&k, &shared], 3)?;

        let settings =
            AttentionSettings { scale: self.scale as f32, window: None, softcap: None, sinks: None };
        let output = pass.engine.attention(&q, &k, &v, &settings)?;
        let output = output.reshape((batch, tokens, self.heads * self.value))?;
        Ok(pass.read(&[&self.output], &output).await?.remove(0))
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
