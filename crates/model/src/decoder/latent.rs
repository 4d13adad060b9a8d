//! DeepSeek's multi-head latent attention: keys and values of all heads are made from one small latent vector a token.
//!
//! Computed as mlx-lm does for many tokens at once: the latent is expanded to keys and values of every head. A rotated
//! part that all heads share is appended to the keys. Source: arXiv 2405.04434, section 2.1.

use super::{Linear, Norm, QueryScaling};

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

/// Chooses the tokens that attention sees where there are more than `top_k` (DeepSeek V3.2). Up to there it decides
/// nothing, so that its matrices are kept and not computed with.
#[derive(Clone, Debug, PartialEq)]
pub struct Indexer {
    /// Tokens that a token sees.
    pub top_k: usize,
    /// `rank -> heads * width`: queries, of the latent vector of attention's queries.
    pub queries: Linear,
    /// `hidden -> width`.
    pub keys: Linear,
    /// Layer norm of the keys.
    pub norm: Norm,
    /// `hidden -> heads`: weights of the heads.
    pub weights: Linear,
    /// How many heads.
    pub heads: usize,
    /// Features of a head.
    pub width: usize,
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
    /// Index of the rotary embedding; `None`: no positions, nothing is rotated (Kimi Linear).
    pub table: Option<usize>,
    /// Factor on queries by position.
    pub query_scaling: Option<QueryScaling>,
    /// Beside it.
    pub indexer: Option<Indexer>,
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
}
