//! Bits where they matter: sensitivities are measured once, then bits are chosen for a size or for a divergence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mlx_format::checkpoint::Destination;
use sha2::{Digest as _, Sha256};

use super::search::{Search, TRIES, Tried, Tries};
use crate::data::{Windows, hexadecimal};
use crate::device::identity;
use crate::dynamic::{
    DynamicPlan, DynamicSettings, Sensitivities, SensitivitySettings, Target, sensitivities,
};
use crate::observer::{Event, Observer, Step};
use crate::plan::Settings;
use crate::session::QuantizeSettings;
use crate::{Error, Model};

/// The search ends with a model whose divergence is at least this part of the target: a smaller one would gain little.
const CLOSE: f64 = 0.95;
/// The next model is expected to diverge by this factor more than predicted, so that it does not miss by a hair.
const CAUTION: f64 = 1.02;

/// Sensitivities of a model, and the size or divergence that is asked for.
#[derive(Debug)]
pub struct Allocator<'a> {
    model: &'a Model,
    settings: Settings,
    sensitivities: Sensitivities,
    dynamic: DynamicSettings,
    /// Goes when the model is made.
    beside: Option<PathBuf>,
}

/// Where figures that nobody asked for wait until the model is made, so that a killed command does not measure twice:
/// beside the output, under a name that says what they are of.
fn beside(target: &Path, model: &Model, windows: &Windows, seed: u64) -> Result<PathBuf, Error> {
    let mut hash = Sha256::new();
    hash.update(model.hash()?);
    hash.update(windows.tokens_hash());
    hash.update(format!("{} {seed} {}", windows.sequence_length, identity(&model.device)));
    let hash = hexadecimal(&hash.finalize()[..8]);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    Ok(target.with_file_name(format!(".{name}.kept-sensitivities-{hash}.json")))
}

impl<'a> Allocator<'a> {
    /// Measures for a model that will lie at `target`, or reads what was measured from `file`.
    ///
    /// # Errors
    /// As [`sensitivities`].
    pub fn measure(
        model: &'a Model,
        settings: Settings,
        dynamic: DynamicSettings,
        windows: &Windows,
        measure: &SensitivitySettings,
        (file, target): (Option<&Path>, Destination<'_>),
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let beside = match file {
            Some(_) => None,
            None => Some(beside(target.path, model, windows, measure.seed)?),
        };
        if let Some(beside) = beside.as_ref().filter(|_| target.restart) {
            crate::dynamic::forget(beside);
        }
        let place = file.or(beside.as_deref());
        let measured = sensitivities(model, windows, measure, place, observer)?;
        Ok(Self { model, settings, sensitivities: measured, dynamic, beside })
    }

    /// The model is made: removes figures that were kept for this run alone.
    pub fn conclude(self) {
        if let Some(beside) = &self.beside {
            let _ = std::fs::remove_file(beside);
        }
    }

    /// The allocation, reported as [`Event::Allocated`].
    ///
    /// # Errors
    /// As [`DynamicPlan::new`].
    pub fn plan(&self, observer: &dyn Observer) -> Result<DynamicPlan, Error> {
        let plan = DynamicPlan::new(self.model, &self.settings, &self.sensitivities, &self.dynamic)?;
        observer.event(Event::Allocated {
            bits_per_weight: plan.plan.language_bits_per_weight(),
            predicted_kl: plan.predicted_kl,
            bound_kl: plan.bound_kl,
            range: plan.range,
            range_kl: plan.range_kl,
        });
        Ok(plan)
    }

    /// Weights of columns for a search without a walk ([`crate::QuantizeSettings::columns`]).
    pub fn columns(&self) -> BTreeMap<String, Vec<f32>> {
        self.sensitivities.columns()
    }

    /// The divergence that is asked for, if it is one: then [`Self::settle`] is called, and otherwise [`Self::plan`].
    pub fn target_divergence(&self) -> Option<f64> {
        match self.dynamic.target {
            Target::Divergence(target) => Some(target),
            _ => None,
        }
    }

    /// Makes models beside the output of `search` until the smallest is found whose measured divergence is at most
    /// `wanted`, and gives that one the name. `make` carries a plan out into a directory and gives what it made, and
    /// the divergence that it measured.
    ///
    /// A prediction leads to the first model, and what is measured of each corrects the next. Reports
    /// [`Event::Allocated`] and [`Event::Tried`] for each. Tries lie beside the output as `.NAME.try-N`, under the lock
    /// of the search.
    ///
    /// # Errors
    /// Nothing that suffices ([`Error::Divergence`]); those of `make`.
    pub fn settle<M>(
        mut self,
        wanted: f64,
        search: Search<'_>,
        observer: &dyn Observer,
        mut make: impl FnMut(&DynamicPlan, &Path) -> Result<(M, f64), Error>,
    ) -> Result<(DynamicPlan, M), Error> {
        let mut tries = Tries::new(search);
        let mut last = None;
        for attempt in 0..TRIES {
            // What cannot be predicted to suffice any more ends the search.
            let Ok(plan) = self.plan(observer) else { break };
            let size = plan.plan.layout.tensor_bytes();
            if last.replace(size) == Some(size) {
                break;
            }
            let path = tries.place(attempt)?;
            let (made, kl) = make(&plan, &path)?;
            observer.event(Event::Tried {
                bits_per_weight: plan.plan.language_bits_per_weight(),
                kl,
                wanted,
            });
            let factor = self.dynamic.factor * kl / plan.predicted_kl;
            self.dynamic.factor = if kl > wanted { factor * CAUTION } else { factor };
            let enough = kl <= wanted;
            tries.judge(Tried { made: (plan, made), path, bytes: size }, enough)?;
            if tries.has_best() && kl >= wanted * CLOSE {
                break;
            }
        }
        let best = tries.conclude()?;
        self.conclude();
        best.ok_or(Error::Divergence { wanted, tries: TRIES })
    }
}

/// The steps of [`Allocator::settle`]: models that are made and measured, two of which are counted on.
pub fn tries(settings: &QuantizeSettings) -> Vec<Step> {
    let parts: Vec<_> = crate::session::steps(settings).into_iter().flat_map(|step| step.parts).collect();
    let step = |attempt: usize| Step {
        name: format!("try {}", attempt + 1),
        parts: parts.clone(),
        optional: attempt >= 2,
    };
    (0..TRIES).map(step).collect()
}

/// Refuses a file of sensitivities that lies where the output will be.
///
/// # Errors
/// [`Error::Sensitivities`].
pub fn check_place(file: &Path, target: &Path) -> Result<(), Error> {
    if crate::convert::is_within(file, target)? {
        let reason = "it lies in the output directory".to_owned();
        return Err(Error::Sensitivities { path: file.display().to_string(), reason });
    }
    Ok(())
}
