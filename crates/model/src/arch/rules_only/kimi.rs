//! Kimi Linear and Kimi K3: delta attention with a gate for each channel between layers of latent attention.

use std::collections::BTreeSet;

use mlx_format::checkpoint::ConfigError;

use super::words::{EMBEDDING_AND_HEAD, named};
use crate::arch::Rule;
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{
    EXPERTS, MLP, SHARED_EXPERTS, drop, drop_layers_from, join, make, split_kv_b, stack,
};
use crate::view::Step;

pub(super) const FAMILIES: &[Family] =
    &[Family::rules_only(&["kimi_linear"], linear), Family::rules_only(&["kimi_k3"], k3)];

const ATTENTION: [&str; 15] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.embed_q",
    "self_attn.unembed_out",
    "self_attn.f_a_proj",
    "self_attn.f_b_proj",
    "self_attn.b_proj",
    "self_attn.g_a_proj",
    "self_attn.g_b_proj",
    "self_attn.g_proj",
];

/// What both share.
fn kimi(source: Source<'_>, family: &'static str, own: &[&'static str]) -> Result<Architecture, ConfigError> {
    let linears = [&ATTENTION[..], &MLP, &EXPERTS, &SHARED_EXPERTS, &["mlp.gate"], own, &EMBEDDING_AND_HEAD];
    let experts = |source_name: &str, name| {
        let text = format!(
            r"^(?<x>.*)\.block_sparse_moe\.experts\.(?<e>\d+)\.{source_name}\.(?<k>weight|scales|biases)$"
        );
        stack(&text, name)
    };
    Ok(named(source, family, &linears)?
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
        .protect(&["mlp.gate"])
        .keep_dtype(&["e_score_correction_bias", "A_log", "dt_bias"])
        .tied(source, false))
}

fn linear(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let convolution =
        make(r"^(?<x>.*\.self_attn\.[qkv]_conv)1d\.weight$", [("$x.conv.weight", vec![Step::Transpose])]);
    Ok(kimi(source, "kimi_linear", &[])?.rules([convolution]).parameters(&["A_log", "conv"]))
}

/// Latent experts, residuals that attend to earlier ones, and one matrix for queries, keys and values of delta attention.
fn k3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const OWN: [&str; 6] = [
        "self_attn.qkv_proj",
        "mlp.routed_expert_down_proj",
        "mlp.routed_expert_up_proj",
        "self_attention_res_proj",
        "mlp_res_proj",
        "output_attn_res_proj",
    ];
    let mut architecture = kimi(source, "kimi_k3", &OWN)?;
    let layers = architecture.layers;
    let heads = source.config.0.get("linear_attn_config").and_then(|linear| linear.get("num_heads"));
    let heads = heads.and_then(serde_json::Value::as_u64).map_or(usize::MAX, |heads| heads as usize);
    // Before the rules for all layers.
    architecture.rules.splice(0..0, joined(source));
    Ok(architecture
        .rules([
            drop_layers_from(layers),
            make(r"^(?<x>.*\.A_log)$", [("$x", vec![Step::Flatten, Step::First(heads)])]),
            make(
                r"^(?<x>.*(self_attention_res|mlp_res|output_attn_res))\.(?<p>proj|norm)_weight$",
                [("${x}_$p.weight", Vec::new())],
            ),
        ])
        .leave(r"res_proj$")
        .parameters(&["qkv_conv.conv"]))
}

/// Queries, keys and values stand in one matrix, and so do their convolutions, in layers of delta attention: those with keys.
fn joined(source: Source<'_>) -> Vec<Rule> {
    let layer = |name: &String| {
        let (before, _) = name.split_once(".self_attn.k_proj.")?;
        before.rsplit('.').next()?.parse::<usize>().ok()
    };
    let delta: BTreeSet<usize> = source.tensors.keys().filter_map(layer).collect();
    if delta.is_empty() {
        return Vec::new();
    }
    let delta = delta.iter().map(usize::to_string).collect::<Vec<_>>().join("|");
    let part = |end: &str| format!(r"^(?<x>.*\.layers\.({delta})\.self_attn)\.{end}$");
    let [q, k, v] =
        ["q", "k", "v"].map(|part_of| part(&format!(r"{part_of}_proj\.(?<k>weight|scales|biases)")));
    let projections = join([(&*q, Vec::new()), (&*k, Vec::new()), (&*v, Vec::new())], "$x.qkv_proj.$k");
    let [q, k, v] = ["q", "k", "v"].map(|part_of| part(&format!(r"{part_of}_conv1d\.weight")));
    let turned = || vec![Step::Transpose];
    let convolutions = join([(&*q, turned()), (&*k, turned()), (&*v, turned())], "$x.qkv_conv.conv.weight");
    projections.chain(convolutions).collect()
}
