//! Feed-forward networks and mixtures of them.

use mlx_quant_engine::{Activation, Groups};

use super::Linear;

/// The first half of a feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub enum Gate {
    /// `activation(gate(x)) * up(x)`.
    Separate {
        /// Through the activation.
        gate: Linear,
        /// Multiplied with it.
        up: Linear,
    },
    /// The same with one linear whose rows are those of gate, then up.
    Fused(Linear),
    /// `activation(up(x))`.
    None(Linear),
}

impl Gate {
    /// The linears that read the layer's input.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { gate, up } => vec![gate, up],
            Self::Fused(linear) | Self::None(linear) => vec![linear],
        }
    }
}

/// A feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// First half.
    pub gate: Gate,
    /// Between.
    pub activation: Activation,
    /// Second half.
    pub down: Linear,
}

/// How a router's logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// Softmax over the chosen experts only.
    SoftmaxOfChosen,
}

/// Chooses experts for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// `hidden -> experts`.
    pub linear: Linear,
    /// What the logits become.
    pub scores: Scores,
    /// Tensor `[experts]` added to the scores for the choice alone.
    pub correction: Option<String>,
    /// Choice by groups.
    pub groups: Option<Groups>,
    /// Experts of a token.
    pub top_k: usize,
    /// Scores of the chosen are divided by their sum (plus this).
    pub renormalize: Option<f64>,
    /// Factor on the weights.
    pub multiplier: f64,
}

/// Experts stacked in tensors `[experts, out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many.
    pub count: usize,
    /// Linears of each; biases `[experts, out]`.
    pub mlp: Mlp,
}

/// An expert that every token passes.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// The network.
    pub mlp: Mlp,
    /// `hidden -> 1`; its sigmoid is a factor on the output.
    pub gate: Option<Linear>,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Chooses.
    pub router: Router,
    /// Chosen ones.
    pub experts: Experts,
    /// For all tokens.
    pub shared: Option<SharedExpert>,
}
