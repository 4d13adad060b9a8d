//! Sensitivities on disk: one JSON document, a line a layer's figure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use fs_err as fs;

use super::observe::observed_paths;
use super::{Cost, Key, Layer, Seen, Sensitivities, candidates};
use crate::data::Windows;
use crate::device::identity;
use crate::kept::{self, Claim};
use crate::observer::{Event, Observer};
use crate::walks::Walk;
use crate::{Error, Model};

/// Raised when the meaning of a figure changes.
const VERSION: u32 = 2;

pub(super) fn key(model: &Model, windows: &Windows, seed: u64) -> Result<Key, Error> {
    Ok(Key {
        version: VERSION,
        model: model.hash()?,
        windows: windows.tokens_hash(),
        sequence_length: windows.sequence_length,
        seed,
        engine: identity(&model.device),
    })
}

fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::Sensitivities { path: path.display().to_string(), reason: reason.into() }
}

/// `None` if there is no such file.
pub(super) fn load(path: &Path, key: &Key, walk: &Walk<'_>) -> Result<Option<Sensitivities>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|error| refused(path, error.to_string()))?;
    let found: Sensitivities =
        serde_json::from_str(&text).map_err(|error| refused(path, error.to_string()))?;
    if found.key != *key {
        let what = if found.key.version != key.version {
            "another version of this program"
        } else if found.key.model != key.model {
            "another model"
        } else if found.key.engine != key.engine {
            "another engine or instruction set"
        } else if found.key.seed != key.seed {
            "another seed"
        } else {
            "other calibration windows"
        };
        return Err(refused(path, format!("its figures are of {what}")));
    }
    check(&found, walk).map_err(|path_of_layer| {
        refused(path, format!("the figures of {path_of_layer} do not fit the model"))
    })?;
    Ok(Some(found))
}

/// Gives the path of a layer whose figures are missing, of another shape, or no figures.
fn check(found: &Sensitivities, walk: &Walk<'_>) -> Result<(), String> {
    let expected: BTreeMap<String, Vec<usize>> = observed_paths(walk).into_iter().collect();
    let known: BTreeSet<&str> = found.layers.iter().map(|layer| layer.path.as_str()).collect();
    if let Some(missing) = expected.keys().find(|path| !known.contains(path.as_str())) {
        return Err(missing.clone());
    }
    let sound = |value: &f32| value.is_finite() && *value >= 0.0;
    for layer in &found.layers {
        let [rows, columns] = [1, 0].map(|at| layer.shape.iter().rev().nth(at).copied().unwrap_or(0));
        let experts: usize = layer.shape.iter().rev().skip(2).product();
        let seen = |seen: &Seen| {
            seen.inputs.len() == columns
                && seen.gradients.len() == rows
                && seen.inputs.iter().chain(&seen.gradients).all(sound)
        };
        let table = layer.table.as_ref().is_none_or(|table| {
            table.features.len() == columns
                && table.features.iter().all(sound)
                && table.rows.iter().all(|(row, value)| (*row as usize) < rows && sound(value))
        });
        let count = layer.seen.len() == experts || (layer.table.is_some() && layer.seen.is_empty());
        let all: Vec<(u32, usize)> =
            candidates::all(columns).map(|scheme| (scheme.bits(), scheme.group_size())).collect();
        // What is written is a float32; so a sum over layers is finite.
        let cost = |cost: &Cost| {
            (0.0..=f64::from(f32::MAX)).contains(&cost.kl) && all.contains(&(cost.bits, cost.group_size))
        };
        let fits = expected.get(&layer.path) == Some(&layer.shape);
        if !(fits && count && table && layer.seen.iter().all(seen) && layer.costs.iter().all(cost)) {
            return Err(layer.path.clone());
        }
        if !layer.column_weights().iter().all(sound) {
            return Err(layer.path.clone());
        }
    }
    Ok(())
}

/// Refuses costs that are beyond measure: with figures near the end of float32, or weights that are.
pub(super) fn check_costs(path: Option<&Path>, layers: &[Layer]) -> Result<(), Error> {
    match layers.iter().find(|layer| layer.costs.iter().any(|cost| !cost.kl.is_finite())) {
        Some(layer) => Err(refused(
            path.unwrap_or(Path::new("sensitivities")),
            format!("what candidates of {} cost is not finite", layer.path),
        )),
        None => Ok(()),
    }
}

/// The right to make a file, before the long work; waits while another process makes it.
///
/// # Errors
/// A place that cannot be written to; [`Error::Interrupted`].
pub(super) fn claim(path: &Path, observer: &dyn Observer) -> Result<Claim, Error> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.exists()) {
        return Err(refused(path, format!("{} is no directory", parent.display())));
    }
    let waits = || {
        let text = format!("{} is being measured by another process; waiting for it", path.display());
        observer.event(Event::Warning { text: &text });
    };
    let claim = Claim::wait(&Claim::beside(path), || observer.cancelled(), waits);
    let claim = claim.map_err(|error| refused(path, error.to_string()))?.ok_or(Error::Interrupted)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    kept::sweep(parent.unwrap_or(Path::new(".")), |of| of == name);
    Ok(claim)
}

/// The file, whole or not at all.
pub(super) fn store(path: &Path, all: &Sensitivities) -> Result<(), Error> {
    let mut text = format!(
        "{{\n\"key\": {},\n\"tokens\": {},\n\"dtype\": {},\n\"layers\": [\n",
        json(&all.key),
        all.tokens,
        json(&all.dtype)
    );
    for (at, layer) in all.layers.iter().enumerate() {
        let end = if at + 1 == all.layers.len() { "" } else { "," };
        let _ = writeln!(text, "{}{end}", json(layer));
    }
    text.push_str("]\n}\n");
    kept::write(path, text.as_bytes()).map_err(|error| Error::state(path, &error))
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
