//! Qwen mixtures of experts, generations 2 and 3.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, EXPERTS, Sketch, Source, drop_tied_head, llama::LINEARS, stack_mlp_experts};
use crate::decoder::{
    Attention, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Router, Scores, SharedExpert,
};
use crate::ops::Activation;

/// The expert that every token passes, with a gate of its own.
pub(super) const SHARED_EXPERT: [&str; 4] =
    ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"];

/// Qwen 1.5 and 2 MoE: routers at the base width.
pub(super) fn qwen2_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &["mlp.gate"], &EXPERTS, &SHARED_EXPERT].concat();
    Ok(Architecture::plain(source, "qwen2_moe", &linears)?.rules([stack_mlp_experts()]))
}

/// Qwen 3 MoE: routers at 8 bits.
pub(super) fn qwen3_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [LINEARS.as_slice(), &["mlp.gate"], &EXPERTS].concat();
    Ok(Architecture::plain(source, "qwen3_moe", &linears)?
        .rules(drop_tied_head(source, false))
        .rules([stack_mlp_experts()])
        .protect(&["mlp.gate"]))
}

/// Sliding windows of Qwen 2 and 3, which the config must switch on.
fn window(sketch: Sketch<'_>, index: usize) -> Result<Option<usize>, ConfigError> {
    let first = sketch.count_or("max_window_layers", 28)?;
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    Ok(window.filter(|_| sketch.is_sliding(index, index >= first)))
}

/// Norms of queries and keys by head, since Qwen 3.
pub(super) fn head_norms(sketch: Sketch<'_>, layer: &str) -> HeadNorms {
    let norm = |name: &str| sketch.rms(format!("{layer}self_attn.{name}"));
    HeadNorms {
        q: norm("q_norm"),
        k: Some(norm("k_norm")),
        v: None,
        flat: false,
        per_head: false,
        after_rope: false,
    }
}

pub(super) fn qwen2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention { window: window(sketch, index)?, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

pub(super) fn qwen3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention =
            Attention { window: window(sketch, index)?, norms: Some(head_norms(sketch, layer)), ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

/// Experts behind a softmax router, some layers dense; with a gated shared expert where the checkpoint has one.
pub(super) fn feed_forward(sketch: Sketch<'_>, layer: &str, index: usize) -> Result<Layer, ConfigError> {
    // transformers 5 saves it under the second name.
    let count = match sketch.config.get("num_experts") {
        Some(_) => sketch.count_or("num_experts", 0)?,
        None => sketch.count_or("num_local_experts", 0)?,
    };
    if count == 0 && matches!(sketch.config.model_type()?, "qwen2_moe" | "qwen3_moe") {
        return Err(super::sketch::wrong("num_experts", "is missing"));
    }
    let dense = sketch.config.get("mlp_only_layers").and_then(serde_json::Value::as_array);
    let dense = dense.is_some_and(|list| list.iter().any(|layer| layer.as_u64() == Some(index as u64)));
    if dense || count == 0 || !(index + 1).is_multiple_of(sketch.count_or("decoder_sparse_step", 1)?.max(1)) {
        return Ok(Layer::Mlp(sketch.mlp(layer)?));
    }
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |name: &str| Sketch::gated(&format!("{layer}mlp.{name}"), activation);
    let shared = sketch.has(&format!("{layer}mlp.shared_expert_gate.weight")).then(|| SharedExpert {
        mlp: network("shared_expert"),
        gate: Some(Linear::new(format!("{layer}mlp.shared_expert_gate"))),
    });
    // Where config.json says nothing, Qwen3-Next and 3.5 do it, the others do not.
    let default = matches!(sketch.config.model_type()?, "qwen3_next" | "qwen3_5" | "qwen3_5_moe");
    let renormalize = sketch.config.bool("norm_topk_prob", default).then_some(0.0);
    Ok(Layer::Moe(Moe {
        router: Router {
            linear: Linear::new(format!("{layer}mlp.gate")),
            scores: Scores::Softmax,
            correction: None,
            groups: None,
            top_k: sketch.top_k("num_experts_per_tok", count)?,
            renormalize,
            multiplier: 1.0,
        },
        experts: Experts { count, mlp: network("switch_mlp") },
        shared,
    }))
}

pub(super) fn qwen2_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    let below = sketch.count_or("max_window_layers", 28)?;
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let window = window.filter(|_| sketch.is_sliding(index, (index + 1) % 2 != 0 && index < below));
        let attention = Layer::Attention(Attention { window, ..attention });
        Ok(sketch.pre_norm(layer, attention, feed_forward(sketch, layer, index)?))
    })
}

pub(super) fn qwen3_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096)).filter(|_| sketch.config.bool("use_sliding_window", false));
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention { window, norms: Some(head_norms(sketch, layer)), ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), feed_forward(sketch, layer, index)?))
    })
}
