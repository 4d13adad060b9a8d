//! StarCoder 2: the Llama attention with GPT-2's MLP names.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias};
use super::family::Family;
use super::rules::{ATTENTION, drop_tied_head};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Branch, Decoder, Gate, Layer, Mlp, Norm, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: biases::ALL_BUT_HEAD,
    norm_bias: Bias::Always,
    ..Family::new(&["starcoder2"], starcoder2, decoder)
}];

const NETWORK: [&str; 2] = ["mlp.c_fc", "mlp.c_proj"];

fn starcoder2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &NETWORK, &["embed_tokens", "lm_head"]].concat();
    Ok(Architecture::plain(source, "starcoder2", &linears)?.rules(drop_tied_head(source, true)))
}

/// Layer norms and a plain MLP; the activation is the one that the config names (mlx-lm always takes exact GELU).
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("norm_epsilon", 1e-5));
    let activation = sketch.activation("hidden_act", Activation::GeluTanh)?;
    let window = sketch.window_or(None);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let [inner, down] = linears(layer, NETWORK);
        let mlp = Mlp::new(Gate::None(inner), activation, down);
        let (first, second) =
            (norm(format!("{layer}input_layernorm")), norm(format!("{layer}post_attention_layernorm")));
        Ok(vec![
            Stage::new(Branch::pre(first, Layer::Attention(Attention { window, ..attention }))),
            Stage::new(Branch::pre(second, Layer::Mlp(mlp))),
        ])
    })?;
    decoder.norm = norm("model.norm".to_owned());
    Ok(decoder)
}
