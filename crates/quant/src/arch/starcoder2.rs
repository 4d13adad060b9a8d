//! StarCoder 2: the Llama attention with GPT-2's MLP names.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, drop_inv_freq, drop_tied_head};

pub(super) fn starcoder2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        "lm_head",
    ];
    Ok(Architecture::plain(source, "starcoder2", &linears)?
        .rules([drop_inv_freq()])
        .rules(drop_tied_head(source, true)))
}
