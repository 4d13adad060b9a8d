//! Muse Glimmer: an output gate of attention, norms without weights of embedding, queries and keys, three sliding
//! layers that turn to each global one without positions.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::{MLP, drop_tied_head};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Decoder, HeadNorms, Layer, Norm, OutputGate, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, head_dim: Some(128), ..Defaults::LLAMA },
    biases: biases::NONE,
    ..Family::new(&["muse_glimmer"], muse_glimmer, decoder)
}];

const GATE: [&str; 1] = ["self_attn.gate_proj"];

/// The gate of attention is a linear of its own.
fn muse_glimmer(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &GATE].concat();
    Ok(Architecture::plain(source, "muse_glimmer", &names)?.rules(drop_tied_head(source, false)))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let weightless = || Norm { path: None, ..sketch.rms("") };
    let activation = sketch.activation("hidden_activation", Activation::Silu)?;
    let window = sketch.window_or(Some(2048));
    let factor = sketch.float_or("qk_scale_factor", 3.87);
    let thetas = sketch.config.get("layer_rope_theta");
    let after = sketch.float_or("post_norm_eps", 1e-8);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % 4 != 0);
        let theta = thetas.and_then(|list| list.get(index)?.as_f64());
        let norm = |name: &str| sketch.rms(format!("{layer}{name}")).plus_one();
        let post = |name: &str| Norm { epsilon: after, ..norm(name) };
        let [linear] = linears(layer, GATE);
        let gate = OutputGate::Linear { linear, activation: Activation::Sigmoid, per_head: false };
        let attention = Attention {
            scale: attention.scale * factor,
            norms: Some(HeadNorms::new(weightless(), weightless())),
            rope: theta.map_or(sliding, |theta| theta != 0.0).then_some(0),
            window: window.filter(|_| sliding),
            output_gate: Some(gate),
            ..attention
        };
        let mlp = Sketch::gated(layer, MLP, activation);
        Ok(vec![
            Stage::sandwich(
                norm("input_layernorm"),
                Layer::Attention(attention),
                post("post_attention_layernorm"),
            ),
            Stage::sandwich(
                norm("pre_feedforward_layernorm"),
                Layer::Mlp(mlp),
                post("post_feedforward_layernorm"),
            ),
        ])
    })?;
    if let Some(first) = decoder.blocks.first_mut() {
        first.norm = Some(weightless());
    }
    decoder.head.multiplier = sketch.float_or("output_multiplier", 26f64.powf(-0.5));
    decoder.head.softcap = sketch.float_or_null("final_logit_softcapping", 20.0);
    Ok(decoder)
}
