//! Which scheme a layer gets: a recipe file, another method's choice, a mixed recipe, the family's protection, or the shared one.

use mlx_format::{Mode, Scheme};
use mlx_quant_model::Architecture;
use serde_json::{Map, Value};

use super::mixed::Mixed;
use super::specs::entry;
use super::{PlanError, Settings};

/// Of what no window of text reaches, where a calibrated method asks for it.
const UNREACHED_BITS: u32 = 8;

/// A linear or embedding layer's decision.
pub(super) enum Decision {
    /// It stays as it is; `listed` says so in config.json.
    Keep { listed: bool },
    /// It stays as it is, because its input does not divide by the group size.
    Undivided,
    /// It is rounded; `entry` is what config.json says of it where the shared object does not.
    Quantize { scheme: Scheme, entry: Option<Value> },
}

/// mlx-lm's order: divisibility by the shared group size, then recipe or else the model's own protection
/// (`mlx_lm/utils.py`, `quantize_model`). A recipe file comes before all of it, and then what is kept because no text reaches
/// it.
pub(super) fn decide(
    path: &str,
    columns: usize,
    base: Scheme,
    settings: &Settings,
    architecture: &Architecture,
    mixed: Option<&Mixed>,
    has_packed: bool,
) -> Result<Decision, PlanError> {
    let overridden = settings.overrides.as_ref().and_then(|overrides| overrides.get(path));
    if let Some(choice) = overridden {
        let Some(scheme) = choice else { return Ok(Decision::Keep { listed: true }) };
        if !scheme.divides(columns) {
            let group_size = scheme.group_size();
            return Err(PlanError::OverrideDivides { path: path.to_owned(), columns, group_size });
        }
        return Ok(Decision::Quantize { scheme, entry: Some(entry(scheme)) });
    }
    if settings.keep_unreached
        && architecture.is_unreached(path)
        && base.mode() == Mode::Affine
        && base.bits() < UNREACHED_BITS
        && base.divides(columns)
    {
        let scheme = Scheme::affine(UNREACHED_BITS, base.group_size())?;
        return Ok(Decision::Quantize { scheme, entry: Some(entry(scheme)) });
    }
    if let Some(&scheme) = settings.schemes.get(path)
        && scheme.divides(columns)
    {
        let entry = (scheme != base || has_packed).then(|| entry(scheme));
        return Ok(Decision::Quantize { scheme, entry });
    }
    if !base.divides(columns) {
        return Ok(Decision::Undivided);
    }
    if let Some(mixed) = mixed {
        let scheme = mixed.scheme(path);
        return Ok(Decision::Quantize { scheme, entry: Some(entry(scheme)) });
    }
    if let Some(protected) = architecture.protection(path) {
        let scheme = Scheme::affine(protected.bits, protected.group_size)?;
        if !scheme.divides(columns) {
            return Ok(Decision::Undivided);
        }
        let mut object = Map::new();
        object.insert("group_size".to_owned(), protected.group_size.into());
        object.insert("bits".to_owned(), protected.bits.into());
        return Ok(Decision::Quantize { scheme, entry: Some(object.into()) });
    }
    if architecture.is_unquantized(path) {
        return Ok(Decision::Keep { listed: false });
    }
    // A partly packed source says in its shared object how the packed parts are made.
    let entry = has_packed.then(|| entry(base));
    Ok(Decision::Quantize { scheme: base, entry })
}
