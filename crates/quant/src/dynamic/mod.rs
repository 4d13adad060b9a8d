//! Dynamic mixed precision: bits where they matter.
//!
//! [`sensitivities`] measures what a change of each layer costs (`observe.rs`) and what each candidate (bits and group
//! size) would (`candidates.rs`); [`DynamicPlan`] spends a budget of bytes on that ([`allocate`]). The measurement is a
//! readable file, after which any other size is planned without a token.

mod allocate;
mod candidates;
mod file;
mod memory;
mod observe;
mod plan;
mod unfinished;

use std::path::Path;
use std::time::Duration;

use mlx_format::FloatType;
use mlx_quant_engine::Observed;
use serde::{Deserialize, Serialize};

pub use self::allocate::{Allocation, Choice, allocate};
pub use self::memory::{SensitivityMemory, sensitivity_needs};
pub use self::plan::{DynamicPlan, DynamicSettings, Target};
use crate::data::Windows;
use crate::observer::Observer;
use crate::walks::Walk;
use crate::{Error, Model};

/// What a candidate costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Bits a code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group_size: usize,
    /// Nats a token by which the model would diverge if this layer alone were stored so.
    pub kl: f64,
}

/// What passed a linear (or one expert of stacked ones).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Tokens; of an expert those that were routed to it.
    pub tokens: u64,
    /// `[in]`: mean squares of inputs over these tokens.
    pub inputs: Vec<f32>,
    /// `[out]`: squares of gradients at the output, summed over these tokens, by the number of all tokens.
    pub gradients: Vec<f32>,
}

/// What its rows are worth to the model as an embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Row (token) and squares of gradients with respect to it, summed over its occurrences and features, by the number
    /// of all tokens.
    pub rows: Vec<(u32, f32)>,
    /// `[features]`: each feature's part of that; they sum to 1.
    pub features: Vec<f32>,
}

/// Sensitivity of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Module path.
    pub path: String,
    /// Of its weight, `[.., out, in]`.
    pub shape: Vec<usize>,
    /// Of a linear one, of stacked experts one each; of a table one if it is the head too.
    pub seen: Vec<Seen>,
    /// Of an embedding.
    pub table: Option<Table>,
    /// Of every candidate that fits.
    pub costs: Vec<Cost>,
}

/// What decided the figures of a measurement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Of the file.
    pub version: u32,
    /// [`Model::hash`].
    pub model: String,
    /// SHA-256 of the windows' tokens.
    pub windows: String,
    /// Tokens a window.
    pub sequence_length: usize,
    /// Of the labels that were drawn.
    pub seed: u64,
    /// [`Device::identity`](crate::device::Device::identity) of what measured.
    #[serde(default)]
    pub engine: String,
}

/// A measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// What it was made from.
    pub key: Key,
    /// Tokens measured.
    pub tokens: u64,
    /// dtype of scales and biases that the costs hold for.
    pub dtype: String,
    /// In the order of the model.
    pub layers: Vec<Layer>,
}

/// How sensitivities are measured.
#[derive(Clone, Copy, Debug)]
pub struct SensitivitySettings {
    /// Of the labels.
    pub seed: u64,
    /// 0 for one per core; nothing depends on it.
    pub threads: usize,
    /// As few windows at a time as there are threads.
    pub low_memory: bool,
    /// dtype of scales and biases; `None`: each weight's own.
    pub dtype: Option<FloatType>,
    /// Seconds between two looks at what a kill would cost: then the sums so far are kept beside the file.
    pub save_seconds: u64,
}

impl Default for SensitivitySettings {
    fn default() -> Self {
        Self { seed: 0, threads: 0, low_memory: false, dtype: None, save_seconds: 60 }
    }
}

impl Sensitivities {
    /// Weights of all layers' columns, for recipes that search without a walk: [`crate::QuantizeSettings::columns`].
    pub fn columns(&self) -> std::collections::BTreeMap<String, Vec<f32>> {
        self.layers.iter().map(|layer| (layer.path.clone(), layer.column_weights())).collect()
    }

    /// Whether candidates have their costs.
    fn is_judged(&self) -> bool {
        self.layers.iter().any(|layer| !layer.costs.is_empty())
    }
}

impl Seen {
    fn of(observed: &Observed, tokens: f64, shape: &[usize]) -> Self {
        let [rows, columns] = [1, 0].map(|at| shape.iter().rev().nth(at).copied().unwrap_or(0));
        let own = observed.tokens.max(1) as f64;
        let mut inputs: Vec<f32> = observed.inputs.iter().map(|sum| file::short(sum / own)).collect();
        // An expert that no token reached.
        inputs.resize(columns, 1.0);
        let mut gradients: Vec<f32> =
            observed.gradients.iter().map(|sum| file::short(sum / tokens)).collect();
        gradients.resize(rows, 0.0);
        Self { tokens: observed.tokens, inputs, gradients }
    }
}

impl Layer {
    /// Weights of its columns for a searched grid: `[in]`, or `[experts * in]`.
    pub fn column_weights(&self) -> Vec<f32> {
        let Some(table) = &self.table else {
            return self.seen.iter().flat_map(|seen| seen.inputs.iter().copied()).collect();
        };
        let rows = self.shape.first().copied().unwrap_or(1).max(1) as f32;
        let head: f32 = self.seen.iter().flat_map(|seen| &seen.gradients).sum::<f32>() / rows;
        let own: f32 = table.rows.iter().map(|row| row.1).sum::<f32>() / rows;
        let inputs = |at: usize| self.seen.first().map_or(0.0, |seen| seen.inputs[at]);
        table.features.iter().enumerate().map(|(at, part)| head * inputs(at) + own * part).collect()
    }
}

/// A finished measurement from a file; nothing if there is none, or it was made from something else.
pub(crate) fn known_sensitivities(
    model: &Model,
    windows: &Windows,
    seed: u64,
    file: &Path,
) -> Option<Sensitivities> {
    let (key, walk) = (file::key(model, windows, seed).ok()?, Walk::open(model).ok()?);
    file::load(file, &key, &walk).ok().flatten().filter(Sensitivities::is_judged)
}

/// Measures sensitivities of `model` on calibration windows, or takes them from `file` if they are there; writes them
/// there if they are not. With a file of the same model, windows and seed no token passes the model. While another
/// process measures into the same file this one waits.
///
/// # Errors
/// A file that was made from something else or is damaged ([`Error::Sensitivities`]); otherwise as [`crate::quantize`].
pub fn sensitivities(
    model: &Model,
    windows: &Windows,
    settings: &SensitivitySettings,
    file: Option<&Path>,
    observer: &dyn Observer,
) -> Result<Sensitivities, Error> {
    let key = file::key(model, windows, settings.seed)?;
    let walk = Walk::open(model)?;
    let load = || Ok::<_, Error>(file.map(|path| file::load(path, &key, &walk)).transpose()?.flatten());
    let dtype = settings.dtype.map_or_else(|| "own".to_owned(), |float| float.name().to_owned());
    let is_whole = |known: &Sensitivities| known.dtype == dtype && known.is_judged();
    let mut known = load()?;
    let mut claim = None;
    if let Some(path) = file.filter(|_| !known.as_ref().is_some_and(is_whole)) {
        claim = Some(file::claim(path, observer)?);
        // Another process may have measured in the meantime.
        known = load()?;
    }
    let pool = crate::threads::pool(settings.threads)?;
    let mut all = match known {
        Some(known) if is_whole(&known) => return Ok(known),
        Some(known) => Sensitivities { dtype, ..known },
        None => {
            let unfinished = file.map(|path| {
                let every = Duration::from_secs(settings.save_seconds);
                unfinished::Unfinished::beside(path, &key, every)
            });
            let measurement = observe::Measurement {
                unfinished: unfinished.as_ref(),
                walk: &walk,
                windows,
                seed: settings.seed,
                low_memory: settings.low_memory,
                pool: &pool,
                observer,
            };
            let tokens = (windows.picked.len() * windows.sequence_length) as u64;
            let layers = measurement.run()?;
            let all = Sensitivities { key: key.clone(), tokens, dtype, layers };
            // What took long is kept before the candidates are judged.
            if let Some(path) = file {
                file::store(path, &all)?;
            }
            if let Some(unfinished) = &unfinished {
                unfinished.remove();
            }
            all
        }
    };
    candidates::judge(&walk, &mut all.layers, settings.dtype, &pool, observer)?;
    file::check_costs(file, &all.layers)?;
    if let Some(path) = file {
        file::store(path, &all)?;
    }
    drop(claim);
    Ok(all)
}
