//! Nemotron: layer norms with factor `1 + w`, a plain MLP with squared ReLU, half of each head rotated.

use mlx_format::checkpoint::ConfigError;

use super::biases::{self, Bias};
use super::family::Family;
use super::llama;
use super::rules::MLP;
use super::sketch::{Sketch, linears};
use crate::decoder::{Branch, Decoder, Gate, Layer, Mlp, Norm, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: biases::ATTENTION_AND_NETWORK,
    norm_bias: Bias::Always,
    ..Family::new(&["nemotron"], llama::untied_by_default, decoder)
}];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("norm_eps", 1e-5)).plus_one();
    let activation = sketch.activation("hidden_act", Activation::ReluSquared)?;
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?;
    let mut decoder = sketch.llama_with(vec![rope], |layer, _, attention| {
        let [_, up, down] = linears(layer, MLP);
        let mlp = Mlp::new(Gate::None(up), activation, down);
        let (first, second) =
            (norm(format!("{layer}input_layernorm")), norm(format!("{layer}post_attention_layernorm")));
        Ok(vec![
            Stage::new(Branch::pre(first, Layer::Attention(attention))),
            Stage::new(Branch::pre(second, Layer::Mlp(mlp))),
        ])
    })?;
    decoder.norm = norm("model.norm".to_owned());
    Ok(decoder)
}
