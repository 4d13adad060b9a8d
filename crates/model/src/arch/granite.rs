//! IBM Granite: the Llama shape; mlx-lm keeps output projections and the head at 8 bits, because their small
//! values underflow the scales of the fp modes.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::llama;
use super::rules::{EXPERTS, drop_tied_head, make};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, Layer, Linear, Moe, Router, Scores};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: biases::ATTENTION_AND_NETWORK, ..Family::new(&["granite"], granite, decoder) },
    Family { biases: biases::ATTENTION, ..Family::new(&["granitemoe"], granitemoe, granitemoe_decoder) },
];

const MOE: &str = "block_sparse_moe";
pub(super) const ROUTER: &str = "block_sparse_moe.router.layer";

fn granite(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = llama::llama(source)?.protect(&["self_attn.o_proj", "mlp.down_proj", "lm_head"]);
    architecture.family = "granite";
    Ok(architecture)
}

/// Experts come in two tensors, gate and up in one of them.
fn granitemoe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &[ROUTER], &EXPERTS].concat();
    let half = |second| vec![Step::HalfOfRows(second)];
    Ok(Architecture::plain(source, "granitemoe", &linears)?
        .rules(drop_tied_head(source, true))
        .rules([
            make(
                r"^(?<x>.*\.block_sparse_moe)\.input_linear\.weight$",
                [
                    ("$x.switch_mlp.gate_proj.weight", half(false)),
                    ("$x.switch_mlp.up_proj.weight", half(true)),
                ],
            ),
            make(
                r"^(?<x>.*\.block_sparse_moe)\.output_linear\.weight$",
                [("$x.switch_mlp.down_proj.weight", vec![])],
            ),
        ])
        .protect(&[ROUTER, "self_attn.o_proj", "switch_mlp.down_proj", "lm_head"]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let attends = |_: &str, _, attention| Ok(Layer::Attention(attention));
    multiplied(sketch, attends, |layer| Ok(Layer::Mlp(sketch.mlp(layer)?)))
}

fn granitemoe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let attends = |_: &str, _, attention| Ok(Layer::Attention(attention));
    multiplied(sketch, attends, |layer| Ok(Layer::Moe(experts(sketch, layer)?)))
}

/// Experts with a softmax over the chosen ones.
pub(super) fn experts(sketch: Sketch<'_>, layer: &str) -> Result<Moe, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let count = sketch.count("num_local_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let router = Linear::new(format!("{layer}{ROUTER}"));
    Ok(Moe {
        router: Router { scores: Scores::SoftmaxOfChosen, ..Router::new(router, top_k) },
        latent: None,
        experts: Experts::Stacked {
            count,
            mlp: Sketch::gated(&format!("{layer}{MOE}."), EXPERTS, activation),
        },
        shared: None,
    })
}

/// Multipliers on embedding, scores, residual branches and logits.
pub(super) fn multiplied(
    sketch: Sketch<'_>,
    mixer: impl Fn(&str, usize, Attention) -> Result<Layer, ConfigError>,
    network: impl Fn(&str) -> Result<Layer, ConfigError>,
) -> Result<Decoder, ConfigError> {
    let residual = sketch.float_or("residual_multiplier", 1.0);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention { scale: sketch.float_or("attention_multiplier", 1.0), ..attention };
        let mut stages = sketch.pre_norm(layer, mixer(layer, index, attention)?, network(layer)?);
        for stage in &mut stages {
            stage.multiplier = residual;
        }
        Ok(stages)
    })?;
    decoder.embedding.multiplier = sketch.float_or("embedding_multiplier", 1.0);
    decoder.head.multiplier = 1.0 / sketch.float_or("logits_scaling", 1.0);
    Ok(decoder)
}
