//! Ling and Ring (Bailing MoE): queries, keys and values in one matrix, names of their own, experts behind a router
//! with groups.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Rule, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::family::{ExpertWidths, Family};
use super::keys::{undescribed, wrong};
use super::rules::{EXPERTS, MLP, SHARED_EXPERTS, drop_tied_head, make, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, Groups, HeadNorms, Layer, Linear, Moe, Rope, Router, Scores, SharedExpert,
};
use crate::ops::Activation;

pub(super) const BIASES: &[BiasRule] = &[
    (&["query_key_value"], Bias::If("use_qkv_bias")),
    (&["lm_head"], Bias::Never),
    // As mlx-lm's router, whose bias the hub's models do not have.
    (&["gate_proj", "up_proj", "down_proj", "dense"], Bias::If("use_bias")),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: BIASES,
    experts: WIDTHS,
    ..Family::new(&["bailing_moe"], |source| bailing(source, &[]), decoder)
}];

pub(super) const WIDTHS: ExpertWidths =
    ExpertWidths { of_shared: &["moe_shared_expert_intermediate_size"], ..ExpertWidths::USUAL };

pub(super) const EMBEDDING: &str = "word_embeddings";
const ATTENTION: [&str; 2] = ["attention.query_key_value", "attention.dense"];
pub(super) const ROUTER: &str = "mlp.gate.gate_proj";
const CORRECTION: &str = "mlp.gate.expert_bias";

/// With linears of a family's own.
pub(super) fn bailing(source: Source<'_>, own: &[&'static str]) -> Result<Architecture, ConfigError> {
    if source.config.bool("norm_head", false) {
        return Err(undescribed(
            "norm_head",
            "is true: a head whose columns are normed, which packed matrices cannot be",
        ));
    }
    let names =
        [&ATTENTION[..], &MLP, &EXPERTS, &SHARED_EXPERTS, &[EMBEDDING, ROUTER, "lm_head"], own].concat();
    Ok(Architecture::plain(source, "bailing_moe", &names)?
        .rules(drop_tied_head(source, false))
        .rules([stack_mlp_experts(), router()])
        .protect(&[ROUTER])
        .keep_dtype(&["expert_bias"]))
}

/// The router is a linear of its own.
pub(super) fn router() -> Rule {
    make(r"^(?<x>.*\.mlp\.gate)\.(?<k>weight|bias|scales|biases)$", [("$x.gate_proj.$k", vec![])])
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    described(sketch, Routing::PLAIN, vec![rope(sketch, 1.0)?], |layer, _| {
        Ok(Layer::Attention(attention(sketch, layer)?))
    })
}

/// The rotary embedding of a part of each head; `default` where config.json does not say which.
pub(super) fn rope(sketch: Sketch<'_>, default: f64) -> Result<Rope, ConfigError> {
    let head_dim = sketch.head_dim()?;
    let turning = match sketch.config.get("rotary_dim") {
        Some(_) => sketch.count_or("rotary_dim", head_dim)? as f64 / head_dim as f64,
        None => default,
    };
    sketch.rope_of(head_dim, turning)
}

pub(super) fn attention(sketch: Sketch<'_>, layer: &str) -> Result<Attention, ConfigError> {
    let [qkv, output] = linears(layer, ATTENTION);
    let norm = |name: &str| sketch.rms(format!("{layer}attention.{name}"));
    let normed = sketch.config.bool("use_qk_norm", false);
    Ok(Attention {
        norms: normed.then(|| HeadNorms::new(norm("query_layernorm"), norm("key_layernorm"))),
        ..sketch.fused_attention(qkv, output)?
    })
}

/// What routers do where config.json does not say.
#[derive(Clone, Copy)]
pub(super) struct Routing {
    /// Scores are sigmoids, not a softmax.
    pub(super) sigmoid: bool,
    /// A correction is added to the scores for the choice.
    pub(super) corrected: bool,
}

impl Routing {
    pub(super) const PLAIN: Self = Self { sigmoid: false, corrected: false };
}

/// A mixer in each layer, dense networks in the first layers, then experts.
pub(super) fn described(
    sketch: Sketch<'_>,
    routing: Routing,
    ropes: Vec<Rope>,
    mixer: impl Fn(&str, usize) -> Result<Layer, ConfigError>,
) -> Result<Decoder, ConfigError> {
    let dense = sketch.count_or("first_k_dense_replace", 0)?;
    let mut decoder = sketch.llama_with_heads(ropes, |layer, index| {
        let routed = index >= dense && sketch.config.get("num_experts").is_some();
        let network = if routed {
            Layer::Moe(experts(sketch, routing, layer)?)
        } else {
            Layer::Mlp(sketch.mlp(layer)?)
        };
        Ok(sketch.pre_norm(layer, mixer(layer, index)?, network))
    })?;
    decoder.embedding.path = format!("model.{EMBEDDING}");
    Ok(decoder)
}

fn experts(sketch: Sketch<'_>, routing: Routing, layer: &str) -> Result<Moe, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
    let count = sketch.count("num_experts")?;
    let groups = Groups {
        count: sketch.count_or("n_group", 1)?,
        keep: sketch.count_or("topk_group", 4)?,
        best_two: true,
    };
    if groups.count == 0 || count % groups.count != 0 {
        return Err(wrong("n_group", &format!("is {}, which does not divide {count} experts", groups.count)));
    }
    let corrected = sketch.config.bool("moe_router_enable_expert_bias", routing.corrected);
    let sigmoid = sketch.config.str("score_function").map_or(routing.sigmoid, |name| name == "sigmoid");
    let router = Linear::new(format!("{layer}{ROUTER}"));
    let shares = sketch.count_or("num_shared_experts", 0)? > 0
        && sketch.config.bool("moe_router_enable_shared_expert", true);
    Ok(Moe {
        router: Router {
            scores: if sigmoid { Scores::Sigmoid } else { Scores::Softmax },
            correction: corrected.then(|| format!("{layer}{CORRECTION}")),
            groups: (groups.count > 1).then_some(groups),
            renormalize: sketch.config.bool("norm_topk_prob", true).then_some(1e-20),
            multiplier: sketch.float_or("routed_scaling_factor", 1.0),
            ..Router::new(router, sketch.top_k("num_experts_per_tok", count)?)
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: network(EXPERTS) },
        shared: shares.then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
    })
}
