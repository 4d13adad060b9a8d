//! Methods side by side on one model: each is carried out at the same size, what it wrote is measured on held-out text, and the
//! results are ranked.
//!
//! A method's place depends on the model and on the size, so that no list of recommendations replaces this. What several methods
//! need is made once and kept beside the results: the reference's final hidden states, the teacher's, sensitivities, and (where it
//! is asked for) the Gram matrices of the full-precision model. A finished method is a file: an interrupted comparison goes on with
//! the method that it was in, and that method with the block that it was in.

mod entry;
mod ranking;
mod result;
mod settings;
mod steps;
mod store;

use std::path::Path;
use std::time::Instant;

use mlx_format::checkpoint::{Directory, Writer};
use mlx_format::{Mode, Scheme};

pub use self::entry::{Entry, LayerBits, MadeOn};
pub use self::ranking::{Ranked, Rankings, Verdict};
pub use self::result::{Comparison, LayerSensitivity, Text};
pub use self::settings::{CompareSettings, Keep};
pub use self::steps::steps;
use self::store::{Part, Store};
use crate::dynamic::{
    DynamicPlan, DynamicSettings, Sensitivities, SensitivitySettings, Target, sensitivities,
};
use crate::evaluate::{Evaluation, EvaluationSettings, evaluate};
use crate::forecast::{Forecast, Machine, forecast};
use crate::observer::{Event, Observer, Within};
use crate::plan::Plan;
pub use crate::recipes::{Contestant, budget};
use crate::session::{QuantizeSettings, quantize, targets};
use crate::{Error, Model, convert};

/// Points of the predicted curve of dynamic.
const CURVE: usize = 24;

/// A comparison under way.
struct Run<'r> {
    model: &'r Model,
    settings: &'r CompareSettings,
    store: Store,
    observer: &'r dyn Observer,
    sensitivities: Option<Sensitivities>,
}

/// Carries out all methods on `model`, below the directory `output`, and measures them.
///
/// An unfinished comparison of the same model and settings is resumed. Reports [`Event::Job`], [`Event::Contestant`] for every method, within it what
/// [`quantize`] and [`evaluate`] report, and [`Event::ContestantDone`] as soon as it is measured.
///
/// # Errors
/// A directory that holds something else ([`Error::Comparison`]) or in which another process compares ([`Error::Busy`]); otherwise as [`quantize`] and [`evaluate`].
pub fn compare(
    model: &Model,
    settings: &CompareSettings,
    output: &Path,
    observer: &dyn Observer,
) -> Result<Comparison, Error> {
    let start = Instant::now();
    observer.event(Event::Job { steps: &steps(settings, None) });
    let observer: &dyn Observer = &Within(observer);
    let plans = check(model, settings)?;
    let store = Store::open(output, model, settings)?;
    if !store.is_claimed() {
        let text = "the output's disk knows no locks; do not start a second comparison into the same output";
        observer.event(Event::Warning { text });
    }
    let mut run = Run { model, settings, store, observer, sensitivities: None };
    let (mut entries, mut made) = (Vec::new(), 0);
    for (index, (contestant, plan)) in settings.contestants.iter().zip(plans).enumerate() {
        let total = settings.contestants.len();
        observer.event(Event::Contestant { name: &contestant.name, index, total });
        let known = run.store.entry(contestant)?;
        let (entry, known) = match known {
            Some(entry) => (entry, true),
            None => (run.contest(contestant, plan)?, false),
        };
        made += usize::from(!known);
        observer.event(entry.done(known));
        entries.push(entry);
        run.tidy(&entries)?;
    }
    for (contestant, entry) in settings.contestants.iter().zip(&mut entries) {
        let path = run.store.model_path(contestant);
        entry.model = path.exists().then(|| path.display().to_string());
    }
    let sensitivities = run.sensitivities.take();
    let sensitivities = sensitivities.or_else(|| run.store.known_sensitivities(model, settings));
    let mut comparison = Comparison::new(model, settings, entries)?;
    if let Some(all) = &sensitivities {
        comparison.sensitivities = all
            .layers
            .iter()
            .map(|layer| LayerSensitivity::of(layer, settings.contestants[0].scheme))
            .collect();
        comparison.predicted = curve(model, settings, all)?;
    }
    comparison.seconds = run.store.add_seconds(start.elapsed().as_secs_f64(), made > 0)?;
    run.store.conclude()?;
    Ok(comparison)
}

/// What each method would need, by itself, in a process that holds `resident` bytes.
///
/// # Errors
/// What [`compare`] refuses before any work.
pub fn foresee(
    model: &Model,
    settings: &CompareSettings,
    machine: &Machine,
    resident: u64,
) -> Result<Vec<Forecast>, Error> {
    let plans = check(model, settings)?;
    let needs = |(contestant, plan): (&Contestant, Plan)| {
        let how = settings.how(contestant);
        forecast(model, &plan, &settings.calibration, &how, false, machine, resident)
    };
    settings.contestants.iter().zip(plans).map(needs).collect()
}

/// The plan of every method before its bits are allocated; refuses what cannot be done before any work.
fn check(model: &Model, settings: &CompareSettings) -> Result<Vec<Plan>, Error> {
    if settings.contestants.is_empty() {
        return Err(Error::Comparison {
            path: "compare".to_owned(),
            reason: "no method is named".to_owned(),
        });
    }
    let plan = |contestant: &Contestant| -> Result<Plan, Error> {
        if contestant.scheme.mode() != Mode::Affine {
            let reason = "methods are compared on affine schemes".to_owned();
            return Err(Error::Comparison { path: contestant.name.clone(), reason });
        }
        let plan = Plan::new(&model.checkpoint, &model.config, contestant.settings(model))?;
        if contestant.recipe.allocates() {
            let dynamic = allocation(model, contestant)?;
            DynamicPlan::check(model, &plan.settings, &dynamic)?;
        }
        Ok(plan)
    };
    settings.contestants.iter().map(plan).collect()
}

/// What dynamic is asked for where a contestant has it.
fn allocation(model: &Model, contestant: &Contestant) -> Result<DynamicSettings, Error> {
    let usual = DynamicSettings::new(target(model, contestant.scheme)?);
    Ok(DynamicSettings { learned: contestant.recipe.learns(), ..usual })
}

fn target(model: &Model, scheme: Scheme) -> Result<Target, Error> {
    Ok(Target::BitsPerWeight(budget(model, scheme)?))
}

/// What dynamic is predicted to reach at sizes between those of the narrowest and the widest layers.
fn curve(model: &Model, settings: &CompareSettings, all: &Sensitivities) -> Result<Vec<(f64, f64)>, Error> {
    let base = settings.contestants[0].settings(model);
    let usual = DynamicSettings::new(target(model, settings.contestants[0].scheme)?);
    let (low, high) = DynamicPlan::check(model, &base, &usual)?;
    let high = high.min(6.5).max(low);
    let at = |step: usize| low + 0.001 + (high - low - 0.001) * step as f64 / (CURVE - 1) as f64;
    let mut points = Vec::new();
    for bits in (0..CURVE).map(at) {
        let dynamic = DynamicSettings::new(Target::BitsPerWeight(bits));
        if let Ok(plan) = DynamicPlan::new(model, &base, all, &dynamic) {
            points.push((plan.plan.language_bits_per_weight(), plan.predicted_kl));
        }
    }
    Ok(points)
}

impl Run<'_> {
    /// Makes and measures one model.
    fn contest(&mut self, contestant: &Contestant, plan: Plan) -> Result<Entry, Error> {
        let observer = self.observer;
        let path = self.store.model_path(contestant);
        let begun = Writer::partial_path(&path)?.exists();
        // Made and measured, but the result was not written any more. Nobody else is at work here: the store is claimed.
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(|error| Error::state(&path, &error))?;
        }
        let mut how = self.how(contestant);
        let (plan, predicted_kl, mut parts) = self.allocated(contestant, plan, &mut how)?;
        if contestant.recipe.trains() {
            let teach = || targets(self.model, &how, observer);
            parts.push(self.store.once("teacher", observer, teach)?.1);
        }
        observer.peak_memory();
        let (mut own, evaluation, distilled);
        if contestant.recipe.needs_calibration() {
            let made = quantize(self.model, &plan, &self.settings.calibration, &path, &how, observer)?;
            own = Part::of(made.quantize_seconds, made.peak_memory);
            (evaluation, distilled) = (made.evaluation, made.distilled);
        } else {
            let made = convert(self.model, &plan, &path, self.settings.threads, observer)?;
            own = Part::of(made.seconds, observer.peak_memory());
            (evaluation, distilled) = (None, None);
        }
        let evaluation = match evaluation {
            Some(evaluation) => evaluation,
            None => self.measure(&path, &how)?,
        };
        // What another method has needed already counts as if it had been made here.
        let resumed = begun || parts.iter().any(|part| part.resumed);
        for part in parts {
            own.seconds += part.seconds;
            own.peak_memory = own.peak_memory.max(part.peak_memory);
        }
        let entry = Entry {
            name: contestant.name.clone(),
            recipe: contestant.recipe.to_string(),
            bits: contestant.scheme.bits(),
            group_size: contestant.scheme.group_size(),
            bits_per_weight: plan.language_bits_per_weight(),
            bytes: plan.layout.file_bytes(),
            seconds: own.seconds,
            resumed,
            peak_memory: own.peak_memory,
            made_on: MadeOn::here(self.settings, &self.model.device),
            predicted_kl,
            evaluation,
            layers: LayerBits::of(&plan),
            distilled,
            keep: self.settings.keep,
            model: None,
        };
        self.store.keep(contestant, &entry)?;
        Ok(entry)
    }

    fn how(&self, contestant: &Contestant) -> QuantizeSettings {
        let work = self.store.work();
        let mut how = self.settings.how(contestant);
        // What learns lets windows pass.
        let shares = self.settings.shared_statistics && !contestant.recipe.learns();
        how.statistics = shares.then(|| work.join("statistics"));
        how.dwq.teacher_states = Some(work.join("teacher"));
        how.reference_cache = Some(work.to_owned());
        how
    }

    /// The plan with bits for every layer, and the KL that it predicts, where the recipe allocates.
    fn allocated(
        &mut self,
        contestant: &Contestant,
        plan: Plan,
        how: &mut QuantizeSettings,
    ) -> Result<(Plan, Option<f64>, Vec<Part>), Error> {
        if !contestant.recipe.allocates() {
            return Ok((plan, None, Vec::new()));
        }
        let settings = self.settings;
        let (seed, threads, low_memory) = (settings.seed, settings.threads, settings.low_memory);
        let measure = SensitivitySettings { seed, threads, low_memory, ..SensitivitySettings::default() };
        let file = self.store.sensitivities();
        let work = || sensitivities(self.model, &settings.calibration, &measure, Some(&file), self.observer);
        let (all, part) = self.store.once("sensitivities", self.observer, work)?;
        how.columns = all.columns();
        let dynamic = allocation(self.model, contestant)?;
        let allocated = DynamicPlan::new(self.model, &plan.settings, &all, &dynamic)?;
        self.sensitivities = Some(all);
        Ok((allocated.plan, Some(allocated.predicted_kl), vec![part]))
    }

    /// The written files on held-out text.
    fn measure(&self, path: &Path, how: &QuantizeSettings) -> Result<Evaluation, Error> {
        let quality = EvaluationSettings {
            threads: how.threads,
            low_memory: how.low_memory,
            cache: how.reference_cache.clone(),
        };
        let written = crate::open(&Directory::open(path)?)?.on(&self.model.device);
        evaluate(&written, Some(self.model), &self.settings.held_out, &quality, self.observer)
    }

    /// Removes models that are not to stay.
    fn tidy(&self, entries: &[Entry]) -> Result<(), Error> {
        let all = self.settings.contestants.iter().zip(entries);
        for (contestant, entry) in all {
            let best = entries.iter().all(|other| other.bits != entry.bits || entry.kl() <= other.kl());
            // What was asked to stay when it was made is nobody's to remove.
            let stays = match (self.settings.keep, entry.keep) {
                (Keep::All, _) | (_, Keep::All) => true,
                (Keep::None, _) => false,
                (Keep::Best, _) => best,
            };
            let path = self.store.model_path(contestant);
            if !stays && path.exists() {
                std::fs::remove_dir_all(&path).map_err(|error| Error::state(&path, &error))?;
            }
        }
        Ok(())
    }
}
