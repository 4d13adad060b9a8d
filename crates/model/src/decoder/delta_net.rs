//! The gated delta net of Qwen3-Next and Qwen 3.5, and Kimi delta attention: linear attention whose state is corrected
//! towards each new value.
//!
//! For every head, with keys and queries of unit length: `S = decay * S`, `S += k (beta * (v - S^T k))^T`, `o = S^T q`.
//! Source: arXiv 2412.06464 and, with a decay for each feature of a key, arXiv 2510.26692; the layouts are `transformers`'
//! `modeling_qwen3_next.py` and `mlx_lm/models/kimi_linear.py`.

use mlx_quant_engine::Activation;

use super::{Linear, Norm};

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
    /// Kimi Linear: q, k and v apart; a and z are made through vectors of `key_dim` and `value_dim` features. There is an
    /// a, and so a decay, for each feature of a key.
    LowRank {
        /// `hidden -> keys`, `hidden -> keys`, `hidden -> values`.
        qkv: [Linear; 3],
        /// `hidden -> value heads`.
        b: Linear,
        /// `hidden -> key_dim -> keys`.
        a: [Linear; 2],
        /// `hidden -> value_dim -> values`.
        z: [Linear; 2],
    },
}

impl DeltaProjections {
    /// Those that read the layer's input, in their order.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Grouped { qkvz, ba } => vec![qkvz, ba],
            Self::Separate { qkv, z, b, a } => vec![qkv, z, b, a],
            Self::LowRank { qkv: [q, k, v], b, a: [a, _], z: [z, _] } => vec![q, k, v, b, a, z],
        }
    }

    /// Those behind them, each of which reads what one of them gives.
    pub fn inner(&self) -> Vec<&Linear> {
        match self {
            Self::Grouped { .. } | Self::Separate { .. } => Vec::new(),
            Self::LowRank { a: [_, a], z: [_, z], .. } => vec![a, z],
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
    /// Modules of the convolutions: one for q, k and v in a row, `[2 * keys + values, kernel, 1]`, or one for each.
    pub convolutions: Vec<String>,
    /// Tensor added to a, a number for each of its features.
    pub dt_bias: String,
    /// Tensor `[value_heads]`, logarithm of the decay rate; with a decay for each feature `[1, 1, value_heads, 1]`.
    pub decay_log: String,
    /// Of each head's output, before its gate.
    pub norm: Norm,
    /// What the gate is of z.
    pub gate: Activation,
    /// `values -> hidden`.
    pub output: Linear,
}

impl DeltaNet {
    /// Whether there is a decay for each feature of a key instead of one for each head.
    pub fn decays_by_feature(&self) -> bool {
        matches!(self.projections, DeltaProjections::LowRank { .. })
    }
}
