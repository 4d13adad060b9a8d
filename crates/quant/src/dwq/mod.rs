//! DWQ: scales and biases distilled from the full-precision model (`mlx_lm/quant/dwq.py`).
//!
//! Codes stay; scales and biases of all layers below eight bits, and where bits are few the weights of norms, are trained
//! with Adam on `KL(teacher || student)` at a temperature. Masters are float32 and the forward pass uses them as they will be stored. The best step on held-out
//! windows is kept, the start among them, so that a run never ends worse than it began. Gradients are taken block by
//! block (the backward walk of [`crate::walks`]).

mod grids;
mod memory;
mod norms;
mod optimizer;
mod settings;
mod slopes;
mod state;
mod student;
mod targets;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mlx_format::checkpoint::Writer;
use mlx_quant_model::{Forward, WeightsError};

use self::grids::Grid;
pub(crate) use self::memory::trained_bytes;
pub use self::memory::{DwqMemory, dwq_memory, dwq_operations};
use self::norms::NormWeight;
use self::optimizer::{Going, Rate};
pub use self::settings::{Distilled, DwqSettings};
use self::state::{Best, Journey, StateFile};
use self::student::Student;
pub(crate) use self::student::stays;
use self::targets::{Lessons, Part, Targets};
use crate::data::{Windows, permutation};
use crate::observer::{Event, Observer, Step, Unit};
use crate::walks::Walk;
use crate::walks::{HeadPass, divergence, each};
use crate::{Error, Model};

/// Part of a code by which a weight moves in a step, for a student one nat from its teacher; with the divergence falls
/// the distance to go, as its root.
const REACH: f64 = 0.006;
/// The rate lies between these.
const RATES: (f64, f64) = (3e-3, 2e-2);

/// What a window costs at a look and in a step, in forward passes, about.
const LOOK: f64 = 1.3;
const STEP: f64 = 4.5;
/// What looks may cost at most, as a part of the training.
const LOOKS: f64 = 0.15;

/// Steps between looks at so many windows: a tenth of all, but no more looks than cost a small part of the training.
fn looks_every(settings: &DwqSettings, held_out: usize) -> usize {
    if settings.validate_every > 0 {
        return settings.validate_every;
    }
    let look = held_out as f64 * LOOK;
    let step = settings.batch_size as f64 * STEP;
    settings.iterations.div_ceil(10).max((look / (LOOKS * step)).ceil() as usize).max(1)
}

/// The step of a job that is a training.
pub fn step() -> Step {
    Step::new("dwq", ["teacher", "dwq"])
}

/// What a run works with.
pub(crate) struct Distillation<'d> {
    pub(crate) settings: &'d DwqSettings,
    pub(crate) training: &'d Windows,
    pub(crate) held_out: &'d Windows,
    pub(crate) pool: &'d rayon::ThreadPool,
    pub(crate) observer: &'d dyn Observer,
}

/// What a training ended with.
pub(crate) struct Trained {
    pub(crate) distilled: Distilled,
    grids: Vec<Grid>,
    norms: Vec<NormWeight>,
}

impl Trained {
    /// Says that the numbers of the student have been written over.
    fn mark(writer: &Writer) -> PathBuf {
        writer.state_path("dwq-written")
    }

    /// Writes scales, biases and norms over those of the student, which nobody may have open.
    pub(crate) fn write(&self, writer: &Writer) -> Result<(), Error> {
        let mark = Self::mark(writer);
        crate::kept::write(&mark, b"").map_err(|error| Error::state(&mark, &error))?;
        self.grids.iter().try_for_each(|grid| grid.write(writer))?;
        self.norms.iter().try_for_each(|norm| norm.write(writer))
    }
}

impl Distillation<'_> {
    /// Trains the model that stands in a writer's directory. `student` is that directory, opened; [`Trained::write`]
    /// follows when it is closed.
    pub(crate) fn run(
        &self,
        teacher: Option<&Model>,
        student: &Model,
        writer: &Writer,
    ) -> Result<Trained, Error> {
        let mut own = Student::open(student, self.settings)?;
        if own.grids.is_empty() {
            return Err(Error::NothingToTrain(student.name()));
        }
        let lessons = Lessons {
            training: self.training,
            held_out: self.held_out,
            temperature: self.settings.temperature,
        };
        let files = match &self.settings.teacher_states {
            Some(directory) => targets::shared_states(directory, teacher, &lessons)?,
            None => writer.state_path("dwq-teacher-"),
        };
        let directory = self.settings.target_dir.as_deref();
        let targets =
            Targets::prepare(teacher, &own.walk, &lessons, directory, files, self.pool, self.observer)?;
        let file = StateFile(writer.state_path("dwq.safetensors"));
        let (mut journey, mut best) = match file.load(&mut own)? {
            Ok(Some(found)) => found,
            Ok(None) => (Journey { rate: f64::NAN, ..Journey::default() }, Best::of(&own)),
            // The numbers to begin with are there no more.
            Err(reason) if Trained::mark(writer).exists() => return Err(Error::lost(&file.0, reason)),
            Err(reason) => {
                let text = format!("{}: {reason}; the training begins again", file.0.display());
                self.observer.event(Event::Warning { text: &text });
                (Journey { rate: f64::NAN, ..Journey::default() }, Best::of(&own))
            }
        };
        let mut saved = Instant::now();
        let resumed_steps = journey.step;
        let steps = self.settings.iterations;
        let a_step = self.settings.batch_size.min(self.training.picked.len()) * self.training.sequence_length;
        let tokens = steps.saturating_mul(a_step) as u64;
        self.observer.event(Event::Phase { name: "dwq", unit: Unit::Steps, total: steps as u64, tokens });
        if journey.step > 0 {
            self.observer.event(Event::Resumed { done: journey.step as u64 });
        }
        if journey.held_out.is_empty() {
            let kl = self.held_out_kl(&mut own, &targets, &lessons)?;
            if kl.is_finite() {
                journey.held_out.push((0, kl));
            } else {
                journey.stopped = Some(format!("the held-out KL of the student as it is is {kl}"));
            }
            journey.rate = self.rate(kl);
            // What is written over at the end is known from here on.
            file.save(&journey, &own, &best)?;
        }
        while journey.step < steps && journey.stopped.is_none() {
            if self.observer.cancelled() {
                file.save(&journey, &own, &best)?;
                return Err(Error::Interrupted);
            }
            self.step(&mut own, &targets, &lessons, &mut journey)?;
            let every = looks_every(self.settings, self.held_out.picked.len());
            let last = journey.step == steps || journey.stopped.is_some();
            if journey.step % every == 0 || last {
                self.look(&mut own, &targets, &lessons, &mut journey, &mut best)?;
            }
            if saved.elapsed().as_secs() >= self.settings.save_seconds || last {
                file.save(&journey, &own, &best)?;
                saved = Instant::now();
            }
            self.observer.event(Event::Progress { done: journey.step as u64 });
        }
        best.restore(&mut own);
        let Student { grids, norms, .. } = own;
        let distilled = Distilled {
            steps: journey.step,
            resumed_steps,
            rate: journey.rate,
            start_kl: journey.kl_at(0),
            best_kl: journey.kl_at(journey.best),
            best_step: journey.best,
            trained: grids.iter().map(|grid| 2 * grid.scales.elem_count() as u64).sum(),
            norms: norms.len(),
            held_out: journey.held_out,
            losses: journey.losses,
            stopped: journey.stopped,
        };
        Ok(Trained { distilled, grids, norms })
    }

    /// Targets into their directory.
    pub(crate) fn targets(&self, teacher: &Model) -> Result<(), Error> {
        let lessons = Lessons {
            training: self.training,
            held_out: self.held_out,
            temperature: self.settings.temperature,
        };
        let walk = Walk::open(teacher)?;
        let directory = self.settings.target_dir.as_deref();
        let files = match &self.settings.teacher_states {
            Some(shared) => targets::shared_states(shared, Some(teacher), &lessons)?,
            None => PathBuf::new(),
        };
        Targets::prepare(Some(teacher), &walk, &lessons, directory, files, self.pool, self.observer)?;
        Ok(())
    }

    /// By the distance to the teacher.
    fn rate(&self, kl: f64) -> f64 {
        self.settings.learning_rate.unwrap_or_else(|| (REACH * kl.max(0.0).sqrt()).max(RATES.0).min(RATES.1))
    }

    /// Windows of a step: all in a drawn order, then all in another.
    fn batch(&self, step: usize) -> Vec<usize> {
        let total = self.training.picked.len();
        let size = self.settings.batch_size.clamp(1, total);
        let mut orders: Option<(usize, Vec<usize>)> = None;
        (step * size..(step + 1) * size)
            .map(|at| {
                let epoch = at / total;
                if orders.as_ref().is_none_or(|(known, _)| *known != epoch) {
                    orders = Some((epoch, permutation(total, self.settings.seed.wrapping_add(epoch as u64))));
                }
                orders.as_ref().map_or(0, |(_, order)| order[at % total])
            })
            .collect()
    }

    /// One step of training. What is not finite ends the run instead of spoiling it.
    fn step(
        &self,
        student: &mut Student<'_>,
        targets: &Targets<'_>,
        lessons: &Lessons<'_>,
        journey: &mut Journey,
    ) -> Result<(), Error> {
        let batch = self.batch(journey.step);
        let windows: Vec<&[u32]> =
            batch.iter().map(|window| &*self.training.picked[*window].tokens).collect();
        let tokens: BTreeSet<u32> = windows.iter().flat_map(|window| window.iter().copied()).collect();
        self.pool.install(|| student.prepare(&tokens))?;
        let own: &Student<'_> = student;
        let slopes = slopes::slopes(own, targets, lessons, &batch, (self.pool, self.observer))?;
        let length = self.pool.install(|| optimizer::length(own, &slopes));
        let length = length.map_err(WeightsError::from)?;
        let loss = slopes.loss;
        if !(loss.is_finite() && length.is_finite()) {
            journey.stopped = Some(format!(
                "the loss of step {} is {loss} and its gradient's length {length}",
                journey.step + 1
            ));
            return Ok(());
        }
        let (clip, usual) = optimizer::clip(length, journey.usual);
        journey.usual = Some(usual);
        let rate = match self.settings.learning_rate {
            Some(rate) => Rate::Absolute(rate),
            None => Rate::Relative(journey.rate),
        };
        let part = optimizer::schedule(journey.step, self.settings.iterations);
        let going = Going { rate, part, clip, step: journey.step };
        optimizer::advance(student, &slopes, going, self.pool).map_err(WeightsError::from)?;
        journey.step += 1;
        journey.losses.push(loss);
        Ok(())
    }

    /// Looks at the held-out windows and keeps what is best.
    fn look(
        &self,
        student: &mut Student<'_>,
        targets: &Targets<'_>,
        lessons: &Lessons<'_>,
        journey: &mut Journey,
        best: &mut Best,
    ) -> Result<(), Error> {
        let kl = self.held_out_kl(student, targets, lessons)?;
        if !kl.is_finite() {
            journey.stopped = Some(format!("the held-out KL at step {} is {kl}", journey.step));
            return Ok(());
        }
        // Not the lowest so far: what cannot be stored is never kept.
        let better = kl < journey.kl_at(journey.best);
        journey.held_out.push((journey.step, kl));
        if better && self.storable(student)? {
            journey.best = journey.step;
            *best = Best::of(student);
        }
        let loss = journey.losses.last().copied().unwrap_or(f64::NAN);
        let text = format!("step {}: loss {loss:.5}, held-out KL {kl:.5}", journey.step);
        self.observer.event(Event::Note { text: &text });
        Ok(())
    }

    /// Whether the student's numbers can be stored; they are read for that.
    fn storable(&self, student: &Student<'_>) -> Result<bool, Error> {
        let device = &student.walk.device;
        let grids = each(device, self.pool, &student.grids, Grid::is_finite).map_err(WeightsError::from)?;
        let norms =
            each(device, self.pool, &student.norms, NormWeight::is_finite).map_err(WeightsError::from)?;
        Ok(grids.into_iter().chain(norms).all(|finite| finite))
    }

    /// KL on the held-out windows at temperature 1; not finite if the student's logits are not.
    fn held_out_kl(
        &self,
        student: &mut Student<'_>,
        targets: &Targets<'_>,
        lessons: &Lessons<'_>,
    ) -> Result<f64, Error> {
        let all = &self.held_out.picked;
        let mut sum = 0.0;
        let wave = self.settings.batch_size.max(self.pool.current_num_threads());
        let places: Vec<usize> = (0..all.len()).collect();
        for some in places.chunks(wave) {
            let windows: Vec<&[u32]> = some.iter().map(|window| &*all[*window].tokens).collect();
            let tokens: BTreeSet<u32> = windows.iter().flat_map(|window| window.iter().copied()).collect();
            self.pool.install(|| student.prepare(&tokens))?;
            let looked: &Student<'_> = student;
            let decoder = &looked.walk.decoder;
            let forward = Forward::new(decoder, self.held_out.sequence_length, &looked.walk.device);
            let forward = forward.map_err(WeightsError::from)?;
            let context = (self.pool, self.observer);
            let (_, hidden) = slopes::forward(looked, &forward, &windows, false, context)?;
            let head = |rows| looked.head_tile(rows);
            let temperature = lessons.temperature(Part::HeldOut);
            let sizes = (decoder.vocabulary, self.held_out.sequence_length);
            let own = targets.with(Part::HeldOut, some, sizes, |teacher| {
                let how = (temperature, false);
                divergence(
                    HeadPass { forward: &forward, decoder, pool: self.pool },
                    &head,
                    &hidden,
                    teacher,
                    how,
                )
            })?;
            for loss in own.losses {
                sum += loss;
            }
        }
        Ok(sum / all.len().max(1) as f64)
    }
}

/// Refuses a student that cannot learn from that teacher, or not at all.
pub(crate) fn check(
    teacher: Option<&Model>,
    student: &Model,
    lessons: (&Windows, &Windows),
    target: &Path,
    settings: &DwqSettings,
) -> Result<(), Error> {
    let own = Walk::open(student)?;
    if let Some(teacher) = teacher {
        let walk = Walk::open(teacher)?;
        if walk.decoder != own.decoder {
            return Err(Error::Student(targets::differing(&walk, &own)));
        }
    }
    if student::trainable(&own).is_empty() {
        return Err(Error::NothingToTrain(student.name()));
    }
    preflight(teacher, &own, lessons, target, settings)
}

/// Refuses a directory of targets that were made from something else; `shape` is a model with the student's
/// architecture.
pub(crate) fn preflight(
    teacher: Option<&Model>,
    shape: &Walk<'_>,
    (training, held_out): (&Windows, &Windows),
    target: &Path,
    settings: &DwqSettings,
) -> Result<(), Error> {
    let lessons = Lessons { training, held_out, temperature: settings.temperature };
    for windows in [training, held_out] {
        let forward = Forward::new(&shape.decoder, windows.sequence_length, &shape.device);
        let forward = forward.map_err(WeightsError::from)?;
        if let Some(window) = windows.picked.first() {
            forward.embed(&shape.weights, &[&window.tokens])?;
        }
    }
    let Some(directory) = &settings.target_dir else { return Ok(()) };
    if crate::convert::is_within(directory, target)? {
        let reason = "it lies in the output directory".to_owned();
        return Err(Error::Targets { path: directory.display().to_string(), reason });
    }
    targets::check(directory, teacher, shape, &lessons)?;
    match teacher {
        Some(_) => Ok(()),
        None => targets::check_complete(directory, &lessons),
    }
}
