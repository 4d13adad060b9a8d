//! Mixers that are linear attention with a decay: Mamba 2 and lightning attention.
//!
//! For every head `S = decay * S + k v^T`, `o = S^T q`. Mamba 2 (arXiv 2405.21060) makes each token's decay of a step, as
//! `exp(-exp(A) * step)`, and calls keys B, queries C; heads of a group share both. Lightning attention (arXiv 2401.04658)
//! has one decay a head for all tokens.

use super::{HeadNorms, Linear, Norm};

/// An RMS norm of each of several groups of neighbouring features, under one weight for all features.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupNorm {
    /// Its weight has all features.
    pub norm: Norm,
    /// How many groups.
    pub groups: usize,
}

/// A Mamba 2 mixer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba {
    /// Heads of values.
    pub heads: usize,
    /// Features of a value.
    pub head_dim: usize,
    /// Groups of heads that share B and C.
    pub groups: usize,
    /// Features of B and of C.
    pub state: usize,
    /// `hidden -> 2 * values + 2 * groups * state + heads`: gate, values, B, C, steps.
    pub input: Linear,
    /// Module of the convolution of values, B and C, `[values + 2 * groups * state, kernel, 1]`.
    pub convolution: String,
    /// Tensor `[heads]` added to the steps.
    pub step_bias: String,
    /// Steps stay within.
    pub step_limits: [f32; 2],
    /// Tensor `[heads]`, logarithm of the decay rate.
    pub decay_log: String,
    /// Tensor `[heads]`: so much of its value goes past the state of a head.
    pub skip: String,
    /// Of the gated output of all heads.
    pub norm: Option<GroupNorm>,
    /// The gate is multiplied with what the norm gives, not with what it reads.
    pub gate_last: bool,
    /// `values -> hidden`.
    pub output: Linear,
}

impl Mamba {
    /// Features of all heads' values.
    pub fn values(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Features of values, B and C.
    pub fn convolved(&self) -> usize {
        self.values() + 2 * self.groups * self.state
    }
}

/// Lightning attention.
#[derive(Clone, Debug, PartialEq)]
pub struct LightningAttention {
    /// Heads of queries, keys and values alike.
    pub heads: usize,
    /// Features of each.
    pub head_dim: usize,
    /// Factor on the queries.
    pub scale: f64,
    /// Logarithm of each head's decay.
    pub log_decays: Vec<f32>,
    /// `hidden -> 3 * heads * head_dim`: q, k, v.
    pub projection: Linear,
    /// Of queries and keys.
    pub norms: Option<HeadNorms>,
    /// Index of the rotary embedding.
    pub rope: usize,
    /// Of the output of all heads.
    pub norm: GroupNorm,
    /// `hidden -> heads * head_dim`; its sigmoid is a factor on what the norm gives.
    pub gate: Linear,
    /// `heads * head_dim -> hidden`.
    pub output: Linear,
}
