//! DWQ: scales and biases distilled from the full-precision model (`mlx_lm/quant/dwq.py`).
//!
//! Codes stay; scales and biases of all layers below eight bits are trained with Adam on `KL(teacher || student)` at a
//! temperature. Masters are float32 and the forward pass uses them as they will be stored. The best step on held-out
//! windows is kept, the start among them, so that a run never ends worse than it began. Gradients are taken block by
//! block (the backward walk of [`crate::walks`]).

mod grids;
mod memory;
mod optimizer;
mod settings;
mod state;
mod student;
mod targets;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mlx_format::checkpoint::Writer;
use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, Parameters, WeightsError};

use self::grids::{Grid, Slopes};
pub(crate) use self::memory::grid_bytes;
pub use self::memory::{DwqMemory, dwq_memory, dwq_operations};
use self::optimizer::{Going, Rate};
pub use self::settings::{Distilled, DwqSettings};
use self::state::{Best, Journey, StateFile};
pub(crate) use self::student::stays;
use self::student::{Student, Variables};
use self::targets::{Lessons, Part, Targets};
use crate::data::{Windows, permutation};
use crate::observer::{Event, Observer, Step, Unit};
use crate::walks::Walk;
use crate::walks::{
    Divergence, HeadPass, Passed, Passing, Start, Trail, Visit, backward, divergence, each, finish,
    forward_walk, joined, sum_of,
};
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
}

impl Trained {
    /// Says that the numbers of the student have been written over.
    fn mark(writer: &Writer) -> PathBuf {
        writer.state_path("dwq-written")
    }

    /// Writes scales and biases over those of the student, which nobody may have open.
    pub(crate) fn write(&self, writer: &Writer) -> Result<(), Error> {
        let mark = Self::mark(writer);
        crate::kept::write(&mark, b"").map_err(|error| Error::state(&mark, &error))?;
        self.grids.iter().try_for_each(|grid| grid.write(writer))
    }
}

/// Trained blocks on the way back: gradients of their grids are gathered.
struct Blocks<'b, 'm> {
    student: &'b Student<'m>,
    /// Of every grid whose block has been passed.
    slopes: &'b mut [Option<Slopes>],
}

impl Visit for Blocks<'_, '_> {
    type Block = (Parameters, Variables);
    type Batch = ();

    fn batch(&self, _: usize, block: &Self::Block) -> mlx_quant_engine::Result<(Parameters, ())> {
        Ok((block.0.clone(), ()))
    }

    fn passed(
        &mut self,
        _: usize,
        (_, variables): Self::Block,
        batches: Vec<Passed<()>>,
    ) -> Result<(), Error> {
        let stores = || batches.iter().map(|batch| (batch.first, &batch.gradients));
        for own in variables.chunk_by(|one, other| one.0 == other.0) {
            let at = own[0].0;
            let mut experts: [Vec<Tensor>; 2] = Default::default();
            for (_, variables) in own {
                // Experts are passed by some tokens only; everything else must have its gradient.
                let sums = sum_of(variables, stores(), self.student.grids[at].routed)?;
                experts.iter_mut().zip(sums).for_each(|(all, sum)| all.push(sum));
            }
            let [scales, centers] = experts.each_ref().map(|all| joined(all));
            self.slopes[at] = scales?.zip(centers?).map(|(scales, centers)| [scales, centers]);
        }
        Ok(())
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
        let mut own = Student::open(student)?;
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
        let (mut journey, mut best) = match file.load(&mut own.grids)? {
            Ok(Some(found)) => found,
            Ok(None) => (Journey { rate: f64::NAN, ..Journey::default() }, values(&own.grids)),
            // The numbers to begin with are there no more.
            Err(reason) if Trained::mark(writer).exists() => return Err(Error::lost(&file.0, reason)),
            Err(reason) => {
                let text = format!("{}: {reason}; the training begins again", file.0.display());
                self.observer.event(Event::Warning { text: &text });
                (Journey { rate: f64::NAN, ..Journey::default() }, values(&own.grids))
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
            file.save(&journey, &own.grids, &best)?;
        }
        while journey.step < steps && journey.stopped.is_none() {
            if self.observer.cancelled() {
                file.save(&journey, &own.grids, &best)?;
                return Err(Error::Interrupted);
            }
            self.step(&mut own, &targets, &lessons, &mut journey)?;
            let every = looks_every(self.settings, self.held_out.picked.len());
            let last = journey.step == steps || journey.stopped.is_some();
            if journey.step % every == 0 || last {
                self.look(&mut own, &targets, &lessons, &mut journey, &mut best)?;
            }
            if saved.elapsed().as_secs() >= self.settings.save_seconds || last {
                file.save(&journey, &own.grids, &best)?;
                saved = Instant::now();
            }
            self.observer.event(Event::Progress { done: journey.step as u64 });
        }
        for (grid, [scales, centers]) in own.grids.iter_mut().zip(best) {
            (grid.scales, grid.centers) = (scales, centers);
        }
        let grids = std::mem::take(&mut own.grids);
        let distilled = Distilled {
            steps: journey.step,
            resumed_steps,
            rate: journey.rate,
            start_kl: journey.kl_at(0),
            best_kl: journey.kl_at(journey.best),
            best_step: journey.best,
            trained: grids.iter().map(|grid| 2 * grid.scales.elem_count() as u64).sum(),
            held_out: journey.held_out,
            losses: journey.losses,
            stopped: journey.stopped,
        };
        Ok(Trained { distilled, grids })
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

    /// Takes windows up to their final hidden states.
    fn forward(
        &self,
        student: &Student<'_>,
        forward: &Forward<'_>,
        windows: &[&[u32]],
        keep: bool,
    ) -> Result<(Trail, Vec<Tensor>), Error> {
        let states = self.pool.install(|| student.walk.embed(forward, windows))?;
        let blocks = student.walk.decoder.blocks.len();
        let load = |index| student.block(index);
        let mut trail = Trail::default();
        let passing: &mut dyn Passing = if keep { &mut trail } else { &mut () };
        let last = forward_walk(forward, blocks, &load, states, passing, (self.pool, self.observer))?;
        let hidden = finish(forward, &student.walk.last_norm()?, &last, self.pool)?;
        trail.last = if keep { last } else { Vec::new() };
        Ok((trail, hidden))
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
        let (loss, slopes) = self.slopes(own, targets, lessons, &batch, &windows)?;
        let length = self.pool.install(|| optimizer::length(&own.walk.device, &own.grids, &slopes));
        let length = length.map_err(WeightsError::from)?;
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
        let Student { walk, grids, .. } = student;
        let advance = |(grid, slopes): (&mut Grid, &Slopes)| optimizer::advance(grid, slopes, going);
        each(&walk.device, self.pool, grids.iter_mut().zip(&slopes), advance).map_err(WeightsError::from)?;
        journey.step += 1;
        journey.losses.push(loss);
        Ok(())
    }

    /// Loss of a batch and its gradient with respect to every grid.
    fn slopes(
        &self,
        own: &Student<'_>,
        targets: &Targets<'_>,
        lessons: &Lessons<'_>,
        batch: &[usize],
        windows: &[&[u32]],
    ) -> Result<(f64, Vec<Slopes>), Error> {
        let decoder = &own.walk.decoder;
        let forward = own.walk.forward(self.training.sequence_length)?;
        let (trail, hidden) = self.forward(own, &forward, windows, true)?;
        let head = |rows| own.head_tile(rows);
        let temperature = lessons.temperature(Part::Training);
        let sizes = (decoder.vocabulary, self.training.sequence_length);
        let of_head = targets.with(Part::Training, batch, sizes, |teacher| {
            let pass = HeadPass { forward: &forward, decoder, pool: self.pool };
            divergence(pass, &head, &hidden, teacher, (temperature, true))
        })?;
        let Divergence { losses, gradients, head } = of_head;
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        drop(hidden);
        let mut slopes: Vec<Option<Slopes>> = vec![None; own.grids.len()];
        if let Some(at) = own.head_grid() {
            slopes[at] = head;
        }
        let start = Start { trail, norm: &own.walk.last_norm()?, gradients };
        let context = (self.pool, self.observer);
        let mut blocks = Blocks { student: own, slopes: &mut slopes };
        let load = |index| own.trained_block(index);
        let embedded = backward(&forward, &own.walk.weights, windows, start, &load, &mut blocks, context)?;
        own.add_embedding(windows, &embedded, &mut slopes)?;
        let all = slopes.into_iter().zip(&own.grids);
        let all = all.map(|(slopes, grid)| slopes.map_or_else(|| grid.flat(), Ok));
        let slopes = all.collect::<mlx_quant_engine::Result<_>>().map_err(WeightsError::from)?;
        Ok((loss, slopes))
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
            *best = values(&student.grids);
        }
        let loss = journey.losses.last().copied().unwrap_or(f64::NAN);
        let text = format!("step {}: loss {loss:.5}, held-out KL {kl:.5}", journey.step);
        self.observer.event(Event::Note { text: &text });
        Ok(())
    }

    /// Whether the student's numbers can be stored; they are read for that.
    fn storable(&self, student: &Student<'_>) -> Result<bool, Error> {
        let finite = each(&student.walk.device, self.pool, &student.grids, Grid::is_finite);
        Ok(finite.map_err(WeightsError::from)?.into_iter().all(|finite| finite))
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
            let (_, hidden) = self.forward(looked, &forward, &windows, false)?;
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

fn values(grids: &[Grid]) -> Best {
    grids.iter().map(|grid| [grid.scales.clone(), grid.centers.clone()]).collect()
}
