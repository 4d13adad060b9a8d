//! Hunyuan dense: norms of queries and keys after the rotation.

use mlx_format::checkpoint::ConfigError;

use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, HeadNorms, Layer};

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    biases: biases::ATTENTION,
    ..Family::new(&["hunyuan_v1_dense"], llama::untied_by_default, decoder)
}];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let norms = sketch.any_layer_has(".self_attn.query_layernorm.weight").then(|| HeadNorms {
            after_rope: true,
            ..sketch.head_norms(layer, "query_layernorm", "key_layernorm")
        });
        let attention = Attention { norms, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
