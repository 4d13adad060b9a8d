//! Learned rounding, block by block (SignRound: Cheng et al. 2023, arXiv 2309.05516), from codes that stand already.
//!
//! Second-order rounding looks at one linear at a time and at its inputs alone. Here a whole block learns: each weight may move to a
//! neighbouring code and each group's range may change, so that what leaves the block on the quantized stream comes nearer to
//! what leaves the full block in full precision. The best step, judged on windows of which no step learns, is kept. Different from
//! SignRound: where it begins, steps in proportion to gradients, a slower rate, windows to judge on.
//!
//! What steps move stays where the walk computes, and so do gradients: a card is waited for where a block is judged, and
//! where its steps are kept in a file.

mod cost;
mod layer;
mod learner;
mod standing;

use std::sync::Arc;
use std::time::Instant;

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, Parameters, Reader, State, WeightsError};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub(crate) use self::cost::{costs, measured};
pub(crate) use self::layer::Layer;
use self::layer::Standing;
pub(crate) use self::learner::{Expert, Learner};
use self::learner::{Learned, layers};
use self::standing::Course;
pub(crate) use self::standing::Kept;
use crate::Error;
use crate::observer::Observer;
use crate::walks::calibrate::together;
use crate::walks::each;

/// Of the largest differences so many are left out of the loss below four bits (SignRoundV2, arXiv 2512.04746).
const LEFT_OUT: f64 = 0.001;
/// First rate, times steps: what weights move on the mean over all steps is half of it, as steps get shorter to nothing.
const RATE: f32 = 0.5;
/// Few steps are no longer for that.
const FASTEST: f32 = 0.01;
/// Judged so many times.
pub(crate) const JUDGED: usize = 20;

/// Figures of learned rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnSettings {
    /// Steps of each block.
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Of the order of windows.
    pub seed: u64,
}

impl Default for LearnSettings {
    fn default() -> Self {
        Self { steps: 200, batch: 8, seed: 123 }
    }
}

/// How many of so many windows, the last ones, no step learns from.
pub(crate) fn held_out(windows: usize) -> usize {
    (windows / 8).clamp(usize::from(windows > 1), 16)
}

#[derive(Debug)]
struct Weights(Vec<Tensor>);

impl Reader for Weights {
    fn read(
        &self,
        x: &Tensor,
        expert: Option<usize>,
        bias: Option<&Tensor>,
    ) -> mlx_quant_engine::Result<Tensor> {
        x.device().linear(x, &self.0[expert.unwrap_or(0)], bias)
    }
}

/// A block that learns.
pub(crate) struct Lesson<'l> {
    pub(crate) forward: &'l Forward<'l>,
    pub(crate) index: usize,
    /// Everything that does not learn, as it will be written.
    pub(crate) parameters: &'l Parameters,
    /// What stands in front of the block, window by window.
    pub(crate) inputs: Vec<State>,
    /// What shall leave it.
    pub(crate) targets: Vec<State>,
    /// Windows that the engine takes together.
    pub(crate) together: usize,
    /// How many of them, at the end, are held out.
    pub(crate) held_out: usize,
    pub(crate) low_bits: bool,
    /// What a squared difference of each feature costs ([`costs`]); nothing where all cost the same.
    pub(crate) costs: Option<Tensor>,
    pub(crate) settings: &'l LearnSettings,
    /// Where its steps are kept for a run that goes on.
    pub(crate) kept: Kept,
    pub(crate) pool: &'l rayon::ThreadPool,
    pub(crate) observer: &'l dyn Observer,
}

impl Lesson<'_> {
    /// The block with layers as they decode now; if it learns, their weights as variables, in their order.
    fn block(&self, learners: &[Learner], learns: bool) -> Result<(Parameters, Vec<Tensor>), Error> {
        let (mut parameters, mut variables) = (self.parameters.clone(), Vec::new());
        for learner in learners {
            let mut weights = Vec::new();
            for (_, expert) in &learner.experts {
                weights.push(match expert {
                    Expert::Stays(weight) => weight.clone(),
                    Expert::Learns(layer) => {
                        let weight = self.pool.install(|| layer.decoded()).map_err(WeightsError::from)?;
                        if learns {
                            variables.push(weight.variable());
                        }
                        variables.last().filter(|_| learns).cloned().unwrap_or(weight)
                    }
                });
            }
            parameters.set_reader(&learner.path, Arc::new(Weights(weights)));
        }
        Ok((parameters, variables))
    }

    /// Some windows in front of the block, and the numbers `[windows, tokens, hidden]` that shall leave it.
    fn group(&self, windows: &[usize]) -> mlx_quant_engine::Result<(State, Tensor)> {
        let inputs: Vec<State> = windows.iter().map(|window| self.inputs[*window].clone()).collect();
        let targets: Vec<&Tensor> = windows.iter().map(|window| &self.targets[*window].hidden).collect();
        Ok((together(&inputs)?, Tensor::cat(&targets, 0)?))
    }

    /// Differences times what they cost.
    fn cost(&self, difference: &Tensor) -> mlx_quant_engine::Result<Tensor> {
        match &self.costs {
            Some(costs) => difference.broadcast_mul(costs),
            None => Ok(difference.clone()),
        }
    }

    fn judge(&self, learners: &[Learner]) -> Result<f64, Error> {
        let (parameters, _) = self.block(learners, false)?;
        let first = self.inputs.len() - self.held_out;
        let windows: Vec<usize> = (first..self.inputs.len()).collect();
        let error = |group: &[usize]| -> mlx_quant_engine::Result<(f64, usize)> {
            let (input, target) = self.group(group)?;
            let out = self.forward.block(self.index, &parameters, input, &mut ())?;
            let difference = (&out.hidden - &target)?;
            let sum = (&difference * &self.cost(&difference)?)?.sum_all()?.read(|sum| f64::from(sum[0]))?;
            Ok((sum, target.elem_count()))
        };
        let groups = windows.chunks(self.together);
        let errors = each(self.forward.device(), self.pool, groups, error).map_err(WeightsError::from)?;
        let (sum, count) = errors.into_iter().fold((0.0, 0), |all, own| (all.0 + own.0, all.1 + own.1));
        Ok(sum / count.max(1) as f64)
    }

    /// Gradients with respect to the layers' weights, summed over some windows in their order.
    fn slopes(&self, learners: &[Learner], batch: &[usize]) -> Result<Vec<Option<Tensor>>, Error> {
        let (parameters, variables) = self.block(learners, true)?;
        let device = self.forward.device();
        let one = |group: &[usize]| -> mlx_quant_engine::Result<Vec<Option<Tensor>>> {
            let (input, target) = self.group(group)?;
            let out = self.forward.block(self.index, &parameters, input, &mut ())?.hidden;
            let mut difference = (&out.detach() - &target)?;
            if self.low_bits {
                let left_out = (difference.elem_count() as f64 * LEFT_OUT) as usize;
                difference = device.without_largest(&difference, left_out)?;
            }
            let gradients = Tensor::gradients_of(&[(&out, &self.cost(&difference)?)])?;
            Ok(variables.iter().map(|variable| gradients.get(variable).map(Tensor::detach)).collect())
        };
        let groups: Vec<&[usize]> = batch.chunks(self.together).collect();
        // So many gradients of all weights are there at a time.
        let at_once = if device.batch() > 1 { 1 } else { self.pool.current_num_threads().max(1) };
        let sum = |sums: &mut Vec<Option<Tensor>>| -> mlx_quant_engine::Result<()> {
            for part in groups.chunks(at_once) {
                for slopes in each(device, self.pool, part.iter().copied(), one)? {
                    for (sum, own) in sums.iter_mut().zip(slopes) {
                        *sum = match (sum.take(), own) {
                            (Some(sum), Some(own)) => Some((&sum + &own)?),
                            (sum, own) => sum.or(own),
                        };
                    }
                }
            }
            Ok(())
        };
        let mut sums = vec![None; variables.len()];
        sum(&mut sums).map_err(WeightsError::from)?;
        Ok(sums)
    }

    /// Learns, and leaves learners at the best step.
    pub(crate) fn learn(&self, learners: &mut [Learner]) -> Result<Learned, Error> {
        if layers(learners).next().is_none() || self.held_out == 0 {
            return Ok(Learned { before: 0.0, best: 0.0, step: 0 });
        }
        let steps = self.settings.steps;
        let mut course = if let Some(course) = self.kept.resume(learners, steps)? {
            course
        } else {
            let before = self.judge(learners)?;
            let best = Learned { before, best: before, step: 0 };
            Course { steps: 0, best, standing: self.standing(learners)? }
        };
        let first_rate = (RATE / steps.max(1) as f32).min(FASTEST);
        let every = steps.div_ceil(JUDGED).max(1);
        let mut order = Order::new(self.settings.seed, self.index, self.inputs.len() - self.held_out);
        let mut batch = || order.next(self.settings.batch);
        (0..course.steps).for_each(|_| drop(batch()));
        let mut written = Instant::now();
        while course.steps < steps {
            if self.observer.cancelled() {
                self.kept.write(learners, &course, (&mut written, true))?;
                return Err(Error::Interrupted);
            }
            let slopes = self.slopes(learners, &batch())?;
            let rate = first_rate * (1.0 - course.steps as f32 / steps as f32);
            for (layer, slopes) in layers(learners).zip(slopes) {
                if let Some(slopes) = slopes {
                    self.pool.install(|| layer.step(&slopes, rate)).map_err(WeightsError::from)?;
                }
            }
            course.steps += 1;
            if course.steps % every == 0 || course.steps == steps {
                let error = self.judge(learners)?;
                if !error.is_finite() {
                    break;
                }
                if error < course.best.best {
                    (course.best.best, course.best.step) = (error, course.steps);
                    // Room for the new one before it is made.
                    course.standing.clear();
                    course.standing = self.standing(learners)?;
                }
                self.kept.write(learners, &course, (&mut written, false))?;
            }
        }
        for (layer, standing) in layers(learners).zip(course.standing) {
            self.pool.install(|| layer.restore(standing)).map_err(WeightsError::from)?;
        }
        Ok(course.best)
    }

    fn standing(&self, learners: &mut [Learner]) -> Result<Vec<Standing>, Error> {
        let standing = || layers(learners).map(|layer| layer.standing()).collect();
        let all: mlx_quant_engine::Result<_> = self.pool.install(standing);
        Ok(all.map_err(WeightsError::from)?)
    }

    /// What leaves the block, in batches.
    pub(crate) fn outputs(&self, learners: &[Learner]) -> Result<Vec<State>, Error> {
        let (parameters, _) = self.block(learners, false)?;
        let step = |windows: &[State]| -> mlx_quant_engine::Result<State> {
            self.forward.block(self.index, &parameters, together(windows)?, &mut ())
        };
        let batches = self.inputs.chunks(self.together);
        Ok(each(self.forward.device(), self.pool, batches, step).map_err(WeightsError::from)?)
    }
}

/// Windows in an order that a seed gives, again and again.
struct Order {
    generator: ChaCha20Rng,
    left: Vec<usize>,
    all: usize,
}

impl Order {
    fn new(seed: u64, block: usize, all: usize) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(block as u64).to_le_bytes());
        Self { generator: ChaCha20Rng::from_seed(key), left: Vec::new(), all }
    }

    fn next(&mut self, count: usize) -> Vec<usize> {
        let count = count.min(self.all);
        if self.left.len() < count {
            self.left = (0..self.all).collect();
            for at in (1..self.all).rev() {
                self.left.swap(at, (self.generator.next_u64() % (at as u64 + 1)) as usize);
            }
        }
        self.left.split_off(self.left.len() - count)
    }
}
