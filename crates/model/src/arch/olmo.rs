//! OLMo 2 and 3: norms after the layers only, queries and keys normed over all heads at once; OLMo 3 slides on three of four
//! layers, with unscaled rotary embedding there. EXAONE 4 has the same blocks with norms per head.

use mlx_format::checkpoint::ConfigError;

use super::Sketch;
use crate::decoder::{Attention, Branch, Decoder, HeadNorms, Layer, Stage};

/// `x + norm(layer(x))`.
fn post_norm(sketch: Sketch<'_>, layer: &str, attention: Attention) -> Result<Vec<Stage>, ConfigError> {
    let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
    Ok(vec![
        Stage::new(Branch::post(Layer::Attention(attention), norm("post_attention_layernorm"))),
        Stage::new(Branch::post(Layer::Mlp(sketch.mlp(layer)?), norm("post_feedforward_layernorm"))),
    ])
}

fn norms(sketch: Sketch<'_>, layer: &str, flat: bool) -> HeadNorms {
    let norm = |name: &str| sketch.rms(format!("{layer}self_attn.{name}"));
    HeadNorms {
        q: norm("q_norm"),
        k: Some(norm("k_norm")),
        v: None,
        flat,
        per_head: false,
        after_rope: false,
    }
}

pub(super) fn olmo2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        post_norm(sketch, layer, Attention { norms: Some(norms(sketch, layer, true)), ..attention })
    })
}

pub(super) fn olmo3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let (head_dim, theta) = (sketch.head_dim()?, sketch.rope_theta(sketch.default_theta()));
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
pub(super) fn exaone4(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
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
