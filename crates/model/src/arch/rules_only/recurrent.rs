//! Recurrent layers of other kinds: gated delta nets of OLMo, the RG-LRU of Griffin, RWKV.

use mlx_format::checkpoint::ConfigError;

use super::words::{EMBEDDING_AND_HEAD, named};
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{ATTENTION, MLP, gated, make, turn_convolutions};
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["olmo_hybrid"], olmo),
    Family::rules_only(&["recurrent_gemma"], griffin),
    Family::rules_only(&["rwkv7"], rwkv),
];

fn olmo(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const DELTA: [&str; 7] = [
        "linear_attn.q_proj",
        "linear_attn.k_proj",
        "linear_attn.v_proj",
        "linear_attn.a_proj",
        "linear_attn.b_proj",
        "linear_attn.g_proj",
        "linear_attn.o_proj",
    ];
    Ok(named(source, "olmo_hybrid", &[&ATTENTION, &DELTA, &MLP, &EMBEDDING_AND_HEAD])?
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["q_conv1d", "k_conv1d", "v_conv1d"])
        .tied(source, false))
}

fn griffin(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const TEMPORAL: [&str; 7] = [
        "temporal_block.linear_x",
        "temporal_block.linear_y",
        "temporal_block.linear_out",
        "temporal_block.q_proj",
        "temporal_block.k_proj",
        "temporal_block.v_proj",
        "temporal_block.o_proj",
    ];
    const GATES: [&str; 5] =
        ["conv_1d", "input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias"];
    let linears = [&TEMPORAL[..], &gated!("mlp_block"), &EMBEDDING_AND_HEAD];
    Ok(named(source, "recurrent_gemma", &linears)?
        .rules(turn_convolutions(source, "conv_1d"))
        .parameters(&GATES))
}

/// Vectors by heads stand in rows, one a head.
fn rwkv(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const LINEARS: [&str; 10] = [
        "lora.0",
        "lora.2",
        "r_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "ffn.key",
        "ffn.value",
        "embeddings",
        "lm_head",
    ];
    const PARAMETERS: [&str; 10] = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k", "g_norm"];
    let heads = source.config.count("hidden_size")? / source.config.count("head_dim")?.max(1);
    let by_heads =
        make(r"^(?<x>.*(k_k|k_a|g_norm.*))$", [("$x", vec![Step::Flatten, Step::SplitRows(heads)])]);
    Ok(named(source, "rwkv7", &[&LINEARS])?
        .rules([by_heads])
        .protect(&["lora.2", "embeddings"])
        .parameters(&PARAMETERS)
        .tied(source, false))
}
