//! DeepSeek V2 and V3 (and Kimi K2, GLM-4.7-Flash): multi-head latent attention, routed and shared experts, routers
//! that are plain parameters.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Linears, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::defaults::Defaults;
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::llama;
use super::rules::{EXPERTS, SHARED_EXPERTS, drop_layers_from, split_kv_b, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Block, Decoder, Experts, Groups, Indexer, LatentAttention, LatentKeys, LatentQueries, Layer, Linear, Moe,
    Norm, Router, Scores, SharedExpert,
};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: BIASES, lengths: LENGTHS, ..Family::new(&["deepseek_v2"], v2, v2_decoder) },
    Family {
        biases: BIASES,
        lengths: LENGTHS,
        ..Family::new(&["deepseek_v3", "kimi_k2", "joyai_llm_flash"], v3, v3_decoder)
    },
    Family {
        defaults: Defaults {
            rms_norm_eps: 1e-5,
            rope_theta: 1_000_000.0,
            dense_layers: 1,
            ..Defaults::LLAMA
        },
        biases: BIASES,
        lengths: LENGTHS,
        ..Family::new(&["glm4_moe_lite"], v3, v3_decoder)
    },
    Family { biases: BIASES, lengths: LENGTHS, ..Family::new(&["deepseek_v32"], v32, v32_decoder) },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: BIASES,
        lengths: LENGTHS,
        ..Family::new(&["glm_moe_dsa"], v32, v32_decoder)
    },
];

const BIASES: &[BiasRule] =
    &[(&["q_a_proj", "kv_a_proj_with_mqa", "o_proj"], Bias::If("attention_bias")), (OTHERS, Bias::Never)];

pub(super) const LENGTHS: &[(&[&str], &[&str])] =
    &[(&["q_a_proj", "q_b_proj", "q_a_layernorm", "wq_b"], &["q_lora_rank"])];

pub(super) const LATENT: [&str; 6] = [
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.embed_q",
    "self_attn.unembed_out",
];

/// Queries, keys and the weights of heads of an indexer.
const INDEXER: [&str; 3] =
    ["self_attn.indexer.wq_b", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"];

pub(super) fn names() -> Vec<&'static str> {
    [&llama::linears()[..], &LATENT, &SHARED_EXPERTS, &EXPERTS].concat()
}

fn v2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture = Architecture::plain(source, "deepseek_v2", &names())?;
    Ok(architecture.rules([stack_mlp_experts()]))
}

fn v3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture = Architecture::plain(source, "deepseek_v3", &names())?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts()])
        .rules(split_kv_b(source)?)
        .keep_dtype(&["e_score_correction_bias"]))
}

/// With the linears of an indexer, which are quantized as the rest.
fn v32(source: Source<'_>) -> Result<Architecture, ConfigError> {
    if let Some(kinds) = source.config.get("indexer_types").and_then(Value::as_array)
        && kinds.iter().any(|kind| kind.as_str() != Some("full"))
    {
        return Err(undescribed(
            "indexer_types",
            "shares indexers between layers, which mlx_lm 0.32.2 does not know",
        ));
    }
    let mut architecture = v3(source)?;
    architecture.family = "deepseek_v32";
    if let Linears::Named(names) = &mut architecture.linears {
        names.extend(INDEXER);
    }
    architecture.unreached = INDEXER.to_vec();
    Ok(architecture)
}

fn v2_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    decoder(sketch, Corrected::WhereThere)
}

/// V3 with an indexer beside attention.
fn v32_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let mut decoder = decoder(sketch, Corrected::Always)?;
    for block in &mut decoder.blocks {
        let prefix = block.prefix.clone();
        for branch in block.stages.iter_mut().flat_map(|stage| &mut stage.branches) {
            if let Layer::Latent(latent) = &mut branch.layer {
                latent.indexer = Some(indexer(sketch, &prefix)?);
            }
        }
    }
    Ok(decoder)
}

fn indexer(sketch: Sketch<'_>, layer: &str) -> Result<Indexer, ConfigError> {
    let [queries, keys, weights] = linears(layer, INDEXER);
    Ok(Indexer {
        top_k: sketch.count_or("index_topk", 2048)?,
        queries,
        keys,
        norm: Norm::layer(format!("{layer}self_attn.indexer.k_norm"), 1e-6),
        weights,
        heads: sketch.count_or("index_n_heads", 64)?,
        width: sketch.count_or("index_head_dim", 128)?,
    })
}

fn v3_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    decoder(sketch, Corrected::Always)
}

fn decoder(sketch: Sketch<'_>, corrected: Corrected) -> Result<Decoder, ConfigError> {
    let rope_dim = sketch.count("qk_rope_head_dim")?;
    let rope = sketch.rope_for(None, rope_dim, 1.0, sketch.rope_theta(sketch.defaults.rope_theta))?;
    // transformers' V2 always turns neighbours; V3 where the config does not deny it.
    let rope = if sketch.config.bool("rope_interleave", true) { rope.interleaved() } else { rope };
    let block = |index| {
        let layer = sketch.layer(index);
        let attention = Layer::Latent(latent(sketch, &layer, sketch.count("v_head_dim")?)?);
        let feed_forward = feed_forward(sketch, Routed::new(corrected), &layer, index)?;
        let stages = sketch.pre_norm(&layer, attention, feed_forward);
        Ok(Block::new(layer, stages))
    };
    let blocks = (0..sketch.layers()?).map(block).collect::<Result<_, ConfigError>>()?;
    sketch.decoder(vec![rope], blocks)
}

/// Latent attention with value heads of so many features.
pub(super) fn latent(sketch: Sketch<'_>, layer: &str, value: usize) -> Result<LatentAttention, ConfigError> {
    latent_under(sketch, layer, LatentWords::USUAL, value)
}

/// What latent attention is called, and what its latent norms add to the variance.
#[derive(Clone, Copy)]
pub(super) struct LatentWords {
    pub(super) module: &'static str,
    pub(super) output: &'static str,
    pub(super) epsilon: f64,
}

impl LatentWords {
    /// Both latent norms keep transformers' default, whatever `rms_norm_eps` says.
    const USUAL: Self = Self { module: "self_attn", output: "o_proj", epsilon: 1e-6 };
}

/// [`latent`] under other names.
pub(super) fn latent_under(
    sketch: Sketch<'_>,
    layer: &str,
    LatentWords { module, output, epsilon }: LatentWords,
    value: usize,
) -> Result<LatentAttention, ConfigError> {
    let path = |name: &str| format!("{layer}{module}.{name}");
    let linear = |name: &str| Linear::new(path(name));
    let [q, q_down, q_up, kv_down, kv_up, embed_q, unembed_out] =
        ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "embed_q", "unembed_out"]
            .map(linear);
    let output = linear(output);
    let norm = |name: &str| Norm::rms(path(name), epsilon);
    let weight = |linear: &Linear| format!("{}.weight", linear.path);
    let (nope, rope) = (sketch.count("qk_nope_head_dim")?, sketch.count("qk_rope_head_dim")?);
    let queries = if sketch.config.get("q_lora_rank").is_some() {
        LatentQueries::LowRank { down: q_down, norm: norm("q_a_layernorm"), up: q_up }
    } else {
        LatentQueries::Direct(q)
    };
    let keys = if sketch.has(&weight(&embed_q)) {
        LatentKeys::Split { embed_q: weight(&embed_q), unembed_out: weight(&unembed_out) }
    } else {
        LatentKeys::Joint(kv_up)
    };
    Ok(LatentAttention {
        heads: sketch.heads()?,
        nope,
        rope,
        value,
        rank: sketch.count("kv_lora_rank")?,
        scale: ((nope + rope) as f64).powf(-0.5) * sketch.yarn_score_factor(),
        queries,
        down: kv_down,
        norm: norm("kv_a_layernorm"),
        keys,
        output,
        table: Some(0),
        query_scaling: None,
        indexer: None,
    })
}

/// What the networks of a layer are called below `mlp.`, and what their router does.
#[derive(Clone, Copy)]
pub(super) struct Routed {
    pub(super) corrected: Corrected,
    pub(super) experts: [&'static str; 3],
    pub(super) router: &'static str,
    /// Whether weights that a softmax makes are divided by their sum where config.json says so, too.
    pub(super) renormalizes: bool,
}

impl Routed {
    /// Under DeepSeek's names.
    pub(super) const fn new(corrected: Corrected) -> Self {
        Self { corrected, experts: EXPERTS, router: "gate", renormalizes: false }
    }
}

/// Whether the router adds a correction to its scores before it chooses experts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Corrected {
    /// V2 has none; some models of its type have.
    WhereThere,
    /// V3's model in mlx-lm does not load without.
    Always,
}

/// A dense network in the first layers, then experts; what GLM-4 MoE has, too.
pub(super) fn feed_forward(
    sketch: Sketch<'_>,
    words: Routed,
    layer: &str,
    index: usize,
) -> Result<Layer, ConfigError> {
    let dense = match sketch.is_dense(index) {
        Some(dense) => dense,
        None => {
            index < sketch.count_or("first_k_dense_replace", sketch.defaults.dense_layers)?
                || !index.is_multiple_of(sketch.count_or("moe_layer_freq", 1)?.max(1))
        }
    };
    if dense || sketch.config.get("n_routed_experts").is_none() {
        return Ok(Layer::Mlp(sketch.mlp(layer)?));
    }
    Ok(Layer::Moe(routed(sketch, words, layer)?))
}

/// Chosen experts beside those that every token passes.
pub(super) fn routed(
    sketch: Sketch<'_>,
    Routed { corrected, experts, router, renormalizes }: Routed,
    layer: &str,
) -> Result<Moe, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
    let correction = format!("{layer}mlp.gate.e_score_correction_bias");
    let correction = (corrected == Corrected::Always || sketch.has(&correction)).then_some(correction);
    let sigmoid = correction.is_some() || sketch.config.str("scoring_func") == Some("sigmoid");
    let count = sketch.count(sketch.first_key(&["n_routed_experts", "num_experts"]))?;
    let groups = Groups {
        count: sketch.count_or("n_group", 1)?,
        keep: sketch.count_or("topk_group", 1)?,
        best_two: sigmoid,
    };
    if groups.count == 0 || count % groups.count != 0 {
        return Err(wrong("n_group", &format!("is {}, which does not divide {count} experts", groups.count)));
    }
    let grouped = groups.count > 1 && sketch.config.str("topk_method") != Some("greedy");
    Ok(Moe {
        router: Router {
            scores: if sigmoid { Scores::Sigmoid } else { Scores::Softmax },
            correction,
            groups: grouped.then_some(groups),
            // transformers' V2 never does it.
            renormalize: ((sigmoid || renormalizes) && sketch.config.bool("norm_topk_prob", true))
                .then_some(1e-20),
            multiplier: sketch.float_or("routed_scaling_factor", 1.0),
            ..Router::new(
                Linear::new(format!("{layer}mlp.{router}")),
                sketch.top_k("num_experts_per_tok", count)?,
            )
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: network(experts) },
        shared: (sketch.count_or(sketch.first_key(&["n_shared_experts", "num_shared_experts"]), 0)? > 0)
            .then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
    })
}
