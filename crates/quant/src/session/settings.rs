//! How a calibrated recipe is carried out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::data::Windows;
use crate::dwq::DwqSettings;
use crate::learn::LearnSettings;
use crate::methods::{MethodSettings, Recipe};
use crate::walks::calibrate::Saving;

/// How a calibrated recipe is carried out.
#[derive(Clone, Debug)]
pub struct QuantizeSettings {
    /// The methods.
    pub recipe: Recipe,
    /// Their figures.
    pub method: MethodSettings,
    /// Threads, 0 for one per core; nothing depends on it.
    pub threads: usize,
    /// Activations wait in files, and windows pass a block a few at a time.
    pub low_memory: bool,
    /// Where activations are large, seconds after which they are saved and finished blocks are recorded: what a kill may
    /// cost.
    pub save_seconds: u64,
    /// Directory in which the Gram matrices of the full-precision model are kept, or from which they are taken. Sites then
    /// do not see what was quantized before them.
    pub statistics: Option<PathBuf>,
    /// Weights of layers' columns ([`crate::dynamic::Layer::column_weights`]) by path, for recipes that search without a walk: `dynamic`.
    pub columns: BTreeMap<String, Vec<f32>>,
    /// How blocks learn their rounding, for recipes with learn.
    pub learn: LearnSettings,
    /// How scales and biases are trained, for recipes with dwq.
    pub dwq: DwqSettings,
    /// Windows of the training and windows on which its steps are judged; without them those that [`Shares`](crate::data::Shares)
    /// makes of the calibration windows: the last 16, or a quarter of few, and all before them.
    pub lessons: Option<(Windows, Windows)>,
    /// Held-out windows on which the result is measured against the source, for the model card.
    pub evaluate: Option<Windows>,
    /// Directory in which the source's final hidden states on these are kept for other runs.
    pub reference_cache: Option<PathBuf>,
}

impl QuantizeSettings {
    /// A recipe with the usual figures.
    pub fn new(recipe: Recipe) -> Self {
        Self {
            recipe,
            method: MethodSettings::default(),
            threads: 0,
            low_memory: false,
            save_seconds: 60,
            statistics: None,
            columns: BTreeMap::new(),
            learn: LearnSettings::default(),
            dwq: DwqSettings::default(),
            lessons: None,
            evaluate: None,
            reference_cache: None,
        }
    }
}

/// Activations of at most so many bytes are saved behind every block.
const SMALL: u64 = 256 << 20;

/// When activations are saved.
pub(super) fn saving(settings: &QuantizeSettings) -> Saving {
    let small = if settings.save_seconds == 0 { u64::MAX } else { SMALL };
    Saving { small, every: Duration::from_secs(settings.save_seconds) }
}

/// Batches of windows within a block at a time.
pub(super) fn wave(settings: &QuantizeSettings, threads: usize, windows: &Windows) -> usize {
    if settings.low_memory { threads } else { windows.picked.len() }
}
