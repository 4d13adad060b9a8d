//! SmolLM3: Llama's shape, every fourth layer without positions.

use mlx_format::checkpoint::ConfigError;

use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Layer};

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rope_theta: 2_000_000.0, ..Defaults::LLAMA },
    biases: biases::ATTENTION_AND_NETWORK,
    ..Family::new(&["smollm3"], llama::llama, decoder)
}];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let interval = sketch.count_or("no_rope_layer_interval", 4)?.max(1);
    let list = sketch.config.get("no_rope_layers").and_then(serde_json::Value::as_array);
    let turns = |index: usize| {
        // 1 means that the layer has a rotary embedding.
        let listed = list.and_then(|list| list.get(index)).and_then(serde_json::Value::as_u64);
        listed.map_or(!(index + 1).is_multiple_of(interval), |flag| flag != 0)
    };
    let window = sketch.window_or(None).filter(|_| sketch.config.bool("use_sliding_window", false));
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention {
            rope: turns(index).then_some(0),
            window: window.filter(|_| sketch.is_sliding(index, !turns(index))),
            ..attention
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
