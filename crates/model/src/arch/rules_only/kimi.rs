//! Kimi K3: delta attention with a gate for each channel between layers of latent attention.

use std::collections::BTreeSet;

use mlx_format::checkpoint::ConfigError;

use crate::arch::Rule;
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::kimi_linear;
use crate::arch::rules::{drop_layers_from, join, make};
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family::rules_only(&["kimi_k3"], k3)];

/// Latent experts, residuals that attend to earlier ones, and one matrix for queries, keys and values of delta attention.
fn k3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const OWN: [&str; 7] = [
        "self_attn.g_proj",
        "self_attn.qkv_proj",
        "mlp.routed_expert_down_proj",
        "mlp.routed_expert_up_proj",
        "self_attention_res_proj",
        "mlp_res_proj",
        "output_attn_res_proj",
    ];
    let mut architecture = kimi_linear::names(source, "kimi_k3", &OWN)?;
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
