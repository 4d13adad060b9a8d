//! StarCoder 2: the Llama attention with GPT-2's MLP names.

use mlx_format::checkpoint::ConfigError;

use super::{ATTENTION, Architecture, Sketch, Source, drop_tied_head};
use crate::decoder::{Attention, Branch, Decoder, Gate, Layer, Linear, Mlp, Norm, Stage};
use crate::ops::Activation;

pub(super) fn starcoder2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &["embed_tokens", "mlp.c_fc", "mlp.c_proj", "lm_head"]].concat();
    Ok(Architecture::plain(source, "starcoder2", &linears)?.rules(drop_tied_head(source, true)))
}

/// Layer norms and a plain MLP; the activation is the one that the config names (mlx-lm always takes exact GELU).
pub(super) fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("norm_epsilon", 1e-5));
    let activation = sketch.activation("hidden_act", Activation::GeluTanh)?;
    let window = sketch.window_or(None);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let linear = |name: &str| Linear::new(format!("{layer}mlp.{name}"));
        let mlp = Mlp { gate: Gate::None(linear("c_fc")), activation, down: linear("c_proj") };
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
