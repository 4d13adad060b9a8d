//! Microsoft Phi: phi-2 (parallel blocks, plain MLP, biases everywhere) and phi-3/phi-4 (fused q, k, v and gate, up).

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, drop_inv_freq, drop_tied_head};

pub(super) fn phi3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "lm_head",
    ];
    Ok(Architecture::plain(source, "phi3", &linears)?
        .rules([drop_inv_freq()])
        .rules(drop_tied_head(source, false)))
}

pub(super) fn phi(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
        "lm_head",
    ];
    Ok(Architecture::plain(source, "phi", &linears)?.rules([drop_inv_freq()]))
}
