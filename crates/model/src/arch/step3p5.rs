//! Step 3.5: a gate for each head of attention, more heads and plain ropes in sliding layers, SwiGLU within limits in
//! the last layers.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::{ExpertWidths, Family};
use super::keys::{MOST_HEADS, at_most, wrong};
use super::llama;
use super::rules::{ATTENTION, EXPERTS, MLP, drop, drop_layers_from, gated, make};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, Layer, Linear, Mlp, Moe, OutputGate, Projections, Rope, Router, Scores,
    SharedExpert,
};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    biases: biases::NONE,
    experts: ExpertWidths { shared: &["share_expert_dim"], ..ExpertWidths::USUAL },
    ..Family::new(&["step3p5"], step3p5, decoder)
}];

const GATE: [&str; 1] = ["self_attn.g_proj"];
const SHARED: [&str; 3] = gated!("mlp.share_expert");
const ROUTER: &str = "mlp.gate.gate";
const CORRECTION: &str = "mlp.gate.router_bias";

fn step3p5(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &GATE, &EXPERTS, &SHARED, &[ROUTER]].concat();
    let architecture = Architecture::plain(source, "step3p5", &names)?;
    let layers = architecture.layers;
    // The hub's norms multiply by `1 + w`; MLX's files hold the sum.
    let hub = |name: &String| {
        name.contains(".moe.") || name.contains(".share_expert.") && !name.contains(".mlp.share_expert.")
    };
    let one = source
        .tensors
        .keys()
        .any(hub)
        .then(|| make(r"^(?<x>.*norm.*\.weight)$", [("$x", vec![Step::AddOne])]));
    Ok(architecture
        .rules([
            drop(r"\.mtp"),
            drop_layers_from(layers),
            make(
                r"^(?<x>.*)\.moe\.(?<p>gate_proj|up_proj|down_proj)\.(?<k>.*)$",
                [("$x.mlp.switch_mlp.$p.$k", vec![])],
            ),
            make(r"^(?<x>.*)\.moe\.gate\.(?<k>.*)$", [("$x.mlp.gate.gate.$k", vec![])]),
            make(r"^(?<x>.*)\.moe\.router_bias$", [("$x.mlp.gate.router_bias", vec![])]),
            make(r"^(?<x>model\.layers\.\d+)\.share_expert\.(?<k>.*)$", [("$x.mlp.share_expert.$k", vec![])]),
        ])
        .rules(one)
        .protect(&[ROUTER])
        .keep_dtype(&["router_bias"]))
}

/// Rotary embedding of a layer: base, part of the head and scaling are its own.
fn rope(sketch: Sketch<'_>, index: usize, sliding: bool, head_dim: usize) -> Result<Rope, ConfigError> {
    let theta = match sketch.config.get("rope_theta") {
        Some(Value::Array(list)) => list.get(index).and_then(Value::as_f64),
        other => other.and_then(Value::as_f64),
    };
    let theta = theta.unwrap_or(sketch.defaults.rope_theta);
    let partial = sketch.of_layer("partial_rotary_factors", index).and_then(Value::as_f64).unwrap_or(1.0);
    let kind = if sliding { "sliding_attention" } else { "full_attention" };
    let scaled = sketch.config.get("yarn_only_types").and_then(Value::as_array);
    if scaled.is_some_and(|kinds| !kinds.is_empty() && kinds.iter().all(|own| own.as_str() != Some(kind))) {
        if theta.is_nan() || theta <= 0.0 || !(0.0..=1.0).contains(&partial) {
            return Err(wrong("partial_rotary_factors", "or rope_theta is out of range"));
        }
        return Ok(Rope::plain(theta, (head_dim as f64 * partial) as usize));
    }
    sketch.rope_for(None, head_dim, partial, theta)
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(512));
    let head_dim = sketch.head_dim()?;
    let layers = sketch.layers()?;
    let slides = |index: usize| sketch.is_sliding(index, index.is_multiple_of(2));
    let mut ropes: Vec<Rope> = Vec::new();
    let mut tables = Vec::new();
    for index in 0..layers {
        let own = rope(sketch, index, slides(index), head_dim)?;
        let place = ropes.iter().position(|other| *other == own);
        tables.push(place.unwrap_or(ropes.len()));
        ropes.extend(place.is_none().then_some(own));
    }
    let other = sketch.config.get("attention_other_setting");
    let count = |sliding: bool, key: &str| {
        let own = other.filter(|_| sliding).and_then(|map| map.get(key)).and_then(Value::as_u64);
        own.map_or_else(|| sketch.count(key), |count| at_most(MOST_HEADS, key, count as usize))
    };
    let gated = sketch.config.bool("use_head_wise_attn_gate", true);
    let routed: Option<Vec<usize>> = sketch
        .config
        .str("moe_layers_enum")
        .filter(|text| !text.is_empty())
        .map(|text| text.split(',').filter_map(|layer| layer.trim().parse().ok()).collect());
    sketch.llama_with_heads(ropes, |layer, index| {
        let sliding = slides(index);
        let (heads, kv_heads) =
            (count(sliding, "num_attention_heads")?, count(sliding, "num_attention_groups")?);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(wrong(
                "num_attention_groups",
                &format!("is {kv_heads}, which does not divide {heads} heads"),
            ));
        }
        let [q, k, v, output] = linears(layer, ATTENTION);
        let [linear] = linears(layer, GATE);
        let gate = OutputGate::Linear { linear, activation: Activation::Sigmoid, per_head: true };
        let attention = Attention {
            norms: Some(sketch.head_norms(layer, "q_norm", "k_norm")),
            rope: Some(tables[index]),
            window: window.filter(|_| sliding),
            output_gate: gated.then_some(gate),
            ..Attention::new(heads, kv_heads, head_dim, Projections::Separate { q, k, v }, output)
        };
        let network = if routed.as_ref().map_or(index > 0, |routed| routed.contains(&index)) {
            Layer::Moe(experts(sketch, layer, index)?)
        } else {
            Layer::Mlp(limited(
                sketch,
                "swiglu_limits_shared",
                index,
                Sketch::gated(layer, MLP, Activation::Silu),
            ))
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}

/// With the limit that a list says of the layer, if it is one.
fn limited(sketch: Sketch<'_>, key: &str, index: usize, mlp: Mlp) -> Mlp {
    let limit = sketch.of_layer(key, index).and_then(Value::as_f64).filter(|limit| *limit > 0.0);
    Mlp { limit: limit.map(|limit| limit as f32), ..mlp }
}

fn experts(sketch: Sketch<'_>, layer: &str, index: usize) -> Result<Moe, ConfigError> {
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, Activation::Silu);
    let shared = Sketch::gated(layer, SHARED, Activation::Silu);
    let count = sketch.count("moe_num_experts")?;
    let router = Linear::new(format!("{layer}{ROUTER}"));
    Ok(Moe {
        router: Router {
            scores: Scores::Sigmoid,
            correction: Some(format!("{layer}{CORRECTION}")),
            renormalize: sketch.config.bool("norm_expert_weight", true).then_some(1e-20),
            multiplier: sketch.float_or("moe_router_scaling_factor", 3.0),
            ..Router::new(router, sketch.top_k("moe_top_k", count)?)
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: limited(sketch, "swiglu_limits", index, network(EXPERTS)) },
        shared: Some(SharedExpert {
            mlp: limited(sketch, "swiglu_limits_shared", index, shared),
            gate: None,
        }),
    })
}
