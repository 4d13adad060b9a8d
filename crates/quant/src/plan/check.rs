//! Checks of settings and source before anything is planned.

use mlx_format::checkpoint::Config;
use mlx_format::{FloatType, Mode};
use mlx_quant_model::arch::Loader;
use mlx_quant_model::arch::by_names::{self, Unfit};
use mlx_quant_model::{Existing, Named, arch};
use serde_json::Value;

use super::{PackedSource, PlanError, Settings};

pub(super) fn check_settings(settings: &Settings, existing: &Existing) -> Result<(), PlanError> {
    match (settings.quantize, settings.dequantize) {
        (Some(_), true) => return Err(PlanError::Both),
        (None, true) if existing.packed().is_none() && !matches!(existing, Existing::Packed(_)) => {
            return Err(PlanError::NotQuantized);
        }
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

/// The dtype everything is cast to: the flag, else `torch_dtype`, else `text_config.dtype`
/// (`mlx_lm/convert.py`; a top-level `dtype` is not consulted there).
pub(super) fn target_dtype(settings: &Settings, config: &Config) -> Option<FloatType> {
    let nested = config.0.get("text_config").and_then(|text| text.get("dtype"));
    let named = config.0.get("torch_dtype").filter(|value| !value.is_null()).or(nested);
    settings.dtype.or_else(|| named.and_then(Value::as_str).and_then(FloatType::from_name))
}

/// Whether layers that another quantizer has packed are taken over as they are.
pub(super) fn takes_over(settings: &Settings) -> bool {
    match settings.quantize {
        Some(_) => settings.packed == PackedSource::Keep,
        None => !settings.dequantize && !settings.keep_dtypes,
    }
}

/// Refuses to take over a source of which MLX does not hold every packed layer exactly.
pub(super) fn check_taken(named: &Named) -> Result<(), PlanError> {
    let lacking: Vec<(&String, &String)> =
        named.packed.iter().filter_map(|(path, layer)| Some((path, layer.as_ref().err()?))).collect();
    let Some((path, reason)) = lacking.first() else { return Ok(()) };
    let method = match &named.existing {
        Existing::Packed(packing) => packing.name(),
        _ => "another program",
    };
    let (path, reason, lacking) = ((*path).clone(), (*reason).clone(), lacking.len());
    Err(PlanError::NotTaken { method, lacking, layers: named.packed.len(), path, reason })
}

/// Refuses a model that nothing runs in any form, and one that nothing runs in the form that is asked for.
pub(super) fn check_type(settings: &Settings, config: &Config) -> Result<(), PlanError> {
    if let Some(why) = arch::obstacle(config) {
        return Err(PlanError::NotRun { model_type: config.model_type()?.to_owned(), why });
    }
    if settings.text_only && arch::loader(config) == Loader::MlxVlm {
        return Err(PlanError::TextOnly { model_type: config.model_type()?.to_owned() });
    }
    Ok(())
}

/// How many tensors an error names.
const SHOWN: usize = 10;

/// Refuses a model without a description whose experts are not all there.
pub(super) fn check_experts(named: &Named) -> Result<(), PlanError> {
    let tensors = named.tensors.iter().map(|(name, view)| (name.as_str(), view.shape()));
    by_names::incomplete_experts(tensors).map_or(Ok(()), |what| Err(PlanError::Experts { what }))
}

/// Refuses to quantize, by tensor names alone, a model of which is known that the result would not load or would hardly be smaller.
pub(super) fn check_by_names(named: &Named, config: &Config) -> Result<(), PlanError> {
    let model_type = config.model_type()?;
    if let Some(why) = by_names::obstacle(model_type) {
        return Err(PlanError::DoesNotLoad { model_type: model_type.to_owned(), why });
    }
    let unfit = |wanted: Unfit| {
        let found = named
            .tensors
            .iter()
            .filter(|(name, view)| by_names::unfit(&named.architecture, name, view) == Some(wanted));
        let names: Vec<&str> = found.map(|(name, _)| name.as_str()).collect();
        let more = names.len().saturating_sub(SHOWN);
        let shown = names[..names.len() - more].join(", ");
        let tensors = if more > 0 { format!("{shown} and {more} more") } else { shown };
        (!names.is_empty()).then_some(tensors)
    };
    let model_type = || model_type.to_owned();
    if let Some(tensors) = unfit(Unfit::NumberedExpert) {
        return Err(PlanError::NumberedExperts { model_type: model_type(), tensors });
    }
    unfit(Unfit::Stacked)
        .map_or(Ok(()), |tensors| Err(PlanError::Stacked { model_type: model_type(), tensors }))
}
