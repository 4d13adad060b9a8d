//! Dynamic mixed precision: bits where they matter.
//!
//! [`sensitivities`] measures what a change of each layer costs (`observe`) and what each candidate (bits and group size) would
//! (`candidates`); [`DynamicPlan`] spends a budget of bytes on that ([`allocate`]). The measurement is a readable file, after which any
//! other size is planned without a token.

mod allocate;
mod candidates;
mod file;
mod layer;
mod memory;
mod observe;
mod plan;
mod unfinished;

use std::path::Path;
use std::time::Duration;

use mlx_format::FloatType;

pub use self::allocate::{Allocation, Choice, allocate};
pub use self::layer::{Cost, Key, Layer, Seen, Sensitivities, Table};
pub(crate) use self::memory::windows_together;
pub use self::memory::{SensitivityMemory, sensitivity_needs};
pub use self::plan::{DynamicPlan, DynamicSettings, Target};
use crate::data::Windows;
use crate::observer::{Event, Observer, Step};
use crate::walks::Walk;
use crate::{Error, Model};

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

/// Removes a measurement, finished or not.
pub(crate) fn forget(file: &Path) {
    for path in [file.to_owned(), unfinished::path(file)] {
        let _ = std::fs::remove_file(path);
    }
}

/// The step of a job that measures sensitivities.
pub fn step() -> Step {
    Step::new("dynamic", ["sensitivities", "candidates"])
}

/// Measures sensitivities of `model` on calibration windows, or takes them from `file` if they are there; writes them there if
/// they are not. With a file of the same model, windows and seed no token passes the model. While another process measures into the same
/// file this one waits.
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
    observer.event(Event::Job { steps: &[step()] });
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
