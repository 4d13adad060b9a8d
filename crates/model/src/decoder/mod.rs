//! The vocabulary: what a decoder is made of, as data.
//!
//! A family's file builds one [`Decoder`] from config.json. The forward pass ([`crate::Forward`]) interprets it, and
//! everything else (what may be scaled against what, which linears share a Hessian, how large a block is) is derived
//! from it. Paths are MLX's names of modules; `path.weight`, `path.bias` and so on are their tensors. A bias is read
//! where the checkpoint has one, and a checkpoint with tensors that no part of the description reads is refused.

mod attention;
mod check;
mod delta_net;
mod feed_forward;
mod latent;
mod linear;
mod linear_attention;
mod norm;
mod norms;
mod rope;
mod short_convolution;
mod site;
mod streams;

pub use self::attention::{Attention, HeadNorms, OutputGate, Projections, QueryScaling};
pub use self::check::ExpectedTensor;
pub use self::delta_net::{DeltaNet, DeltaProjections};
pub use self::feed_forward::{
    Experts, Gate, LatentExperts, Mlp, Moe, Router, RouterNorm, Scores, SharedExpert,
};
pub use self::latent::{Indexer, LatentAttention, LatentKeys, LatentQueries};
pub use self::linear::Linear;
pub use self::linear_attention::{GroupNorm, LightningAttention, Mamba};
pub use self::norm::{Norm, NormKind};
pub use self::rope::{Frequencies, Rope};
pub use self::short_convolution::ShortConvolution;
pub use self::site::{Producer, Site};
pub use self::streams::Streams;
use crate::ops::Activation;
pub use mlx_quant_engine::Groups;

/// Token (and position) embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Table `[vocabulary, hidden]`.
    pub path: String,
    /// Learned absolute positions `[positions, hidden]` (GPT-2).
    pub positions: Option<String>,
    /// Factor on the embedding.
    pub multiplier: f64,
    /// Inputs that every block gets beside the residual stream (Gemma 3n, 4).
    pub per_layer: Option<PerLayerInputs>,
}

/// A second embedding of the tokens, one slice per block, mixed with a projection of the first.
#[derive(Clone, Debug, PartialEq)]
pub struct PerLayerInputs {
    /// Table `[vocabulary, blocks * width]`.
    pub path: String,
    /// Its rows where they may be fewer than the embedding's; tokens beyond take the first one (Gemma 3n).
    pub rows: Option<usize>,
    /// Factor on its rows.
    pub multiplier: f64,
    /// `hidden -> blocks * width`.
    pub projection: Linear,
    /// Factor on the projection.
    pub projection_multiplier: f64,
    /// Over each slice of the projection.
    pub norm: Norm,
    /// Factor on the sum of both.
    pub sum_multiplier: f64,
    /// Features a block gets.
    pub width: usize,
}

impl PerLayerInputs {
    /// Rows of the table for tokens.
    pub fn ids(&self, tokens: &[u32]) -> Vec<u32> {
        let known = |token: u32| self.rows.is_none_or(|rows| (token as usize) < rows);
        tokens.iter().map(|&token| if known(token) { token } else { 0 }).collect()
    }
}

/// The last matrix, from hidden state to logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// `None`: the embedding's table.
    pub linear: Option<Linear>,
    /// Factor on the logits.
    pub multiplier: f64,
    /// `cap * tanh(logits / cap)`.
    pub softcap: Option<f64>,
}

/// What a branch of a block computes.
#[derive(Clone, Debug, PartialEq)]
pub enum Layer {
    /// Softmax attention.
    Attention(Attention),
    /// Multi-head latent attention (DeepSeek).
    Latent(LatentAttention),
    /// Gated delta net (Qwen3-Next).
    DeltaNet(DeltaNet),
    /// Gated short convolution (LFM2).
    ShortConvolution(ShortConvolution),
    /// `x + norm(right(left(x)))`, a learned augmented residual (Gemma 3n; arXiv 2411.07501).
    Laurel {
        /// `hidden -> rank`.
        left: Linear,
        /// `rank -> hidden`.
        right: Linear,
        /// Features between.
        rank: usize,
        /// Of what is added.
        norm: Norm,
    },
    /// Mamba 2.
    Mamba(Mamba),
    /// Lightning attention (Ling, Ring).
    Lightning(LightningAttention),
    /// Feed-forward network.
    Mlp(Mlp),
    /// Mixture of experts.
    Moe(Moe),
    /// The block's own input from [`PerLayerInputs`], gated by the residual stream.
    PerLayerInput {
        /// `hidden -> width`.
        gate: Linear,
        /// Of the gate.
        activation: Activation,
        /// `width -> hidden`.
        projection: Linear,
    },
}

/// `post_norm(layer(norm(x)))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    /// Before; branches of one stage with equal norms share its output.
    pub norm: Option<Norm>,
    /// The layer.
    pub layer: Layer,
    /// After.
    pub post_norm: Option<Norm>,
}

/// `scale * (x + multiplier * post_norm(sum of branches(x)))`. Two branches make a parallel block.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// At least one.
    pub branches: Vec<Branch>,
    /// Of the sum.
    pub post_norm: Option<Norm>,
    /// Factor on what is added to the residual stream.
    pub multiplier: f64,
    /// Factor on the residual stream behind it.
    pub scale: f64,
}

/// What a block does with the streams: it predicts each from all, its stages compute one of them, and what these changed
/// corrects all. The three linears see few features, and are no site's readers.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Which stream the stages compute.
    pub active: usize,
    /// Of the active stream.
    pub norm: Norm,
    /// `hidden -> streams`; reads the norm divided by `hidden`.
    pub router: Linear,
    /// `streams -> streams * streams`: factors of predictions.
    pub prediction: Linear,
    /// `streams -> streams`: factors of corrections, less 1.
    pub correction: Linear,
    /// Tensor `[hidden]`, a factor on what `others` reads.
    pub scale: String,
    /// Whether it is one; else it is kept and not computed with.
    pub scales: bool,
    /// Reads the corrected active stream, and is added to all but the first.
    pub others: Branch,
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// All its tensors begin so, with the final dot.
    pub prefix: String,
    /// What enters is replaced by its norm: of the first block, the norm of an embedding.
    pub norm: Option<Norm>,
    /// One after the other.
    pub stages: Vec<Stage>,
    /// Tensor of one element that the output is multiplied with.
    pub scalar: Option<String>,
    /// Where there are several residual streams: which one the stages compute, and what becomes of the others.
    pub update: Option<Update>,
}

/// A language model.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// First.
    pub embedding: Embedding,
    /// Residual streams, where there are several.
    pub streams: Option<Streams>,
    /// Rotary embeddings, which attention layers refer to by index.
    pub ropes: Vec<Rope>,
    /// In order.
    pub blocks: Vec<Block>,
    /// After the last block.
    pub norm: Norm,
    /// Last.
    pub head: Head,
}

impl Decoder {
    /// Whether a tensor or layer of this name is of a block, and not an embedding, a head or what stands between.
    pub fn in_block(&self, name: &str) -> bool {
        self.blocks.iter().any(|block| name.starts_with(&*block.prefix))
    }

    /// Tokens up to which attention is computed in full; beyond, layers would choose what they look at.
    pub fn dense_tokens(&self) -> Option<usize> {
        let of = |layer: &Layer| match layer {
            Layer::Latent(latent) => latent.indexer.as_ref().map(|indexer| indexer.top_k),
            _ => None,
        };
        self.blocks.iter().flat_map(Block::layers).filter_map(of).min()
    }

    /// How many residual streams there are.
    pub fn stream_count(&self) -> usize {
        self.streams.as_ref().map_or(1, Streams::count)
    }

    /// Modules that what follows the last block reads before the head: the last norm, and what gathers streams.
    pub fn last_modules(&self) -> impl Iterator<Item = &str> {
        let gather = self.streams.iter().flat_map(|streams| &streams.gather);
        self.norm.path.as_deref().into_iter().chain(gather.map(|linear| linear.path.as_str()))
    }

    /// Paths of the matrices that are as long as a vocabulary (or the positions): embeddings and head.
    pub fn tables(&self) -> Vec<&str> {
        let embedding = &self.embedding;
        let per_layer = embedding.per_layer.as_ref().map(|inputs| inputs.path.as_str());
        let head = self.head.linear.as_ref().map(|linear| linear.path.as_str());
        let positions = embedding.positions.as_deref();
        std::iter::once(embedding.path.as_str()).chain(positions).chain(per_layer).chain(head).collect()
    }
}

impl Branch {
    /// `layer(norm(x))`.
    pub fn pre(norm: Norm, layer: Layer) -> Self {
        Self { norm: Some(norm), layer, post_norm: None }
    }

    /// `norm(layer(x))`.
    pub fn post(layer: Layer, norm: Norm) -> Self {
        Self { norm: None, layer, post_norm: Some(norm) }
    }

    /// `post(layer(pre(x)))`.
    pub fn sandwich(pre: Norm, layer: Layer, post: Norm) -> Self {
        Self { norm: Some(pre), layer, post_norm: Some(post) }
    }
}

impl Stage {
    /// `x + branch(x)`.
    pub fn new(branch: Branch) -> Self {
        Self::parallel(vec![branch])
    }

    /// `x + post(layer(pre(x)))`.
    pub fn sandwich(pre: Norm, layer: Layer, post: Norm) -> Self {
        Self::new(Branch::sandwich(pre, layer, post))
    }

    /// `x + sum of branches(x)`.
    pub fn parallel(branches: Vec<Branch>) -> Self {
        Self { branches, post_norm: None, multiplier: 1.0, scale: 1.0 }
    }
}

impl Block {
    /// `x + attention(norm(x))`, then `x + mlp(norm(x))`: the common form.
    pub fn new(prefix: impl Into<String>, stages: Vec<Stage>) -> Self {
        Self { prefix: prefix.into(), norm: None, stages, scalar: None, update: None }
    }

    /// All its branches, in order.
    pub fn branches(&self) -> impl Iterator<Item = &Branch> {
        let others = self.update.iter().map(|update| &update.others);
        self.stages.iter().flat_map(|stage| &stage.branches).chain(others)
    }

    /// Their layers.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.branches().map(|branch| &branch.layer)
    }

    /// Blocks whose keys and values this one uses.
    pub fn shared_keys(&self) -> impl Iterator<Item = usize> {
        self.layers().filter_map(|layer| match layer {
            Layer::Attention(attention) => match attention.projections {
                Projections::Shared { block, .. } => Some(block),
                _ => None,
            },
            _ => None,
        })
    }
}
