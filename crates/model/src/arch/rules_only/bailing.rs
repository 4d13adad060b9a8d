//! Ling and Ring: linear attention between layers of latent or plain attention.

use std::fmt::Write as _;

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::words::named;
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::keys::wrong;
use crate::arch::rules::{
    EXPERTS, MLP, SHARED_EXPERTS, drop_layers_from, make, split_kv_b, stack_mlp_experts, turn_convolutions,
};

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["bailing_moe_linear"], linear),
    // Its third generation goes by the same name.
    Family::rules_only(
        &["bailing_hybrid"],
        |source| if is_third(source) { third(source) } else { hybrid(source) },
    ),
    Family::rules_only(&["bailing_moe_v3"], third),
];

const TABLES: [&str; 2] = ["word_embeddings", "lm_head"];
const ROUTER: [&str; 1] = ["mlp.gate.gate_proj"];
const ATTENTION: [&str; 3] = ["attention.query_key_value", "attention.dense", "attention.g_proj"];
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

fn linear(source: Source<'_>) -> Result<Architecture, ConfigError> {
    if source.config.bool("norm_head", false) {
        let why = "is true: mlx_lm divides a packed head by the norms of its columns as it loads it";
        return Err(wrong("norm_head", why));
    }
    let linears = [&ATTENTION[..], &MLP, &EXPERTS, &SHARED_EXPERTS, &ROUTER, &TABLES];
    Ok(named(source, "bailing_moe_linear", &linears)?
        .rules([stack_mlp_experts(), router()])
        .protect(&ROUTER)
        .keep_dtype(&["expert_bias"])
        .tied(source, false))
}

fn router() -> crate::arch::Rule {
    make(r"^(?<x>.*\.mlp\.gate)\.(?<k>weight|bias|scales|biases)$", [("$x.gate_proj.$k", Vec::new())])
}

fn hybrid(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&ATTENTION[..], &LATENT, &MLP, &EXPERTS, &SHARED_EXPERTS, &ROUTER, &TABLES];
    let architecture = named(source, "bailing_hybrid", &linears)?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts(), router()])
        .rules(split_kv_b(source)?)
        .protect(&ROUTER)
        .leave(r"\battention\.(embed_q|unembed_out)$")
        .keep_dtype(&["expert_bias"])
        .tied(source, false))
}

fn is_third(source: Source<'_>) -> bool {
    let is = |value: &Value| value.as_str() == Some("BailingMoeV3ForCausalLM");
    match source.config.0.get("architectures") {
        Some(Value::Array(all)) => all.iter().any(is),
        Some(one) => is(one),
        None => false,
    }
}

/// Its router is a plain parameter, and much of its attention stays as it is.
fn third(source: Source<'_>) -> Result<Architecture, ConfigError> {
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
