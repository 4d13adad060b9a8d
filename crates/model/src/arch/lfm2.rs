//! Liquid LFM2: short convolutions between attention layers, always tied.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, Step, drop, make};

pub(super) fn lfm2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "conv.in_proj",
        "conv.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ];
    let mut architecture = Architecture::plain(source, "lfm2", &linears)?.rules([drop(r"^lm_head\.weight$")]);
    // `[channels, 1, kernel]` as transformers stores it; MLX's own form is `[channels, kernel, 1]`.
    let untouched = source
        .tensors
        .iter()
        .any(|(name, tensor)| name.ends_with("conv.weight") && tensor.shape.get(1) < tensor.shape.get(2));
    if untouched {
        architecture = architecture.rules([make(r"^(?<x>.*conv\.weight)$", [("$x", vec![Step::Transpose])])]);
    }
    Ok(architecture)
}
