//! Laguna: a gate for each head of attention, as many heads as each layer says, ropes by kind of layer, a router of
//! its own kind.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS, OUT, QKV};
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::llama;
use super::qwen::SHARED_EXPERT;
use super::rules::{ATTENTION, EXPERTS, drop_tied_head, make, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, Layer, Linear, Moe, OutputGate, Projections, Router, Scores, SharedExpert,
};
use crate::ops::Activation;

const BIASES: &[BiasRule] =
    &[(QKV, Bias::If("qkv_bias")), (OUT, Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] =
    &[Family { biases: BIASES, ..Family::new(&["laguna"], laguna, decoder) }];

const GATE: [&str; 1] = ["self_attn.g_proj"];
const ROUTER: &str = "mlp.gate.proj";
const CORRECTION: &str = "mlp.gate.e_score_correction_bias";

fn laguna(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &GATE, &EXPERTS, &SHARED_EXPERT, &[ROUTER]].concat();
    let mut architecture = Architecture::plain(source, "laguna", &names)?
        .rules(drop_tied_head(source, false))
        .rules([
            make(r"^(?<x>.*\.mlp\.gate)\.weight$", [("$x.proj.weight", vec![])]),
            make(
                r"^(?<x>.*\.mlp)\.experts\.e_score_correction_bias$",
                [("$x.gate.e_score_correction_bias", vec![])],
            ),
            stack_mlp_experts(),
        ])
        .protect(&[ROUTER])
        .keep_dtype(&["e_score_correction_bias"]);
    architecture.prefixes = vec![("language_model.", "")];
    Ok(architecture)
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let gated = match sketch.config.get("gating") {
        None => true,
        Some(value) if value.as_str() == Some("per-head") => true,
        Some(value) => value.as_bool().ok_or_else(|| undescribed("gating", &format!("is {value}")))?,
    };
    let (kv_heads, head_dim) = (sketch.count("num_key_value_heads")?, sketch.head_dim()?);
    let rope = |kind| sketch.rope_for(Some(kind), head_dim, 1.0, sketch.defaults.rope_theta);
    let full = rope("full_attention")?;
    let by_kind =
        sketch.config.get("rope_parameters").is_some_and(|map| map.get("sliding_attention").is_some());
    let ropes = if by_kind { vec![full, rope("sliding_attention")?] } else { vec![full.clone(), full] };
    let window = sketch.window_or(Some(512));
    sketch.llama_with(ropes, |layer, index, _| {
        let sliding = sketch.is_sliding(index, false);
        let heads = sketch
            .count_of_layer("num_attention_heads_per_layer", index)?
            .map_or_else(|| sketch.heads(), Ok)?;
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(wrong(
                "num_key_value_heads",
                &format!("is {kv_heads}, which does not divide {heads} heads"),
            ));
        }
        let [q, k, v, output] = linears(layer, ATTENTION);
        let [linear] = linears(layer, GATE);
        let gate = OutputGate::Linear { linear, activation: Activation::Softplus, per_head: true };
        let attention = Attention {
            norms: Some(sketch.head_norms(layer, "q_norm", "k_norm")),
            rope: Some(usize::from(sliding)),
            window: window.filter(|_| sliding),
            output_gate: gated.then_some(gate),
            ..Attention::new(heads, kv_heads, head_dim, Projections::Separate { q, k, v }, output)
        };
        let network = if sketch.is_dense(index).unwrap_or(index == 0) {
            Layer::Mlp(sketch.mlp(layer)?)
        } else {
            Layer::Moe(experts(sketch, layer)?)
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}

fn experts(sketch: Sketch<'_>, layer: &str) -> Result<Moe, ConfigError> {
    if sketch.float_or("moe_router_logit_softcapping", 0.0) > 0.0 {
        return Err(undescribed("moe_router_logit_softcapping", "is positive"));
    }
    let scores = match sketch.config.str("moe_router_score_func") {
        None | Some("sigmoid") => Scores::Sigmoid,
        Some("sqrtsoftplus") => Scores::RootOfSoftplus,
        Some(other) => return Err(undescribed("moe_router_score_func", &format!("is {other:?}"))),
    };
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
    let count = sketch.count("num_experts")?;
    let router = Linear::new(format!("{layer}{ROUTER}"));
    Ok(Moe {
        router: Router {
            scores,
            correction: Some(format!("{layer}{CORRECTION}")),
            renormalize: Some(0.0),
            multiplier: sketch.float_or("moe_routed_scaling_factor", 1.0),
            ..Router::new(router, sketch.top_k("num_experts_per_tok", count)?)
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: network(EXPERTS) },
        shared: Some(SharedExpert { mlp: network(SHARED_EXPERT), gate: None }),
    })
}
