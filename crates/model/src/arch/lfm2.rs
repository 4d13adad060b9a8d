//! Liquid LFM2: short convolutions between attention layers, always tied.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Sketch, Source, Step, drop, make};
use crate::decoder::{Attention, Branch, Decoder, Gate, HeadNorms, Layer, Linear, Mlp, Norm, Stage};
use crate::mixers::ShortConvolution;
use crate::ops::Activation;

pub(super) fn lfm2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "conv.in_proj",
        "conv.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ];
    let mut architecture = Architecture::plain(source, "lfm2", &linears)?.rules([drop(r"^lm_head\.weight$")]);
    // `[channels, 1, kernel]` as transformers stores it; MLX's own form is `[channels, kernel, 1]`.
    let untouched = source
        .tensors
        .iter()
        .any(|(name, tensor)| name.ends_with("conv.weight") && tensor.shape.get(1) < tensor.shape.get(2));
    if untouched {
        architecture = architecture.rules([make(r"^(?<x>.*conv\.weight)$", [("$x", vec![Step::Transpose])])]);
    }
    Ok(architecture)
}

pub(super) fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::rms(path, sketch.float_or("norm_eps", 1e-5));
    let listed = sketch.config.get("full_attn_idxs").and_then(serde_json::Value::as_array);
    let attends = |index: usize| match sketch.layer_type(index) {
        Some(kind) => kind == "full_attention",
        None => listed.is_none_or(|list| list.iter().any(|layer| layer.as_u64() == Some(index as u64))),
    };
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let linear = |name: &str| Linear::new(format!("{layer}{name}"));
        let mixer = if attends(index) {
            let norms = HeadNorms {
                q: norm(format!("{layer}self_attn.q_layernorm")),
                k: Some(norm(format!("{layer}self_attn.k_layernorm"))),
                v: None,
                flat: false,
                per_head: false,
                after_rope: false,
            };
            Layer::Attention(Attention {
                norms: Some(norms),
                output: linear("self_attn.out_proj"),
                ..attention
            })
        } else {
            Layer::ShortConvolution(ShortConvolution {
                input: linear("conv.in_proj"),
                convolution: format!("{layer}conv.conv"),
                output: linear("conv.out_proj"),
            })
        };
        let mlp = Mlp {
            gate: Gate::Separate { gate: linear("feed_forward.w1"), up: linear("feed_forward.w3") },
            activation: Activation::Silu,
            down: linear("feed_forward.w2"),
        };
        Ok(vec![
            Stage::new(Branch::pre(norm(format!("{layer}operator_norm")), mixer)),
            Stage::new(Branch::pre(norm(format!("{layer}ffn_norm")), Layer::Mlp(mlp))),
        ])
    })?;
    decoder.norm = norm("model.embedding_norm".to_owned());
    Ok(decoder)
}
