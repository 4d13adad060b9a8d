//! Liquid LFM2: short convolutions between attention layers, always tied.

use mlx_format::checkpoint::{Config, ConfigError};

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::defaults::Defaults;
use super::family::Family;
use super::keys::{MOST_WIDTH, first_width};
use super::rules::{EXPERTS, drop, gated, make, stack_w_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Branch, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Norm, Projections, Router, Scores,
    ShortConvolution, Stage,
};
use crate::ops::Activation;
use crate::view::Step;

const BIASES: &[BiasRule] = &[(&["conv", "in_proj", "out_proj"], Bias::Unknown), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: BIASES,
        inner_width,
        lengths: LENGTHS,
        ..Family::new(&["lfm2"], lfm2, lfm2_decoder)
    },
    Family {
        defaults: Defaults { rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: BIASES,
        lengths: LENGTHS,
        ..Family::new(&["lfm2_moe"], lfm2_moe, lfm2_moe_decoder)
    },
];

const LENGTHS: &[(&[&str], &[&str])] = &[(&["conv"], &["conv_L_cache"])];

const CONVOLUTION: [&str; 2] = ["conv.in_proj", "conv.out_proj"];
const ATTENTION: [&str; 4] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"];

/// Gate, up, down.
const NETWORK: [&str; 3] = ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"];

/// Of a layer without experts among those that have some.
const DENSE: [&str; 3] = gated!("feed_forward");

const MOE: &str = "feed_forward";
const ROUTER: &str = "feed_forward.gate";
const CORRECTION: &str = "expert_bias";

fn lfm2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    common(source, "lfm2", &NETWORK)
}

/// With experts; MLX calls the three matrices of all networks by their names.
fn lfm2_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let dense = |own: &str, name| {
        make(&format!(r"^(?<x>.*\.feed_forward)\.{own}\.(?<k>weight|scales|biases)$"), [(name, vec![])])
    };
    Ok(common(source, "lfm2_moe", &[&DENSE[..], &EXPERTS, &[ROUTER]].concat())?
        .rules(stack_w_experts(MOE))
        .rules([dense("w1", "$x.gate_proj.$k"), dense("w2", "$x.down_proj.$k"), dense("w3", "$x.up_proj.$k")])
        .protect(&[ROUTER])
        .keep_dtype(&[CORRECTION]))
}

fn common(
    source: Source<'_>,
    family: &'static str,
    networks: &[&'static str],
) -> Result<Architecture, ConfigError> {
    let linears = [&["embed_tokens"][..], &CONVOLUTION, &ATTENTION, networks].concat();
    let mut architecture = Architecture::plain(source, family, &linears)?.rules([drop(r"^lm_head\.weight$")]);
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

/// Two thirds of the width that config.json says, times a factor, rounded up, where it says so.
fn inner_width(config: &Config) -> Result<Option<usize>, ConfigError> {
    let width = first_width(config, &["intermediate_size", "block_ff_dim"])?;
    if !config.bool("block_auto_adjust_ff_dim", false) {
        return Ok(width);
    }
    let factor = config.get("block_ffn_dim_multiplier").and_then(serde_json::Value::as_f64).unwrap_or(1.0);
    let multiple = config.count("block_multiple_of").unwrap_or(256).clamp(1, MOST_WIDTH);
    Ok(width.map(|width| {
        let width = ((2 * width / 3) as f64 * factor).min(MOST_WIDTH as f64) as usize;
        width.next_multiple_of(multiple)
    }))
}

fn lfm2_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    decoder(sketch, |layer, _| Ok(Layer::Mlp(Sketch::gated(layer, NETWORK, Activation::Silu))))
}

/// A sigmoid router whose correction only chooses.
fn lfm2_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let count = sketch.count("num_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let dense = sketch.count_or("num_dense_layers", 2)?;
    decoder(sketch, |layer, index| {
        if index < dense {
            return Ok(Layer::Mlp(Sketch::gated(layer, DENSE, Activation::Silu)));
        }
        let corrected = sketch.config.bool("use_expert_bias", true);
        Ok(Layer::Moe(Moe {
            router: Router {
                scores: Scores::Sigmoid,
                correction: corrected.then(|| format!("{layer}{MOE}.{CORRECTION}")),
                renormalize: sketch.config.bool("norm_topk_prob", true).then_some(1e-6),
                multiplier: sketch.float_or("routed_scaling_factor", 1.0),
                ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k)
            },
            latent: None,
            experts: Experts::Stacked {
                count,
                mlp: Sketch::gated(&format!("{layer}{MOE}."), EXPERTS, Activation::Silu),
            },
            shared: None,
        }))
    })
}

fn decoder(
    sketch: Sketch<'_>,
    network: impl Fn(&str, usize) -> Result<Layer, ConfigError>,
) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::rms(path, sketch.float_or("norm_eps", 1e-5));
    let listed = sketch.config.get("full_attn_idxs").and_then(serde_json::Value::as_array);
    let attends = |index: usize| match sketch.layer_type(index) {
        Some(kind) => kind == "full_attention",
        None => listed.is_none_or(|list| list.iter().any(|layer| layer.as_u64() == Some(index as u64))),
    };
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let mixer = if attends(index) {
            let head_norm = |name: &str| norm(format!("{layer}self_attn.{name}"));
            let norms = Some(HeadNorms::new(head_norm("q_layernorm"), head_norm("k_layernorm")));
            let [q, k, v, output] = linears(layer, ATTENTION);
            let projections = Projections::Separate { q, k, v };
            Layer::Attention(Attention { projections, output, norms, ..attention })
        } else {
            let [input, output] = linears(layer, CONVOLUTION);
            let convolution = format!("{layer}conv.conv");
            Layer::ShortConvolution(ShortConvolution { input, convolution, output })
        };
        Ok(vec![
            Stage::new(Branch::pre(norm(format!("{layer}operator_norm")), mixer)),
            Stage::new(Branch::pre(norm(format!("{layer}ffn_norm")), network(layer, index)?)),
        ])
    })?;
    decoder.norm = norm(sketch.place.name("model.embedding_norm"));
    Ok(decoder)
}
