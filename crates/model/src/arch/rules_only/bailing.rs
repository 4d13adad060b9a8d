//! The third generation of Ling: delta attention with a gate for each channel between layers of latent attention.

use std::fmt::Write as _;

use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::words::named;
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{
    EXPERTS, MLP, SHARED_EXPERTS, drop_layers_from, split_kv_b, stack_mlp_experts, turn_convolutions,
};

pub(super) const FAMILIES: &[Family] = &[Family::rules_only(&["bailing_moe_v3"], third)];

const TABLES: [&str; 2] = ["word_embeddings", "lm_head"];
const LATENT: [&str; 7] = [
    "attention.q_proj",
    "attention.q_a_proj",
    "attention.q_b_proj",
    "attention.kv_a_proj_with_mqa",
    "attention.embed_q",
    "attention.unembed_out",
    "attention.dense",
];
const DELTA: [&str; 7] = [
    "attention.k_proj",
    "attention.v_proj",
    "attention.f_proj",
    "attention.b_proj",
    "attention.g_proj",
    "attention.o_proj",
    "attention.q_proj",
];

/// Whether a `bailing_hybrid` is of the third generation, which goes by the name of the second.
pub(in crate::arch) fn is_third(config: &Config) -> bool {
    let is = |value: &Value| value.as_str() == Some("BailingMoeV3ForCausalLM");
    match config.0.get("architectures") {
        Some(Value::Array(all)) => all.iter().any(is),
        Some(one) => is(one),
        None => false,
    }
}

/// Its router is a plain parameter, and much of its attention stays as it is.
pub(in crate::arch) fn third(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&LATENT[..], &DELTA, &MLP, &EXPERTS, &SHARED_EXPERTS, &TABLES];
    let architecture = named(source, "bailing_moe_v3", &linears)?;
    let layers = architecture.layers;
    let every = source.config.count("layer_group_size").unwrap_or(4).max(1);
    let mut latent = String::new();
    for layer in (0..layers).filter(|layer| (layer + 1) % every == 0 || *layer >= layers / every * every) {
        let _ = write!(latent, "{}{layer}", if latent.is_empty() { "" } else { "|" });
    }
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts()])
        .rules(split_kv_b(source)?)
        .rules(turn_convolutions(source, r"_conv1d"))
        .parameters(&["mlp.gate", "q_conv1d", "k_conv1d", "v_conv1d"])
        .leave(&format!(
            r"^(model\.word_embeddings|lm_head)$|\battention\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|embed_q|unembed_out|b_proj)$|\blayers\.({latent})\.attention\.(q_proj|g_proj)$"
        ))
        .tied(source, false))
}
