//! OLMo 2 and 3: norms after the layers only, queries and keys normed over all heads at once; OLMo 3 slides on three of
//! four layers, with unscaled rotary embedding there. EXAONE 4 has the same blocks with norms per head. OLMoE norms
//! before its layers.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::keys::undescribed;
use super::llama;
use super::rules::{EXPERTS, drop_tied_head, stack_mlp_experts};
use super::sketch::Sketch;
use crate::decoder::{Attention, Branch, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Router, Stage};
use crate::ops::Activation;

/// OLMoE's router.
const ROUTER: &str = "mlp.gate";

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA };

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: DEFAULTS,
        biases: biases::ATTENTION_AND_NETWORK,
        ..Family::new(&["olmo2"], llama::llama, olmo2)
    },
    Family {
        defaults: Defaults { rope_theta: 500_000.0, ..DEFAULTS },
        biases: biases::ATTENTION,
        ..Family::new(&["olmo3"], llama::untied_by_default, olmo3)
    },
    Family { defaults: DEFAULTS, biases: biases::ATTENTION, ..Family::new(&["olmoe"], olmoe, olmoe_decoder) },
    Family {
        defaults: DEFAULTS,
        biases: biases::NONE,
        ..Family::new(&["exaone4"], llama::untied_by_default, exaone4)
    },
];

/// `x + norm(layer(x))`.
fn post_norm(sketch: Sketch<'_>, layer: &str, attention: Attention) -> Result<Vec<Stage>, ConfigError> {
    let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
    Ok(vec![
        Stage::new(Branch::post(Layer::Attention(attention), norm("post_attention_layernorm"))),
        Stage::new(Branch::post(Layer::Mlp(sketch.mlp(layer)?), norm("post_feedforward_layernorm"))),
    ])
}

fn norms(sketch: Sketch<'_>, layer: &str, flat: bool) -> HeadNorms {
    HeadNorms { flat, ..sketch.head_norms(layer, "q_norm", "k_norm") }
}

/// OLMoE: experts in every layer, behind a router that is quantized as the rest.
fn olmoe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &[ROUTER], &EXPERTS].concat();
    Ok(Architecture::plain(source, "olmoe", &linears)?
        .rules(drop_tied_head(source, true))
        .rules([stack_mlp_experts()]))
}

fn olmoe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    if sketch.float("clip_qkv").is_some() {
        return Err(undescribed("clip_qkv", "is set: queries, keys and values within bounds"));
    }
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let count = sketch.count("num_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let renormalize = sketch.config.bool("norm_topk_prob", false).then_some(0.0);
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let attention = Attention { norms: Some(norms(sketch, layer, true)), ..attention };
        let router = Router { renormalize, ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k) };
        let mlp = Sketch::gated(&format!("{layer}mlp."), EXPERTS, activation);
        let moe = Moe { router, latent: None, experts: Experts::Stacked { count, mlp }, shared: None };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Moe(moe)))
    })
}

fn olmo2(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        post_norm(sketch, layer, Attention { norms: Some(norms(sketch, layer, true)), ..attention })
    })
}

fn olmo3(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let (head_dim, theta) = (sketch.head_dim()?, sketch.rope_theta(sketch.defaults.rope_theta));
    let global = sketch.rope_for(Some("full_attention"), head_dim, 1.0, theta)?;
    let local = match sketch.config.get("rope_parameters").and_then(|map| map.get("sliding_attention")) {
        Some(_) => sketch.rope_for(Some("sliding_attention"), head_dim, 1.0, theta)?,
        None => sketch.plain_rope(theta)?,
    };
    let ropes = vec![global, local];
    sketch.llama_with(ropes, |layer, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % 4 != 0);
        let attention = Attention {
            norms: Some(norms(sketch, layer, true)),
            rope: Some(usize::from(sliding)),
            window: window.filter(|_| sliding),
            ..attention
        };
        post_norm(sketch, layer, attention)
    })
}

/// Where some layers slide, the others have no positions.
fn exaone4(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    let pattern = match sketch.config.str("sliding_window_pattern") {
        Some(text) => text.len(),
        None => sketch.count_or("sliding_window_pattern", 4)?,
    };
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let sliding = sketch.is_sliding(index, pattern > 0 && (index + 1) % pattern != 0);
        let attention = Attention {
            norms: Some(norms(sketch, layer, false)),
            rope: (window.is_none() || sliding).then_some(0),
            window: window.filter(|_| sliding),
            ..attention
        };
        post_norm(sketch, layer, attention)
    })
}
