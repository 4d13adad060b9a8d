//! Kimi Linear: delta attention with a decay for each feature of a key, between layers of latent attention without
//! positions; experts under names of their own.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases;
use super::deepseek::{self, LATENT};
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::rules::{ATTENTION, EXPERTS, MLP, SHARED_EXPERTS, drop, drop_tied_head, make, split_kv_b, stack};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Decoder, DeltaNet, DeltaProjections, Experts, Groups, LatentAttention, LatentQueries, Layer, Linear, Moe,
    Router, Scores, SharedExpert,
};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: biases::NONE,
    lengths: &[(&["conv"], &["linear_attn_config.short_conv_kernel_size"])],
    ..Family::new(&["kimi_linear"], kimi_linear, decoder)
}];

/// Of delta attention beside [`ATTENTION`]: what decays and gates are made of, and what writes.
const DELTA: [&str; 5] = [
    "self_attn.f_a_proj",
    "self_attn.f_b_proj",
    "self_attn.b_proj",
    "self_attn.g_a_proj",
    "self_attn.g_b_proj",
];

const ROUTER: &str = "mlp.gate";

/// What Kimi Linear and Kimi K3 share; `own` linears are K3's.
pub(super) fn names(
    source: Source<'_>,
    family: &'static str,
    own: &[&'static str],
) -> Result<Architecture, ConfigError> {
    let all = [&ATTENTION[..], &LATENT, &DELTA, &MLP, &EXPERTS, &SHARED_EXPERTS, own];
    let linears = [&all.concat()[..], &[ROUTER, "embed_tokens", "lm_head"]].concat();
    let experts = |source_name: &str, name| {
        let text = format!(
            r"^(?<x>.*)\.block_sparse_moe\.experts\.(?<e>\d+)\.{source_name}\.(?<k>weight|scales|biases)$"
        );
        stack(&text, name)
    };
    Ok(Architecture::plain(source, family, &linears)?
        .rules([
            drop(r"^(model\.)?mtp"),
            experts("w1", "$x.mlp.switch_mlp.gate_proj.$k"),
            experts("w2", "$x.mlp.switch_mlp.down_proj.$k"),
            experts("w3", "$x.mlp.switch_mlp.up_proj.$k"),
            make(
                r"^(?<x>.*)\.block_sparse_moe\.(gate\.)?e_score_correction_bias$",
                [("$x.mlp.e_score_correction_bias", Vec::new())],
            ),
            make(r"^(?<x>.*)\.block_sparse_moe\.(?<rest>.*)$", [("$x.mlp.$rest", Vec::new())]),
            make(r"^(?<x>.*\.dt_bias)$", [("$x", vec![Step::Flatten])]),
        ])
        .rules(split_kv_b(source)?)
        .protect(&[ROUTER])
        .keep_dtype(&["e_score_correction_bias", "A_log", "dt_bias"])
        .rules(drop_tied_head(source, false)))
}

fn kimi_linear(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let convolution =
        make(r"^(?<x>.*\.self_attn\.[qkv]_conv)1d\.weight$", [("$x.conv.weight", vec![Step::Transpose])]);
    Ok(names(source, "kimi_linear", &[])?.rules([convolution]).parameters(&["A_log", "conv"]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    // Layers are counted from 1.
    let layers = sketch.config.get("linear_attn_config.kda_layers").and_then(Value::as_array);
    let layers = layers.ok_or_else(|| wrong("linear_attn_config.kda_layers", "is missing or no list"))?;
    sketch.llama_with_heads(Vec::new(), |layer, index| {
        let is_delta = layers.iter().any(|number| number.as_u64() == Some(index as u64 + 1));
        let mixer = if is_delta {
            Layer::DeltaNet(delta(sketch, layer)?)
        } else {
            Layer::Latent(latent(sketch, layer)?)
        };
        Ok(sketch.pre_norm(layer, mixer, feed_forward(sketch, layer, index)?))
    })
}

fn delta(sketch: Sketch<'_>, layer: &str) -> Result<DeltaNet, ConfigError> {
    let path = |name: &str| format!("{layer}self_attn.{name}");
    let [q, k, v, output] = linears(layer, ATTENTION);
    let [a_down, a_up, b, z_down, z_up] = linears(layer, DELTA);
    let heads = sketch.count("linear_attn_config.num_heads")?;
    let head_dim = sketch.count("linear_attn_config.head_dim")?;
    Ok(DeltaNet {
        key_heads: heads,
        value_heads: heads,
        key_dim: head_dim,
        value_dim: head_dim,
        projections: DeltaProjections::LowRank { qkv: [q, k, v], b, a: [a_down, a_up], z: [z_down, z_up] },
        convolutions: ["q_conv.conv", "k_conv.conv", "v_conv.conv"].map(path).to_vec(),
        dt_bias: path("dt_bias"),
        decay_log: path("A_log"),
        norm: sketch.rms(path("o_norm")),
        gate: Activation::Sigmoid,
        output,
    })
}

/// Nothing is rotated, and mlx-lm's model has no latent vector of queries.
fn latent(sketch: Sketch<'_>, layer: &str) -> Result<LatentAttention, ConfigError> {
    let [q, ..] = linears(layer, ATTENTION);
    let latent = deepseek::latent(sketch, layer, sketch.count("v_head_dim")?)?;
    Ok(LatentAttention {
        scale: ((latent.nope + latent.rope) as f64).powf(-0.5),
        queries: LatentQueries::Direct(q),
        norm: sketch.rms(format!("{layer}self_attn.kv_a_layernorm")),
        table: None,
        ..latent
    })
}

/// A dense network in the first layers, then experts.
fn feed_forward(sketch: Sketch<'_>, layer: &str, index: usize) -> Result<Layer, ConfigError> {
    let dense = index < sketch.count_or("first_k_dense_replace", 0)?
        || !index.is_multiple_of(sketch.count_or("moe_layer_freq", 1)?.max(1));
    let count = sketch.count_or("num_experts", 0)?;
    if dense || count == 0 {
        return Ok(Layer::Mlp(Sketch::gated(layer, MLP, Activation::Silu)));
    }
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, Activation::Silu);
    let scores = match sketch.config.str("moe_router_activation_func").unwrap_or("sigmoid") {
        "sigmoid" => Scores::Sigmoid,
        "softmax" => Scores::Softmax,
        other => return Err(undescribed("moe_router_activation_func", &format!("is {other:?}"))),
    };
    let groups = Groups {
        count: sketch.count_or("num_expert_group", 1)?,
        keep: sketch.count_or("topk_group", 1)?,
        best_two: true,
    };
    if groups.count == 0 || count % groups.count != 0 {
        let reason = format!("is {}, which does not divide {count} experts", groups.count);
        return Err(wrong("num_expert_group", &reason));
    }
    let top_k = sketch.top_k("num_experts_per_token", count)?;
    let renormalizes = top_k > 1 && sketch.config.bool("moe_renormalize", true);
    Ok(Layer::Moe(Moe {
        latent: None,
        router: Router {
            scores,
            correction: Some(format!("{layer}mlp.e_score_correction_bias")),
            groups: (groups.count > 1).then_some(groups),
            renormalize: renormalizes.then_some(1e-20),
            multiplier: sketch.float_or("routed_scaling_factor", 1.0),
            ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k)
        },
        experts: Experts::Stacked { count, mlp: network(EXPERTS) },
        shared: (sketch.count_or("num_shared_experts", 0)? > 0)
            .then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
    }))
}
