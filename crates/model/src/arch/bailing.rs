//! Ling and Ring (Bailing MoE): queries, keys and values in one matrix, names of their own, experts behind a router
//! with groups.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::family::{ExpertWidths, Family};
use super::keys::{undescribed, wrong};
use super::rules::{EXPERTS, MLP, SHARED_EXPERTS, drop_tied_head, make, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, Groups, HeadNorms, Layer, Linear, Moe, Projections, Router, Scores,
    SharedExpert,
};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[
    (&["query_key_value"], Bias::If("use_qkv_bias")),
    (&["lm_head"], Bias::Never),
    // As mlx-lm's router, whose bias the hub's models do not have.
    (&["gate_proj", "up_proj", "down_proj", "dense"], Bias::If("use_bias")),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: BIASES,
    experts: ExpertWidths { of_shared: &["moe_shared_expert_intermediate_size"], ..ExpertWidths::USUAL },
    ..Family::new(&["bailing_moe"], bailing, decoder)
}];

const EMBEDDING: &str = "word_embeddings";
const ATTENTION: [&str; 2] = ["attention.query_key_value", "attention.dense"];
const ROUTER: &str = "mlp.gate.gate_proj";
const CORRECTION: &str = "mlp.gate.expert_bias";

fn bailing(source: Source<'_>) -> Result<Architecture, ConfigError> {
    if source.config.bool("norm_head", false) {
        return Err(undescribed(
            "norm_head",
            "is true: a head whose columns are normed, which packed matrices cannot be",
        ));
    }
    let names = [&ATTENTION[..], &MLP, &EXPERTS, &SHARED_EXPERTS, &[EMBEDDING, ROUTER, "lm_head"]].concat();
    Ok(Architecture::plain(source, "bailing_moe", &names)?
        .rules(drop_tied_head(source, false))
        .rules([
            stack_mlp_experts(),
            make(r"^(?<x>.*\.mlp\.gate)\.(?<k>weight|bias)$", [("$x.gate_proj.$k", vec![])]),
        ])
        .protect(&[ROUTER])
        .keep_dtype(&["expert_bias"]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let (heads, kv_heads) = (sketch.heads()?, sketch.kv_heads()?);
    let head_dim = sketch.head_dim()?;
    let turning = sketch.count_or("rotary_dim", head_dim)? as f64 / head_dim as f64;
    let dense = sketch.count_or("first_k_dense_replace", 0)?;
    let mut decoder = sketch.llama_with(vec![sketch.rope_of(head_dim, turning)?], |layer, index, _| {
        let [qkv, output] = linears(layer, ATTENTION);
        let norm = |name: &str| sketch.rms(format!("{layer}attention.{name}"));
        let normed = sketch.config.bool("use_qk_norm", false);
        let attention = Attention {
            norms: normed.then(|| HeadNorms::new(norm("query_layernorm"), norm("key_layernorm"))),
            ..Attention::new(heads, kv_heads, head_dim, Projections::Concatenated(qkv), output)
        };
        let routed = index >= dense && sketch.config.get("num_experts").is_some();
        let network =
            if routed { Layer::Moe(experts(sketch, layer)?) } else { Layer::Mlp(sketch.mlp(layer)?) };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })?;
    decoder.embedding.path = format!("model.{EMBEDDING}");
    Ok(decoder)
}

fn experts(sketch: Sketch<'_>, layer: &str) -> Result<Moe, ConfigError> {
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
    let corrected = sketch.config.bool("moe_router_enable_expert_bias", false);
    let sigmoid = sketch.config.str("score_function") == Some("sigmoid");
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
        experts: Experts::Stacked { count, mlp: network(EXPERTS) },
        shared: shares.then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
    })
}
