//! Gemma 3n, text: several residual streams, of which a layer computes one; a low-rank residual beside attention;
//! networks of which the first ones see the largest parts of their gates alone; inputs of each layer's own; and upper
//! layers that share keys and values with lower ones, although their own are in the checkpoint.

use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::gemma;
use super::keys::{at_most, wrong};
use super::mlx_vlm::Layout;
use super::rules::{ATTENTION, MLP, drop};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Embedding, Head, HeadNorms, Layer, Linear, Norm, PerLayerInputs,
    Projections, Stage, Streams, Update,
};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: gemma::DEFAULTS,
    biases: biases::NONE,
    ..Family::new(&["gemma3n"], gemma3n, decoder)
}];

const TABLES: [&str; 3] = ["embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection"];

const SPREAD: &str = "altup_projections";
const GATHER: &str = "altup_unembed_projections";

const LAUREL: [&str; 2] = ["laurel.linear_left", "laurel.linear_right"];

/// What chooses factors, and the factors of predictions and corrections.
const UPDATE: [&str; 3] = ["altup.modality_router", "altup.prediction_coefs", "altup.correction_coefs"];

/// Of each layer: what gates its own input, and what brings that into the streams.
const INPUTS: [&str; 2] = ["per_layer_input_gate", "per_layer_projection"];

/// No model has more streams.
const MOST_STREAMS: usize = 64;

/// Where the language model stands.
const PLACE: &str = "model.language_model.";

/// The kernel by which mlx-vlm tells whether those of images are turned (`mlx_vlm/models/gemma3n/vision.py`, `sanitize`).
const KERNEL: &str = "vision_tower.timm_model.blocks.0.0.conv_exp.weight";

/// The language model's own names stay.
fn gemma3n(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let streams = ["altup_projections.#", "altup_unembed_projections.#"];
    let layers = source.config.count("num_hidden_layers")?;
    let linears = [&TABLES[..], &streams, &LAUREL, &UPDATE, &INPUTS, &ATTENTION, &MLP].concat();
    let kernel = source.tensors.iter().find(|(name, _)| name.ends_with(KERNEL));
    let channels_first =
        kernel.is_some_and(|(_, tensor)| matches!(tensor.shape[..], [_, inner, .., last] if inner >= last));
    let layout = Layout::Gemma3n { channels_first };
    let mut architecture =
        Architecture::with_layers("gemma3n", layers, &linears).rules([drop(r"^lm_head\.")]);
    architecture.towers = Some(layout.towers(source.config));
    Ok(architecture)
}

/// The number that a normally distributed one is below with this probability: what mlx-lm and transformers take from
/// the inverse error function, found by halving.
fn normal_quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-40f64, 40f64);
    for _ in 0..64 {
        let middle = f64::midpoint(low, high);
        if libm::erfc(-middle * std::f64::consts::FRAC_1_SQRT_2) / 2.0 < probability {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// The table of tokens, and that of layers' own inputs, which has a row for all tokens but the last ones.
fn embedding(sketch: Sketch<'_>, hidden_size: usize) -> Result<Embedding, ConfigError> {
    let width = sketch.count_or("hidden_size_per_layer_input", 256)?;
    let [table, own_table, projection] = linears(PLACE, TABLES);
    let per_layer = PerLayerInputs {
        path: own_table.path,
        rows: Some(sketch.count_or("vocab_size_per_layer_input", 262_144)?),
        multiplier: (width as f64).sqrt(),
        projection,
        projection_multiplier: (hidden_size as f64).powf(-0.5),
        norm: sketch.rms(format!("{PLACE}per_layer_projection_norm")),
        sum_multiplier: 0.5f64.sqrt(),
        width,
    };
    Ok(Embedding {
        path: table.path,
        positions: None,
        multiplier: (hidden_size as f64).sqrt(),
        per_layer: Some(per_layer),
    })
}

/// What a layer does with the streams.
fn update(sketch: Sketch<'_>, layer: &str, active: usize, activation: Activation) -> Update {
    let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
    let [router, prediction, correction] = linears(layer, UPDATE);
    let [gate, projection] = linears(layer, INPUTS);
    let own = Layer::PerLayerInput { gate, activation, projection };
    Update {
        active,
        norm: norm("altup.router_norm"),
        router,
        prediction,
        correction,
        scale: format!("{layer}altup.correct_output_scale"),
        scales: sketch.config.bool("altup_correct_scale", true),
        others: Branch::post(own, norm("post_per_layer_input_norm")),
    }
}

fn decoder(outer: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let text = outer.config.0.get("text_config").and_then(Value::as_object);
    let config = Config(text.ok_or_else(|| wrong("text_config", "is missing or no object"))?.clone());
    let sketch = Sketch { config: &config, ..outer };
    sketch.causal()?;
    let (layers, hidden_size) = (sketch.layers()?, sketch.count("hidden_size")?);
    let (heads, kv_heads, head_dim) = (sketch.heads()?, sketch.kv_heads()?, sketch.head_dim()?);
    let streams = at_most(MOST_STREAMS, "altup_num_inputs", sketch.count_or("altup_num_inputs", 4)?.max(1))?;
    let active = sketch.count_or("altup_active_idx", 0)?;
    if active >= streams {
        return Err(wrong("altup_active_idx", &format!("is {active}, but there are {streams} streams")));
    }
    let own = layers.saturating_sub(sketch.count_or("num_kv_shared_layers", 15)?);
    let slides = |index: usize| sketch.is_sliding(index, !(index + 1).is_multiple_of(5));
    let source = |index: usize| (0..own).rev().find(|&earlier| slides(earlier) == slides(index));
    let activation = sketch.activation("hidden_activation", Activation::GeluTanh)?;
    let rank = sketch.count_or("laurel_rank", 64)?;
    let window = sketch.window_or(Some(512));
    let global = sketch.rope_for(Some("full_attention"), head_dim, 1.0, sketch.rope_theta(1e6))?;
    let local = match sketch.config.get("rope_parameters") {
        Some(_) => sketch.rope_for(Some("sliding_attention"), head_dim, 1.0, 10000.0)?,
        None => sketch.plain_rope(sketch.float_or("rope_local_base_freq", 10000.0))?,
    };
    let attention = |layer: &str, index: usize| {
        let [q, k, v, output] = linears(layer, ATTENTION);
        let norms = HeadNorms {
            v: Some(Norm { path: None, ..sketch.rms("") }),
            ..sketch.head_norms(layer, "q_norm", "k_norm")
        };
        let projections = match source(index) {
            Some(block) if index >= own => Projections::Shared { q, block, unread: Some([k, v]) },
            _ => Projections::Separate { q, k, v },
        };
        Attention {
            scale: 1.0,
            norms: Some(norms),
            rope: Some(usize::from(slides(index))),
            window: window.filter(|_| slides(index)),
            keep_keys: index < own && (own..layers).any(|later| source(later) == Some(index)),
            ..Attention::new(heads, kv_heads, head_dim, projections, output)
        }
    };
    let block = |index: usize| {
        let layer = format!("{PLACE}layers.{index}.");
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        let [left, right] = linears(&layer, LAUREL);
        let laurel = Layer::Laurel { left, right, rank, norm: norm("laurel.post_laurel_norm") };
        let attends = Layer::Attention(attention(&layer, index));
        let sparsity = sketch.of_layer("activation_sparsity_pattern", index).and_then(Value::as_f64);
        let mut mlp = Sketch::gated(&layer, MLP, activation);
        mlp.cutoff = sparsity.filter(|part| *part > 0.0).map(normal_quantile);
        let branches = vec![
            Branch::sandwich(norm("input_layernorm"), attends, norm("post_attention_layernorm")),
            Branch::pre(norm("input_layernorm"), laurel),
        ];
        let stages = vec![
            Stage { scale: 0.5f64.sqrt(), ..Stage::parallel(branches) },
            Stage::sandwich(
                norm("pre_feedforward_layernorm"),
                Layer::Mlp(mlp),
                norm("post_feedforward_layernorm"),
            ),
        ];
        let update = Some(update(sketch, &layer, active, activation));
        Block { update, ..Block::new(layer, stages) }
    };
    let several = |name: &str| {
        let numbered = |number: usize| Linear::new(format!("{PLACE}{name}.{number}"));
        (0..streams - 1).map(numbered).collect::<Vec<_>>()
    };
    Ok(Decoder {
        hidden_size,
        vocabulary: sketch.count("vocab_size")?,
        embedding: embedding(sketch, hidden_size)?,
        streams: Some(Streams { spread: several(SPREAD), gather: several(GATHER) }),
        ropes: vec![global, local],
        blocks: (0..layers).map(block).collect(),
        norm: sketch.rms(format!("{PLACE}norm")),
        head: Head {
            linear: None,
            multiplier: 1.0,
            softcap: sketch.float_or_null("final_logit_softcapping", 30.0),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (probability, expected) in
            [(0.5, 0.0), (0.95, 1.644_853_626_951_472_7), (0.025, -1.959_963_984_540_054)]
        {
            assert!((normal_quantile(probability) - expected).abs() < 1e-12, "{probability}");
        }
    }
}
