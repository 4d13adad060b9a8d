//! Microsoft Phi: phi-2 (parallel blocks, plain MLP, biases everywhere) and phi-3/phi-4 (fused q, k, v and gate, up).

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Sketch, Source, drop_tied_head};
use crate::decoder::{Attention, Branch, Decoder, Gate, HeadNorms, Layer, Linear, Mlp, Norm, Stage};
use crate::ops::Activation;

pub(super) fn phi3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "lm_head",
    ];
    Ok(Architecture::plain(source, "phi3", &linears)?.rules(drop_tied_head(source, false)))
}

pub(super) fn phi(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        "embed_tokens",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
        "lm_head",
    ];
    Architecture::plain(source, "phi", &linears)
}

pub(super) fn phi3_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    sketch.llama_with(vec![sketch.rope()?], |layer, _, _| {
        let linear = |name: &str| format!("{layer}{name}");
        let attention = sketch.fused_attention(linear("self_attn.qkv_proj"), linear("self_attn.o_proj"))?;
        let mlp = Mlp {
            gate: Gate::Fused(Linear::new(linear("mlp.gate_up_proj"))),
            activation,
            down: Linear::new(linear("mlp.down_proj")),
        };
        let attention = Attention { window, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(mlp)))
    })
}

/// Attention and MLP side by side behind one layer norm.
pub(super) fn phi_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("layer_norm_eps", 1e-5));
    let activation = sketch.activation("hidden_act", Activation::GeluTanh)?;
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?;
    let mut decoder = sketch.llama_with(vec![rope], |layer, _, attention| {
        let linear = |name: &str| Linear::new(format!("{layer}{name}"));
        let head_norm = |name: &str| norm(format!("{layer}self_attn.{name}"));
        let norms = sketch.config.bool("qk_layernorm", false).then(|| HeadNorms {
            q: head_norm("q_layernorm"),
            k: Some(head_norm("k_layernorm")),
            v: None,
            flat: false,
            per_head: false,
            after_rope: false,
        });
        let attention = Attention { norms, output: linear("self_attn.dense"), ..attention };
        let mlp = Mlp { gate: Gate::None(linear("mlp.fc1")), activation, down: linear("mlp.fc2") };
        let first = norm(format!("{layer}input_layernorm"));
        let branches = vec![
            Branch::pre(first.clone(), Layer::Attention(attention)),
            Branch::pre(first, Layer::Mlp(mlp)),
        ];
        Ok(vec![Stage::parallel(branches)])
    })?;
    decoder.norm = norm("model.final_layernorm".to_owned());
    Ok(decoder)
}
