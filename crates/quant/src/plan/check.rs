//! Checks of settings and source before anything is planned.

use std::collections::BTreeSet;

use mlx_format::checkpoint::{Checkpoint, Config};
use mlx_format::{FloatType, Mode};
use serde_json::Value;

use super::existing::Existing;
use super::{PlanError, Settings};
use crate::arch::Architecture;

pub(super) fn check_settings(settings: &Settings, existing: &Existing) -> Result<(), PlanError> {
    match (settings.quantize, settings.dequantize) {
        (Some(_), true) => return Err(PlanError::Both),
        (None, true) if existing.packed().is_none() => return Err(PlanError::NotQuantized),
        _ => {}
    }
    if let (Some(_), Existing::Mlx(map)) = (settings.quantize, existing) {
        let what = |key: &str| map.get(key).map_or("?".to_owned(), Value::to_string);
        return Err(PlanError::AlreadyQuantized(format!(
            "{} bits, group size {}",
            what("bits"),
            what("group_size")
        )));
    }
    if settings.overrides.is_some() && settings.quantize.is_none() {
        return Err(PlanError::OverridesWithoutQuantize);
    }
    match (settings.mixed, settings.quantize) {
        (Some(_), Some(scheme)) if scheme.mode() != Mode::Affine => {
            Err(PlanError::MixedMode(scheme.mode().name()))
        }
        _ => Ok(()),
    }
}

/// Without an index, shards that call themselves one of several must all be there.
pub(super) fn check_shards(checkpoint: &Checkpoint) -> Result<(), PlanError> {
    let expected =
        |name: &str| name.strip_suffix(".safetensors")?.rsplit_once("-of-")?.1.parse::<usize>().ok();
    let found = checkpoint.shards().count();
    match checkpoint.shards().filter_map(expected).max() {
        Some(expected) if expected > found => {
            let directory = checkpoint.directory().display().into_owned();
            Err(PlanError::MissingShards { directory, found, expected })
        }
        _ => Ok(()),
    }
}

/// Every layer of a described model must have some weights.
pub(super) fn check_layers<'n>(
    architecture: &Architecture,
    names: impl Iterator<Item = &'n str>,
) -> Result<(), PlanError> {
    let layer = |name: &'n str| {
        let mut segments = name.split('.');
        segments.find(|segment| matches!(*segment, "layers" | "h"))?;
        segments.next()?.parse::<usize>().ok()
    };
    let found: BTreeSet<usize> = names.filter_map(layer).collect();
    let layers = architecture.layers;
    // At most one step more than there are layers with weights.
    match (0..layers).find(|layer| !found.contains(layer)) {
        Some(missing) if architecture.described => Err(PlanError::MissingLayer { missing, layers }),
        _ => Ok(()),
    }
}

/// The dtype everything is cast to: the flag, else `torch_dtype`, else `text_config.dtype`
/// (`mlx_lm/convert.py`; a top-level `dtype` is not consulted there).
pub(super) fn target_dtype(settings: &Settings, config: &Config) -> Option<FloatType> {
    let nested = config.0.get("text_config").and_then(|text| text.get("dtype"));
    let named = config.0.get("torch_dtype").filter(|value| !value.is_null()).or(nested);
    settings.dtype.or_else(|| named.and_then(Value::as_str).and_then(FloatType::from_name))
}
