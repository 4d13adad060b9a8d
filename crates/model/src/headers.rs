//! The names and shapes of a model's tensors, from config.json alone: to plan for a model before its weights are here.
//!
//! A decoder ([`crate::decoder`]) lists every tensor that it reads, with the length of each axis that it knows. A few
//! lengths it takes from the tensors as they come, such as the inner width of networks; here they come from
//! config.json, under the keys that the family names. Tensors that may be missing, biases above all, are left out: they
//! weigh next to nothing.

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Config, ConfigError};

use crate::arch::keys::{MOST_EXPERTS, MOST_WEIGHTS, at_most, wrong};
use crate::arch::{Family, Language};
use crate::decoder::{Decoder, Layer};

/// Names (MLX's) and shapes of a model's tensors, as its config describes them.
///
/// # Errors
/// If config.json lacks what the family needs; `None` if its type has no decoder description.
pub fn expected_headers(config: &Config) -> Result<Option<BTreeMap<String, Vec<usize>>>, ConfigError> {
    let language = Language::of(config);
    let architecture = language.architecture(&BTreeMap::new())?;
    let decoder = language.headed(&architecture, None)?;
    let Some((family, decoder)) = language.family.zip(decoder) else { return Ok(None) };
    let config = &*language.config;
    let widths = widths(family, config, &decoder)?;
    for layer in decoder.blocks.iter().flat_map(crate::decoder::Block::layers) {
        if let Layer::Moe(moe) = layer {
            at_most(MOST_EXPERTS, "number of experts", moe.experts.count())?;
        }
    }
    let (mut headers, mut weights) = (BTreeMap::new(), 0usize);
    for (name, expected) in decoder.reads().0 {
        if expected.optional {
            continue;
        }
        let path = name.trim_end_matches(".weight");
        let missing = || family.length(config, path);
        let mut shape = Vec::new();
        for (axis, length) in expected.shape.iter().enumerate() {
            let known =
                length.or_else(|| widths.get(path).and_then(|axes| axes.get(axis).copied().flatten()));
            shape.push(known.map_or_else(missing, Ok)?);
        }
        let elements = shape.iter().try_fold(1usize, |all, axis| all.checked_mul(*axis));
        weights = weights.saturating_add(elements.unwrap_or(usize::MAX));
        at_most(MOST_WEIGHTS, "number of weights", weights)?;
        headers.insert(name, shape);
    }
    Ok(Some(headers))
}

/// Axes of networks' matrices, by path; outermost first.
pub(crate) fn widths(
    family: &Family,
    config: &Config,
    decoder: &Decoder,
) -> Result<BTreeMap<String, Vec<Option<usize>>>, ConfigError> {
    let needed = |found: Option<usize>, key: &str| found.ok_or_else(|| wrong(key, "is missing"));
    let dense = || family.inner_width(config);
    let mut axes = BTreeMap::new();
    for layer in decoder.blocks.iter().flat_map(crate::decoder::Block::layers) {
        let networks = match layer {
            Layer::Mlp(mlp) => vec![(mlp, needed(dense()?, "intermediate_size")?, false)],
            Layer::Moe(moe) => {
                let widths = family.expert_widths(config)?;
                let (expert, shared) = widths.ok_or_else(|| wrong("moe_intermediate_size", "is missing"))?;
                let shared = moe.shared.as_ref().map(|network| (&network.mlp, shared, false));
                let own = moe.experts.networks().into_iter();
                own.map(|(mlp, stacked)| (mlp, expert, stacked.is_some())).chain(shared).collect()
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
