//! Hunyuan dense: norms of queries and keys after the rotation.

use mlx_format::checkpoint::ConfigError;

use super::Sketch;
use crate::decoder::{Attention, Decoder, HeadNorms, Layer};

pub(super) fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}self_attn.{name}"));
        let norms = sketch.any_layer_has(".self_attn.query_layernorm.weight").then(|| HeadNorms {
            q: norm("query_layernorm"),
            k: Some(norm("key_layernorm")),
            v: None,
            flat: false,
            per_head: false,
            after_rope: true,
        });
        let attention = Attention { norms, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
