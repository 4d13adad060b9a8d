//! Ministral 3: Llama's shape with yarn and queries that grow with the position.

use mlx_format::checkpoint::ConfigError;

use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Layer};

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    biases: biases::NONE,
    ..Family::new(&["ministral3"], llama::llama, decoder)
}];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let query_scaling = sketch.query_scaling();
    let window = sketch.window_or(None);
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let window = window.filter(|_| sketch.is_sliding(index, true));
        let attention = Attention { window, query_scaling, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
