//! GPT-NeoX and Pythia: fused, per-head interleaved q, k, v (which stay so); buffers stored as tensors.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, drop};

pub(super) fn gpt_neox(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_in",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        "embed_out",
    ];
    let mut architecture = Architecture::plain(source, "gpt_neox", &linears)?
        .rules([drop(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")]);
    architecture.prefixes =
        vec![("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model."), ("model.", "model."), ("", "model.")];
    Ok(architecture)
}
