//! GLM-4, dense (fused gate and up) and mixture of experts (sigmoid routing; the router is a plain parameter).

use mlx_format::checkpoint::ConfigError;

use super::{
    Architecture, EXPERTS, SHARED_EXPERTS, Sketch, Source, deepseek, drop_layers_from, llama::LINEARS,
    stack_mlp_experts,
};
use crate::decoder::{Attention, Decoder, Gate, HeadNorms, Layer, Linear, Mlp, Stage};
use crate::ops::Activation;

pub(super) fn dense(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "glm4", &[LINEARS.as_slice(), &["mlp.gate_up_proj"]].concat())
}

pub(super) fn moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &SHARED_EXPERTS, &EXPERTS].concat();
    let architecture = Architecture::plain(source, "glm4_moe", &linears)?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts()])
        .keep_dtype(&["e_score_correction_bias"]))
}

/// Norms before and after each layer; half of each head turns in pairs of neighbours.
pub(super) fn dense_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?.interleaved();
    sketch.llama_with(vec![rope], |layer, _, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        let linear = |name: &str| Linear::new(format!("{layer}mlp.{name}"));
        let mlp = Mlp { gate: Gate::Fused(linear("gate_up_proj")), activation, down: linear("down_proj") };
        Ok(vec![
            Stage::sandwich(
                norm("input_layernorm"),
                Layer::Attention(attention),
                norm("post_self_attn_layernorm"),
            ),
            Stage::sandwich(norm("post_attention_layernorm"), Layer::Mlp(mlp), norm("post_mlp_layernorm")),
        ])
    })
}

/// DeepSeek V3's routing on grouped-query attention.
pub(super) fn moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?;
    sketch.llama_with(vec![rope], |layer, index, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}self_attn.{name}"));
        let norms = sketch.config.bool("use_qk_norm", false).then(|| HeadNorms {
            q: norm("q_norm"),
            k: Some(norm("k_norm")),
            v: None,
            flat: false,
            per_head: false,
            after_rope: false,
        });
        let feed_forward = deepseek::feed_forward(sketch, layer, index)?;
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { norms, ..attention }), feed_forward))
    })
}
