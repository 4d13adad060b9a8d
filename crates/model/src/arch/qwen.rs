//! Qwen 2 and 3, dense and mixtures of experts.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::keys::wrong;
use super::llama;
use super::rules::{EXPERTS, drop, drop_tied_head, gated, make, stack_mlp_experts};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Router, SharedExpert};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: biases::QKV_ALONE, ..Family::new(&["qwen2"], llama::llama, qwen2) },
    Family { biases: biases::QKV_ALONE, ..Family::new(&["mimo"], mimo, qwen2) },
    Family { biases: biases::NONE, ..Family::new(&["qwen3"], llama::llama, qwen3) },
    Family { biases: biases::QKV_ALONE, ..Family::new(&["qwen2_moe"], qwen2_moe, qwen2_moe_decoder) },
    Family { biases: biases::NONE, ..Family::new(&["qwen3_moe"], qwen3_moe, qwen3_moe_decoder) },
    Family { biases: biases::NONE, ..Family::new(&["mellum"], qwen3_moe, mellum) },
];

/// The expert that every token passes.
pub(super) const SHARED_EXPERT: [&str; 3] = gated!("shared_expert");

/// Its gate.
pub(super) const SHARED_GATE: &str = "shared_expert_gate";

pub(super) const ROUTER: &str = "mlp.gate";

/// MiMo 7B: a Qwen 2 beside which layers predict further tokens.
fn mimo(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(llama::untied_by_default(source)?.rules([drop(r"^model\.mtp_layers\.")]))
}

/// Qwen 1.5 and 2 MoE: routers at the base width.
fn qwen2_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &[ROUTER, SHARED_GATE], &EXPERTS, &SHARED_EXPERT].concat();
    Ok(Architecture::plain(source, "qwen2_moe", &linears)?.rules([stack_mlp_experts()]))
}

/// Qwen 3 MoE: routers at 8 bits. Within Qwen3-VL experts come fused, their matrices turned: `[experts, in, out]`.
fn qwen3_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &[ROUTER], &EXPERTS].concat();
    let half = |second| vec![Step::Transpose, Step::HalfOfRows(second)];
    Ok(Architecture::plain(source, "qwen3_moe", &linears)?
        .rules(drop_tied_head(source, false))
        .rules([
            stack_mlp_experts(),
            make(
                r"^(?<x>.*\.mlp)\.experts\.gate_up_proj$",
                [
                    ("$x.switch_mlp.gate_proj.weight", half(false)),
                    ("$x.switch_mlp.up_proj.weight", half(true)),
                ],
            ),
            make(
                r"^(?<x>.*\.mlp)\.experts\.down_proj$",
                [("$x.switch_mlp.down_proj.weight", vec![Step::Transpose])],
            ),
        ])
        .protect(&[ROUTER]))
}

/// Sliding windows of Qwen 2 and 3, which the config must switch on.
fn window(sketch: Sketch<'_>, index: usize) -> Result<Option<usize>, ConfigError> {
    let first = sketch.count_or("max_window_layers", 28)?;
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    Ok(window.filter(|_| sketch.is_sliding(index, index >= first)))
}

/// Norms of queries and keys by head, since Qwen 3.
pub(super) fn head_norms(sketch: Sketch<'_>, layer: &str) -> HeadNorms {
    sketch.head_norms(layer, "q_norm", "k_norm")
}

fn qwen2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention { window: window(sketch, index)?, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

fn qwen3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention =
            Attention { window: window(sketch, index)?, norms: Some(head_norms(sketch, layer)), ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

/// What differs between the generations.
#[derive(Clone, Copy)]
pub(super) struct Generation {
    /// Whether there are dense models of the same type, whose config.json has no experts.
    pub(super) may_be_dense: bool,
    /// `norm_topk_prob` where config.json says nothing: whether the weights of the chosen experts are made to sum to 1.
    pub(super) renormalizes: bool,
}

const MOE: Generation = Generation { may_be_dense: false, renormalizes: false };

const MELLUM: Generation = Generation { may_be_dense: false, renormalizes: true };

/// Experts behind a softmax router, some layers dense; with a gated shared expert where the checkpoint has one.
pub(super) fn feed_forward(
    sketch: Sketch<'_>,
    generation: Generation,
    layer: &str,
    index: usize,
) -> Result<Layer, ConfigError> {
    // transformers 5 saves it under the second name.
    let count = match sketch.config.get("num_experts") {
        Some(_) => sketch.count_or("num_experts", 0)?,
        None => sketch.count_or("num_local_experts", 0)?,
    };
    if count == 0 && !generation.may_be_dense {
        return Err(wrong("num_experts", "is missing"));
    }
    let dense = sketch.config.get("mlp_only_layers").and_then(serde_json::Value::as_array);
    let dense = dense.is_some_and(|list| list.iter().any(|layer| layer.as_u64() == Some(index as u64)))
        || sketch.is_dense(index) == Some(true);
    if dense || count == 0 || !(index + 1).is_multiple_of(sketch.count_or("decoder_sparse_step", 1)?.max(1)) {
        return Ok(Layer::Mlp(sketch.mlp(layer)?));
    }
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
    let gate = format!("{layer}mlp.{SHARED_GATE}");
    let has_width = sketch.config.count("shared_expert_intermediate_size").is_ok_and(|width| width > 0);
    let shared = sketch
        .has_or(&format!("{gate}.weight"), has_width)
        .then(|| SharedExpert { mlp: network(SHARED_EXPERT), gate: Some(Linear::new(gate)) });
    let renormalize = sketch.config.bool("norm_topk_prob", generation.renormalizes).then_some(0.0);
    Ok(Layer::Moe(Moe {
        router: Router {
            renormalize,
            ..Router::new(
                Linear::new(format!("{layer}{ROUTER}")),
                sketch.top_k("num_experts_per_tok", count)?,
            )
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: network(EXPERTS) },
        shared,
    }))
}

fn qwen2_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    let below = sketch.count_or("max_window_layers", 28)?;
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let window = window.filter(|_| sketch.is_sliding(index, (index + 1) % 2 != 0 && index < below));
        let attention = Layer::Attention(Attention { window, ..attention });
        Ok(sketch.pre_norm(layer, attention, feed_forward(sketch, MOE, layer, index)?))
    })
}

fn qwen3_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention { window, norms: Some(head_norms(sketch, layer)), ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), feed_forward(sketch, MOE, layer, index)?))
    })
}

/// Mellum 2: the same in layers with and without a window, each kind with a rotary base of its own.
fn mellum(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let head_dim = sketch.head_dim()?;
    let rope = |kind, theta| sketch.rope_for(Some(kind), head_dim, 1.0, theta);
    let ropes = vec![rope("full_attention", 500_000.0)?, rope("sliding_attention", 10_000.0)?];
    let window = sketch.window_or(Some(1024));
    sketch.llama_with(ropes, |layer, index, attention| {
        let slides = sketch.is_sliding(index, false);
        let attention = Attention {
            window: window.filter(|_| slides),
            rope: Some(usize::from(slides)),
            norms: Some(head_norms(sketch, layer)),
            ..attention
        };
        let network = feed_forward(sketch, MELLUM, layer, index)?;
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}
