//! Gemma 1 to 3, text: the Llama shape with tied heads.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::{MLP, drop};
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, HeadNorms, Layer, Rope, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family { defaults: DEFAULTS, biases: biases::NONE, ..Family::new(&["gemma"], always_tied, gemma) },
    Family { defaults: DEFAULTS, biases: biases::NONE, ..Family::new(&["gemma2"], always_tied, gemma2) },
    Family {
        defaults: DEFAULTS,
        biases: biases::NONE,
        ..Family::new(&["gemma3_text"], tied_if_missing, gemma3)
    },
];

/// The hub's configs leave heads of 256 out.
pub(super) const DEFAULTS: Defaults = Defaults { head_dim: Some(256), ..Defaults::LLAMA };

/// Gemma 1 and 2 have no head.
fn always_tied(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, "gemma", &llama::linears())?.rules([drop(r"^lm_head\.weight$")]))
}

/// Gemma 3 is tied when the checkpoint has no head, whatever the config says.
fn tied_if_missing(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture { tied_without_head: true, ..Architecture::plain(source, "gemma3", &llama::linears())? })
}

/// Norms that multiply by `1 + w`, embedding times the root of its width.
fn common(
    sketch: Sketch<'_>,
    ropes: Vec<Rope>,
    stages: impl FnMut(&str, usize, Attention) -> Result<Vec<Stage>, ConfigError>,
) -> Result<Decoder, ConfigError> {
    sketch.causal()?;
    let mut decoder = sketch.llama_with(ropes, stages)?;
    decoder.embedding.multiplier = (decoder.hidden_size as f64).sqrt();
    decoder.norm.plus_one = true;
    decoder.head.softcap = sketch.float("final_logit_softcapping");
    Ok(decoder)
}

fn activation(sketch: Sketch<'_>) -> Result<Activation, ConfigError> {
    sketch.activation("hidden_activation", Activation::GeluTanh)
}

/// Gemma 1; its `hidden_act` "gelu" means the tanh form.
fn gemma(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = activation(sketch)?;
    common(sketch, vec![sketch.rope()?], |layer, _, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}{name}")).plus_one();
        let mlp = Sketch::gated(layer, MLP, activation);
        Ok(vec![
            Stage::new(Branch::pre(norm("input_layernorm"), Layer::Attention(attention))),
            Stage::new(Branch::pre(norm("post_attention_layernorm"), Layer::Mlp(mlp))),
        ])
    })
}

/// Norms before and after attention and MLP.
fn sandwich(sketch: Sketch<'_>, layer: &str, attention: Attention) -> Result<Vec<Stage>, ConfigError> {
    let norm = |name: &str| sketch.rms(format!("{layer}{name}")).plus_one();
    let mlp = Sketch::gated(layer, MLP, activation(sketch)?);
    Ok(vec![
        Stage::sandwich(
            norm("input_layernorm"),
            Layer::Attention(attention),
            norm("post_attention_layernorm"),
        ),
        Stage::sandwich(
            norm("pre_feedforward_layernorm"),
            Layer::Mlp(mlp),
            norm("post_feedforward_layernorm"),
        ),
    ])
}

fn score_scale(sketch: Sketch<'_>) -> f64 {
    sketch.float_or("query_pre_attn_scalar", 256.0).powf(-0.5)
}

/// Soft caps, every other layer with a sliding window.
fn gemma2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let mut decoder = common(sketch, vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention {
            scale: score_scale(sketch),
            softcap: sketch.float_or_null("attn_logit_softcapping", 50.0),
            window: window.filter(|_| sketch.is_sliding(index, index % 2 == 0)),
            ..attention
        };
        sandwich(sketch, layer, attention)
    })?;
    decoder.head.softcap = sketch.float_or_null("final_logit_softcapping", 30.0);
    Ok(decoder)
}

/// Five sliding layers with a rotary base of their own to each global one; queries and keys normed.
fn gemma3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let pattern = sketch.count_or("sliding_window_pattern", 6)?.max(1);
    let head_dim = sketch.head_dim()?;
    let global = sketch.rope_for(Some("full_attention"), head_dim, 1.0, sketch.rope_theta(1e6))?;
    let local = match sketch.config.get("rope_parameters") {
        Some(_) => sketch.rope_for(Some("sliding_attention"), head_dim, 1.0, 10000.0)?,
        None => sketch.plain_rope(sketch.float_or("rope_local_base_freq", 10000.0))?,
    };
    common(sketch, vec![global, local], |layer, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % pattern != 0);
        let norm = |name: &str| sketch.rms(format!("{layer}self_attn.{name}")).plus_one();
        let norms = HeadNorms::new(norm("q_norm"), norm("k_norm"));
        let attention = Attention {
            scale: score_scale(sketch),
            norms: Some(norms),
            rope: Some(usize::from(sliding)),
            window: window.filter(|_| sliding),
            softcap: sketch.float("attn_logit_softcapping"),
            ..attention
        };
        sandwich(sketch, layer, attention)
    })
}
