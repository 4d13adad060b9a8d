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
    /// xIELU of `up(x)`, an activation with parameters (Apertus; arXiv 2411.13010): `ap x^2 + b x` where x is
    /// positive, else `an (exp(min(x, eps)) - 1 - x) + b x`, with `ap = softplus(alpha_p)` and `an = b +
    /// softplus(alpha_n)`.
    Xielu {
        /// Through the activation.
        up: Linear,
        /// Module of the scalars `alpha_p`, `alpha_n`, `beta` and `eps`.
        parameters: String,
    },
}

impl Gate {
    /// The linears that read the layer's input.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { gate, up } => vec![gate, up],
            Self::Fused(linear) | Self::None(linear) | Self::Xielu { up: linear, .. } => vec![linear],
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
    /// The activated gate is at most so large, and up within so much of zero (Step 3.5).
    pub limit: Option<f32>,
    /// The activation sees of the gate what lies above its mean by so many standard deviations, else 0 (Gemma 3n).
    pub cutoff: Option<f64>,
    /// Second half.
    pub down: Linear,
}

impl Mlp {
    /// Without a limit or a cutoff.
    pub fn new(gate: Gate, activation: Activation, down: Linear) -> Self {
        Self { gate, activation, limit: None, cutoff: None, down }
    }
}

/// How a router's logits become scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scores {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// Softmax over the chosen experts only.
    SoftmaxOfChosen,
    /// Root of the softplus of each (Laguna).
    RootOfSoftplus,
    /// Of each chosen expert a softmax over those that were not chosen before it and are close to it: whose distance
    /// is at most `2 * jitter` of the larger of its logit and the size of their own (Phi-3.5-MoE; arXiv 2409.12136).
    Sparsemixer {
        /// Half of the relative distance.
        jitter: f64,
    },
}

/// A router that reads the residual stream in its own norm, `x / sqrt(mean(x^2) + eps) * scale * multiplier`, beside
/// experts that read another one's output (Gemma 4).
#[derive(Clone, Debug, PartialEq)]
pub struct RouterNorm {
    /// Tensor `[hidden]`.
    pub scale: String,
    /// Factor beside it.
    pub multiplier: f64,
    /// Added to the variance.
    pub epsilon: f64,
}

/// Chooses experts for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// `hidden -> experts`.
    pub linear: Linear,
    /// What it reads; `None`: what the experts read.
    pub norm: Option<RouterNorm>,
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
    /// Tensor `[experts]`, factors on the weights (Gemma 4).
    pub expert_scale: Option<String>,
    /// The weights are factors on what an expert reads instead of on what it gives (Llama 4).
    pub before: bool,
}

impl Router {
    /// A softmax router that reads what the experts read.
    pub fn new(linear: Linear, top_k: usize) -> Self {
        Self {
            linear,
            norm: None,
            scores: Scores::Softmax,
            correction: None,
            groups: None,
            top_k,
            renormalize: None,
            multiplier: 1.0,
            expert_scale: None,
            before: false,
        }
    }
}

/// Experts of one shape.
#[derive(Clone, Debug, PartialEq)]
pub enum Experts {
    /// Stacked in tensors `[experts, out, in]`.
    Stacked {
        /// How many.
        count: usize,
        /// Linears of each; biases `[experts, out]`.
        mlp: Mlp,
    },
    /// Each under names of its own (DBRX).
    Apart(Vec<Mlp>),
}

impl Experts {
    /// How many.
    pub fn count(&self) -> usize {
        match self {
            Self::Stacked { count, .. } => *count,
            Self::Apart(each) => each.len(),
        }
    }

    /// Linears of an expert, with its place where they are stacked.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn of(&self, expert: usize) -> (&Mlp, Option<usize>) {
        match self {
            Self::Stacked { mlp, .. } => (mlp, Some(expert)),
            Self::Apart(each) => (&each[expert], None),
        }
    }

    /// Networks of different names, with how many are stacked in each.
    pub fn networks(&self) -> Vec<(&Mlp, Option<usize>)> {
        match self {
            Self::Stacked { count, mlp } => vec![(mlp, Some(*count))],
            Self::Apart(each) => each.iter().map(|mlp| (mlp, None)).collect(),
        }
    }
}

/// An expert that every token passes.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// The network.
    pub mlp: Mlp,
    /// `hidden -> 1`; its sigmoid is a factor on the output.
    pub gate: Option<Linear>,
}

/// Experts that read a latent vector of the input, and whose sum goes back to its width (Nemotron 3).
#[derive(Clone, Debug, PartialEq)]
pub struct LatentExperts {
    /// Features of the latent vector.
    pub width: usize,
    /// `hidden -> width`.
    pub down: Linear,
    /// `width -> hidden`.
    pub up: Linear,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Chooses.
    pub router: Router,
    /// What stands around the chosen ones.
    pub latent: Option<LatentExperts>,
    /// Chosen ones.
    pub experts: Experts,
    /// For all tokens.
    pub shared: Option<SharedExpert>,
}
