//! Softmax attention.

use mlx_quant_engine::Activation;

use super::{Linear, Norm};

/// Where queries, keys and values come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Projections {
    /// A linear each.
    Separate {
        /// `hidden -> heads * head_dim` (twice that with an output gate).
        q: Linear,
        /// `hidden -> kv_heads * head_dim`.
        k: Linear,
        /// `hidden -> kv_heads * value_dim`.
        v: Linear,
    },
    /// One linear whose rows are those of q, then k, then v.
    Concatenated(Linear),
    /// One linear whose rows are those of the first key head: the queries that it serves, k, v; then those of the
    /// second, ... (GPT-NeoX, InternLM 2).
    Interleaved(Linear),
    /// Values are what the projection of the keys gives, before norm and rotation (Gemma 4).
    KeysAsValues {
        /// `hidden -> heads * head_dim`.
        q: Linear,
        /// `hidden -> kv_heads * head_dim`.
        k: Linear,
    },
    /// Queries alone; keys and values are those of an earlier block (Gemma 3n, 4).
    Shared {
        /// `hidden -> heads * head_dim`.
        q: Linear,
        /// The block that made keys and values.
        block: usize,
        /// Linears of keys and values of its own, which are kept, as the norm of keys is, and not computed with (Gemma 3n).
        unread: Option<[Linear; 2]>,
    },
}

impl Projections {
    /// The linears that read the layer's input.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { q, k, v } => vec![q, k, v],
            Self::KeysAsValues { q, k } => vec![q, k],
            Self::Concatenated(linear) | Self::Interleaved(linear) | Self::Shared { q: linear, .. } => {
                vec![linear]
            }
        }
    }
}

/// Norms of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadNorms {
    /// Of queries.
    pub q: Norm,
    /// Of keys; `None` where keys are another block's.
    pub k: Option<Norm>,
    /// Of values.
    pub v: Option<Norm>,
    /// Over all heads at once (`heads * head_dim` features) instead of over each head.
    pub flat: bool,
    /// With a weight for each head, `[heads, head_dim]` in one tensor (Command R+).
    pub per_head: bool,
    /// After the rotation instead of before.
    pub after_rope: bool,
}

impl HeadNorms {
    /// Norms of each head of queries and keys, before the rotation.
    pub fn new(q: Norm, k: Norm) -> Self {
        Self { q, k: Some(k), v: None, flat: false, per_head: false, after_rope: false }
    }
}

/// Queries grow with the position: `1 + beta * ln(1 + floor(position / original))` (Ministral 3, Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// Strength.
    pub beta: f64,
    /// Positions of one step.
    pub original: f64,
    /// Number of the first position.
    pub first: usize,
}

/// A factor on what attention gives, made of the layer's input.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputGate {
    /// The query projection gives `[query, gate]` for each head; the factor is the gate's sigmoid (Qwen3-Next).
    WithQueries,
    /// A linear of its own.
    Linear {
        /// `hidden -> heads * value_dim`, or `hidden -> heads`.
        linear: Linear,
        /// What the factor is of the linear's output.
        activation: Activation,
        /// One factor for each head instead of one for each feature.
        per_head: bool,
    },
}

/// Softmax attention, causal.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Features of a query and key head.
    pub head_dim: usize,
    /// Features of a value head.
    pub value_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Factor on the values.
    pub value_multiplier: f64,
    /// Queries, keys, values.
    pub projections: Projections,
    /// What projections give is within so much of zero (DBRX).
    pub clip: Option<f32>,
    /// `heads * value_dim -> hidden`.
    pub output: Linear,
    /// Norms of queries and keys.
    pub norms: Option<HeadNorms>,
    /// Index of the rotary embedding; `None`: no positions (`NoPE`).
    pub rope: Option<usize>,
    /// Each token sees itself and `window - 1` tokens before.
    pub window: Option<usize>,
    /// Each token sees the tokens of its own chunk of so many alone (Llama 4).
    pub chunk: Option<usize>,
    /// `cap * tanh(scores / cap)`.
    pub softcap: Option<f64>,
    /// Tensor of one logit per head that takes part in the softmax without a value (gpt-oss).
    pub sinks: Option<String>,
    /// Factor on the output.
    pub output_gate: Option<OutputGate>,
    /// Factor on queries by position.
    pub query_scaling: Option<QueryScaling>,
    /// Whether a later block uses these keys and values.
    pub keep_keys: bool,
}

impl Attention {
    /// Plain attention: no norms, no window, scores divided by the root of `head_dim`, rotary embedding 0.
    pub fn new(
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        projections: Projections,
        output: Linear,
    ) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            scale: (head_dim as f64).powf(-0.5),
            value_multiplier: 1.0,
            projections,
            clip: None,
            output,
            norms: None,
            rope: Some(0),
            window: None,
            chunk: None,
            softcap: None,
            sinks: None,
            output_gate: None,
            query_scaling: None,
            keep_keys: false,
        }
    }

    /// Whether the query projection gives the output's gate, too.
    pub fn gated_with_queries(&self) -> bool {
        self.output_gate == Some(OutputGate::WithQueries)
    }

    /// The gate's own linear.
    pub fn gate(&self) -> Option<&Linear> {
        match &self.output_gate {
            Some(OutputGate::Linear { linear, .. }) => Some(linear),
            _ => None,
        }
    }
}
