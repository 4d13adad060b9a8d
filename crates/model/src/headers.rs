//! What a model's headers would say, from config.json alone: to plan for a model before its weights are here.
//!
//! The description lists every tensor that it reads with the axes that it knows ([`crate::decoder`]); what only tensors know
//! otherwise (the inner width of networks) config.json says under its usual keys. Biases and other tensors that may be missing
//! are left out: they weigh next to nothing.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::checkpoint::{Config, ConfigError};

use crate::arch::{self, Architecture, Sketch, Source};
use crate::decoder::{Decoder, Layer};
use crate::names::described;

/// Names (MLX's) and shapes of a model's tensors, as its config describes them.
///
/// # Errors
/// If config.json lacks what the family needs; `None` if its type has no decoder description.
pub fn expected_headers(config: &Config) -> Result<Option<BTreeMap<String, Vec<usize>>>, ConfigError> {
    let tensors = BTreeMap::new();
    let architecture = arch::describe(Source { config, tensors: &tensors })?;
    let names = telling_names(&architecture, config)?;
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let sketch = Sketch { config, names: &names };
    let Some(decoder) = described(&architecture, sketch)? else { return Ok(None) };
    let widths = widths(config, &decoder)?;
    for layer in decoder.blocks.iter().flat_map(crate::decoder::Block::layers) {
        if let Layer::Moe(moe) = layer {
            bounded("number of experts", moe.experts.count, MOST_EXPERTS)?;
        }
    }
    let (mut headers, mut weights) = (BTreeMap::new(), 0usize);
    for (name, expected) in decoder.reads().0 {
        if expected.optional {
            continue;
        }
        let path = name.trim_end_matches(".weight");
        let missing = || config_key(config, path);
        let mut shape = Vec::new();
        for (axis, length) in expected.shape.iter().enumerate() {
            let known =
                length.or_else(|| widths.get(path).and_then(|axes| axes.get(axis).copied().flatten()));
            shape.push(known.map_or_else(missing, Ok)?);
        }
        let elements = shape.iter().try_fold(1usize, |all, axis| all.checked_mul(*axis));
        weights = weights.saturating_add(elements.unwrap_or(usize::MAX));
        bounded("number of weights", weights, MOST_WEIGHTS)?;
        headers.insert(name, shape);
    }
    Ok(Some(headers))
}

/// Names by which descriptions tell what a model has: a head of its own, an expert that every token passes.
fn telling_names(architecture: &Architecture, config: &Config) -> Result<Vec<String>, ConfigError> {
    let mut names = Vec::new();
    if !is_tied(architecture, config) {
        names.extend(["lm_head.weight", "model.embed_out.weight"].map(str::to_owned));
    }
    if config.count("shared_expert_intermediate_size").is_ok_and(|width| width > 0) {
        let layers = bounded("num_hidden_layers", config.count("num_hidden_layers")?, MOST_LAYERS)?;
        names.extend((0..layers).map(|layer| format!("model.layers.{layer}.mlp.shared_expert_gate.weight")));
    }
    Ok(names)
}

/// No model has more of them.
const MOST_LAYERS: usize = 1024;
const MOST_EXPERTS: usize = 4096;
const MOST_WIDTH: usize = 1 << 24;
/// Weights of all tensors together; a thousand times the largest model.
const MOST_WEIGHTS: usize = 1 << 50;

fn bounded(key: &str, count: usize, most: usize) -> Result<usize, ConfigError> {
    if count <= most {
        return Ok(count);
    }
    Err(ConfigError::Key { key: key.to_owned(), reason: format!("is {count}, more than any model has") })
}

/// Whether head and embedding are one table.
fn is_tied(architecture: &Architecture, config: &Config) -> bool {
    architecture.drops_head() || config.bool("tie_word_embeddings", architecture.tied_without_head)
}

/// Axes of networks' matrices, by path; outermost first.
pub(crate) fn widths(
    config: &Config,
    decoder: &Decoder,
) -> Result<BTreeMap<String, Vec<Option<usize>>>, ConfigError> {
    // A key that is there and cannot be used is no reason to take another.
    let first = |keys: &[&str]| -> Result<Option<usize>, ConfigError> {
        let key = keys.iter().find(|key| config.get(key).is_some_and(|value| !value.is_null()));
        key.map(|key| bounded(key, config.count(key)?, MOST_WIDTH)).transpose()
    };
    let needed = |found: Option<usize>, key: &str| {
        found.ok_or_else(|| ConfigError::Key { key: key.to_owned(), reason: "is missing".to_owned() })
    };
    let dense = || -> Result<Option<usize>, ConfigError> {
        let found = first(&["intermediate_size", "block_ff_dim", "n_inner", "ffn_dim", "ffn_hidden_size"])?;
        let four = decoder.hidden_size.saturating_mul(4);
        let found = found.or_else(|| config.get("n_embd").map(|_| four));
        let adjusts = config.bool("block_auto_adjust_ff_dim", false);
        Ok(found.map(|width| if adjusts { adjusted(config, width) } else { width }))
    };
    let mut axes = BTreeMap::new();
    for layer in decoder.blocks.iter().flat_map(crate::decoder::Block::layers) {
        let networks = match layer {
            Layer::Mlp(mlp) => vec![(mlp, needed(dense()?, "intermediate_size")?, false)],
            Layer::Moe(moe) => {
                let expert =
                    first(&["moe_intermediate_size"])?.map_or_else(dense, |width| Ok(Some(width)))?;
                let expert = needed(expert, "moe_intermediate_size")?;
                let count = first(&["n_shared_experts", "num_shared_experts"])?.unwrap_or(1);
                let shared = first(&["shared_expert_intermediate_size"])?;
                let shared = shared.unwrap_or_else(|| expert.saturating_mul(count));
                let shared = moe.shared.as_ref().map(|network| (&network.mlp, shared, false));
                std::iter::once((&moe.experts.mlp, expert, true)).chain(shared).collect()
            }
            _ => Vec::new(),
        };
        for (mlp, width, stacked) in networks {
            let front = || if stacked { vec![None] } else { Vec::new() };
            for linear in mlp.gate.linears() {
                axes.insert(linear.path.clone(), [front(), vec![Some(mlp.rows_for(width)), None]].concat());
            }
            axes.insert(mlp.down.path.clone(), [front(), vec![None, Some(width)]].concat());
        }
    }
    Ok(axes)
}

/// LFM2's width: two thirds, times a factor, rounded up.
fn adjusted(config: &Config, width: usize) -> usize {
    let factor = config.get("block_ffn_dim_multiplier").and_then(serde_json::Value::as_f64).unwrap_or(1.0);
    let width = ((2 * width / 3) as f64 * factor).min(MOST_WIDTH as f64) as usize;
    width.next_multiple_of(config.count("block_multiple_of").unwrap_or(256).clamp(1, MOST_WIDTH))
}

/// An axis that only some families leave open.
pub(crate) fn config_key(config: &Config, path: &str) -> Result<usize, ConfigError> {
    let keys: &[&str] = match path.rsplit('.').next().unwrap_or(path) {
        "wpe" | "embed_positions" => &["n_positions", "max_position_embeddings"],
        "embed_tokens_per_layer" => &["vocab_size_per_layer_input"],
        "q_a_proj" | "q_b_proj" | "q_a_layernorm" => &["q_lora_rank"],
        "conv1d" => &["linear_conv_kernel_dim"],
        "conv" => &["conv_L_cache"],
        _ => &[],
    };
    let found = keys.iter().find_map(|key| config.count(key).ok());
    found.ok_or_else(|| ConfigError::Key {
        key: keys.first().copied().unwrap_or("config.json").to_owned(),
        reason: format!("does not say how large {path} is; its weights are needed"),
    })
}
