//! OLMo 2 and 3: norms after the layers only, queries and keys normed over all heads at once; OLMo 3 slides on three of
//! four layers, with unscaled rotary embedding there. EXAONE 4 has the same blocks with norms per head.

use mlx_format::checkpoint::ConfigError;

use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, HeadNorms, Layer, Stage};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA };

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: DEFAULTS,
        biases: biases::ATTENTION_AND_NETWORK,
        ..Family::new(&["olmo2"], llama::llama, olmo2)
    },
    Family {
        defaults: Defaults { rope_theta: 500_000.0, ..DEFAULTS },
        biases: biases::ATTENTION,
        ..Family::new(&["olmo3"], llama::untied_by_default, olmo3)
    },
    Family {
        defaults: DEFAULTS,
        biases: biases::NONE,
        ..Family::new(&["exaone4"], llama::untied_by_default, exaone4)
    },
];

/// `x + norm(layer(x))`.
fn post_norm(sketch: Sketch<'_>, layer: &str, attention: Attention) -> Result<Vec<Stage>, ConfigError> {
    let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
    Ok(vec![
        Stage::new(Branch::post(Layer::Attention(attention), norm("post_attention_layernorm"))),
        Stage::new(Branch::post(Layer::Mlp(sketch.mlp(layer)?), norm("post_feedforward_layernorm"))),
    ])
}

fn norms(sketch: Sketch<'_>, layer: &str, flat: bool) -> HeadNorms {
    HeadNorms { flat, ..sketch.head_norms(layer, "q_norm", "k_norm") }
}

fn olmo2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        post_norm(sketch, layer, Attention { norms: Some(norms(sketch, layer, true)), ..attention })
    })
}

fn olmo3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let (head_dim, theta) = (sketch.head_dim()?, sketch.rope_theta(sketch.defaults.rope_theta));
    let global = sketch.rope_for(Some("full_attention"), head_dim, 1.0, theta)?;
    let local = match sketch.config.get("rope_parameters").and_then(|map| map.get("sliding_attention")) {
        Some(_) => sketch.rope_for(Some("sliding_attention"), head_dim, 1.0, theta)?,
        None => sketch.plain_rope(theta)?,
    };
    let ropes = vec![global, local];
    sketch.llama_with(ropes, |layer, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % 4 != 0);
        let attention = Attention {
            norms: Some(norms(sketch, layer, true)),
            rope: Some(usize::from(sliding)),
            window: window.filter(|_| sliding),
            ..attention
        };
        post_norm(sketch, layer, attention)
    })
}

/// Where some layers slide, the others have no positions.
fn exaone4(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    let pattern = match sketch.config.str("sliding_window_pattern") {
        Some(text) => text.len(),
        None => sketch.count_or("sliding_window_pattern", 4)?,
    };
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let sliding = sketch.is_sliding(index, pattern > 0 && (index + 1) % pattern != 0);
        let attention = Attention {
            norms: Some(norms(sketch, layer, false)),
            rope: (window.is_none() || sliding).then_some(0),
            window: window.filter(|_| sliding),
            ..attention
        };
        post_norm(sketch, layer, attention)
    })
}
