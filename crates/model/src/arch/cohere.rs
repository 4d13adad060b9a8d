//! Cohere Command: parallel blocks in the Llama shape, always tied.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias};
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::drop;
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, HeadNorms, Layer, Norm, Stage};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rope_theta: 500_000.0, ..Defaults::LLAMA },
        biases: biases::ATTENTION,
        norm_bias: Bias::If("layer_norm_bias"),
        ..Family::new(&["cohere"], always_tied, cohere)
    },
    Family {
        biases: biases::ATTENTION,
        norm_bias: Bias::If("layer_norm_bias"),
        ..Family::new(&["cohere2"], always_tied, cohere2)
    },
];

fn always_tied(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, "cohere", &llama::linears())?.rules([drop(r"^lm_head\.weight$")]))
}

/// Command R: every layer alike, with norms per head in the larger models.
fn cohere(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    parallel(sketch, |layer, _, attention| {
        let norm = |name: &str| layer_norm(sketch, format!("{layer}self_attn.{name}"));
        let norms = sketch
            .config
            .bool("use_qk_norm", false)
            .then(|| HeadNorms { per_head: true, ..HeadNorms::new(norm("q_norm"), norm("k_norm")) });
        Attention { norms, ..attention }
    })
}

/// Command R7B, Command A: three sliding layers with rotary embedding to each global one without positions.
fn cohere2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let pattern = sketch.count_or("sliding_window_pattern", 4)?.max(1);
    parallel(sketch, |_, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % pattern != 0);
        Attention { rope: sliding.then_some(0), window: window.filter(|_| sliding), ..attention }
    })
}

fn layer_norm(sketch: Sketch<'_>, path: String) -> Norm {
    Norm::layer(path, sketch.float_or("layer_norm_eps", 1e-5))
}

fn parallel(
    sketch: Sketch<'_>,
    mut change: impl FnMut(&str, usize, Attention) -> Attention,
) -> Result<Decoder, ConfigError> {
    let mut decoder = sketch.llama_with(vec![sketch.rope()?.interleaved()], |layer, index, attention| {
        let norm = layer_norm(sketch, format!("{layer}input_layernorm"));
        let attention = Layer::Attention(change(layer, index, attention));
        let mlp = Layer::Mlp(sketch.mlp(layer)?);
        Ok(vec![Stage::parallel(vec![Branch::pre(norm.clone(), attention), Branch::pre(norm, mlp)])])
    })?;
    decoder.norm = layer_norm(sketch, "model.norm".to_owned());
    decoder.head.multiplier = sketch.float_or("logit_scale", 0.0625);
    Ok(decoder)
}
