//! The gated delta net of Qwen3-Next and Qwen 3.5: linear attention whose state is corrected towards each new value.
//!
//! For every head, with keys and queries of unit length: `S = decay * S`, `S += k (beta * (v - S^T k))^T`, `o = S^T q`.
//! Source: arXiv 2412.06464; the layout is `transformers`' `modeling_qwen3_next.py`.

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
