//! The Llama shape: separate q, k, v, o and a gated or plain MLP. Most dense models are this one under names
//! of their own, with other norms, rotations and biases that do not matter to the names of their weights.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Sketch, Source, drop_tied_head};
use crate::decoder::{Attention, Decoder, Layer};

pub(super) const LINEARS: [&str; 9] = [
    "embed_tokens",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "lm_head",
];

/// Types whose mlx-lm model ties the head unless the config says otherwise.
pub(super) fn llama(source: Source<'_>) -> Result<Architecture, ConfigError> {
    with_head(source, true)
}

/// Types whose mlx-lm model has a head of its own unless the config says otherwise.
pub(super) fn untied_by_default(source: Source<'_>) -> Result<Architecture, ConfigError> {
    with_head(source, false)
}

/// Types that always have a head of their own.
pub(super) fn separate_head(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "llama", &LINEARS)
}

fn with_head(source: Source<'_>, tied_by_default: bool) -> Result<Architecture, ConfigError> {
    Ok(separate_head(source)?.rules(drop_tied_head(source, tied_by_default)))
}

/// Llama, and Mistral with its sliding window.
pub(super) fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    plain(sketch, None)
}

/// Where config.json says nothing, Mistral's window is 4096.
pub(super) fn mistral(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    plain(sketch, sketch.window_or(Some(4096)))
}

fn plain(sketch: Sketch<'_>, window: Option<usize>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let attention = Attention { window, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

/// ERNIE 4.5: pairs of neighbours turn.
pub(super) fn ernie(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let mut decoder = plain(sketch, None)?;
    decoder.ropes = vec![sketch.rope()?.interleaved()];
    Ok(decoder)
}
