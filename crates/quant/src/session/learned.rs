//! A block's rounding, learned once all its sites are rounded.

use std::path::Path;

use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::decoder::{self, Linear};
use mlx_quant_model::{Forward, Parameters, State, WeightsError};

use super::Session;
use super::readers::FEW_TOKENS;
use super::settings::saving;
use super::work::{BlockWork, Stored};
use crate::Error;
use crate::data::Windows;
use crate::learn::{Expert, Kept, Layer, Learner, Lesson, costs, held_out};
use crate::methods::{Pending, awq};
use crate::observer::Event;
use crate::walks::calibrate::apart;
use crate::walks::each;

/// All windows in full precision, in front of a block.
pub(super) struct Teacher<'t> {
    session: &'t Session<'t>,
    forward: &'t Forward<'t>,
    states: Vec<State>,
    /// Of what leaves each block.
    costs: Vec<Vec<f32>>,
}

impl<'t> Teacher<'t> {
    /// In front of block `index`: blocks before it are passed again, as the source has them.
    pub(super) fn in_front(
        session: &'t Session<'t>,
        forward: &'t Forward<'t>,
        windows: &Windows,
        index: usize,
    ) -> Result<Self, Error> {
        let walk = &session.walk;
        let all: Vec<&[u32]> = windows.picked.iter().map(|window| &*window.tokens).collect();
        let batches = all.chunks(walk.batch());
        let states =
            batches.map(|batch| Ok(forward.embed(&walk.weights, batch)?)).collect::<Result<_, Error>>()?;
        let tokens = windows.sequence_length;
        let together = walk.trail(tokens, session.pool.current_num_threads(), session.settings.low_memory);
        let measure = (session.settings.learn.seed, together);
        let costs = if session.recipe.learns() {
            costs(walk, windows, measure, (session.pool, session.observer))?
        } else {
            Vec::new()
        };
        let mut own = Self { session, forward, states, costs };
        for before in 0..index {
            if session.observer.cancelled() {
                return Err(Error::Interrupted);
            }
            let parameters = session.pool.install(|| walk.block(before))?;
            own.pass(before, &parameters)?;
        }
        Ok(own)
    }

    /// What has left block `index`, and what changes of that cost.
    pub(super) fn aim(&self, index: usize) -> Aim<'_> {
        Aim { targets: &self.states, costs: &self.costs[index] }
    }

    /// Gives them away: somebody else takes them through the next block.
    pub(super) fn depart(&mut self) -> Vec<State> {
        std::mem::take(&mut self.states)
    }

    /// They have passed it.
    pub(super) fn arrive(&mut self, states: Vec<State>) {
        self.states = states;
    }

    /// Takes them through a block.
    pub(super) fn pass(&mut self, index: usize, parameters: &Parameters) -> Result<(), Error> {
        let states = std::mem::take(&mut self.states);
        let step = |state: State| self.forward.block(index, parameters, state, &mut ());
        let passed = each(self.forward.device(), self.session.pool, states, step);
        self.states = passed.map_err(WeightsError::from)?;
        Ok(())
    }
}

/// What a block shall learn.
pub(super) struct Aim<'a> {
    /// To give these.
    targets: &'a [State],
    /// What a squared difference costs, by feature.
    costs: &'a [f32],
}

/// Window by window.
fn alone(batches: &[State]) -> Result<Vec<State>, Error> {
    let windows = batches.iter().map(apart).collect::<mlx_quant_engine::Result<Vec<_>>>();
    Ok(windows.map_err(WeightsError::from)?.concat())
}

impl BlockWork<'_> {
    /// Lets the block learn what to give for `inputs`, the states of all windows; gives what leaves it then. Steps are kept in a
    /// file whose name begins with `files`.
    pub(super) fn learn(
        &mut self,
        inputs: &[State],
        aim: &Aim<'_>,
        files: &Path,
    ) -> Result<Vec<State>, Error> {
        // Experts that no token reached: the quantized stream may choose them.
        self.round_the_rest()?;
        let session = self.session;
        let parameters = self.as_stored()?;
        let (mut learners, low_bits) = self.learners()?;
        let windows = alone(inputs)?;
        let tensor = || Tensor::from_vec(aim.costs.to_vec(), aim.costs.len(), &session.walk.device);
        let costs = (!aim.costs.is_empty()).then(tensor).transpose();
        let lesson = Lesson {
            forward: self.forward,
            index: self.index,
            parameters: &parameters,
            held_out: held_out(windows.len()),
            inputs: windows,
            targets: alone(aim.targets)?,
            together: session.walk.batch(),
            low_bits,
            costs: costs.map_err(WeightsError::from)?,
            settings: &session.settings.learn,
            kept: self.kept(files, self.index),
            pool: session.pool,
            observer: session.observer,
        };
        let learned = lesson.learn(&mut learners)?;
        if session.observer.wants_notes() {
            let prefix = self.block.prefix.trim_end_matches('.');
            let text = format!(
                "{prefix}: error on held-out windows {:.4e} before learning, {:.4e} at step {}",
                learned.before, learned.best, learned.step
            );
            session.observer.event(Event::Note { text: &text });
        }
        let outputs = lesson.outputs(&learners)?;
        for (path, expert, layer) in learners.into_iter().flat_map(Learner::layers) {
            let rounded = session.pool.install(|| layer.rounded()).map_err(WeightsError::from)?;
            self.codes.insert((path, expert), rounded);
        }
        // Own steps stay until the next block is done: until then this one may not have been written.
        if let Some(before) = self.index.checked_sub(1) {
            self.kept(files, before).remove();
        }
        Ok(outputs)
    }

    /// Where steps of a block are kept.
    fn kept(&self, files: &Path, index: usize) -> Kept {
        let mut path = files.as_os_str().to_owned();
        path.push(format!("learn-{index}.safetensors"));
        let session = self.session;
        let every = session.hooks.saving.unwrap_or_else(|| saving(session.settings)).every;
        Kept { path: path.into(), every }
    }

    /// Keeps what learning will ask of a reader that has just been rounded: its weight before, what it decodes to on inputs that are
    /// not scaled, the factors by which they will be.
    pub(super) fn note_for_learning(
        &mut self,
        reader: &Linear,
        expert: Option<usize>,
        (original, passed): (&Tensor, &Tensor),
        factors: Option<&[f32]>,
        has_codes: bool,
    ) -> Result<(), Error> {
        let key = (reader.path.clone(), expert);
        let scaled = |tensor: Tensor| match factors {
            Some(factors) => awq::times(&tensor, factors),
            None => Ok(tensor),
        };
        // Codes of the fp modes do not learn.
        if matches!(self.stored(reader), Stored::Quantized(scheme, _) if has_codes && scheme.has_biases()) {
            let above = (original - passed).and_then(scaled).and_then(|above| above.to_vec());
            self.above.insert(key, above.map_err(WeightsError::from)?);
        }
        Ok(())
    }

    /// The block's tensors, those that a fold changed as they will be stored.
    fn as_stored(&self) -> Result<Parameters, Error> {
        let mut parameters = self.parameters.clone();
        for (name, values) in &self.edited {
            let shape = self.parameters.tensor(name).map_err(WeightsError::from)?.dims().to_vec();
            let mut values = values.clone();
            if let Some(float) = self.session.float_of(name) {
                for value in &mut values {
                    *value = float.round(*value);
                }
            }
            let tensor = Tensor::from_vec(values, shape, &self.session.walk.device);
            parameters.insert(name.clone(), tensor.map_err(WeightsError::from)?);
        }
        Ok(parameters)
    }

    /// What learns, with the codes that it has so far; whether any of it has fewer than four bits.
    fn learners(&mut self) -> Result<(Vec<Learner>, bool), Error> {
        let (mut learners, mut low_bits) = (Vec::<Learner>::new(), false);
        let sites = self.sites;
        for (site, reader) in
            sites.iter().flat_map(|site| site.readers.iter().map(move |reader| (site, *reader)))
        {
            let key = (reader.path.clone(), site.slice);
            let expert = match (self.stored(reader), self.codes.remove(&key), self.above.remove(&key)) {
                (Stored::Plain(_) | Stored::Fixed, ..) => continue,
                (Stored::Quantized(scheme, float), Some(pending), Some(above))
                    if self.has_tokens(reader, site.slice) && !self.is_read_later(reader) =>
                {
                    low_bits |= scheme.bits() < 4;
                    let rounded = pending.fetch().map_err(WeightsError::from)?;
                    let begin = || Layer::new(rounded, float, &above, &self.session.walk.device);
                    Expert::Learns(self.session.pool.install(begin).map_err(WeightsError::from)?)
                }
                (_, codes, _) => self.stays(reader, site.slice, codes)?,
            };
            match learners.iter_mut().find(|learner| learner.path == reader.path) {
                Some(learner) => learner.experts.push((site.slice, expert)),
                None => learners.push(Learner::new(&reader.path, (site.slice, expert))),
            }
        }
        Ok((learners, low_bits))
    }

    /// Whether it makes keys and values that later blocks read: what leaves this block tells nothing of what they need.
    fn is_read_later(&self, reader: &Linear) -> bool {
        let keeps = |layer: &decoder::Layer| match layer {
            decoder::Layer::Attention(attention) if attention.keep_keys => {
                attention.projections.linears().into_iter().any(|linear| linear.path == reader.path)
            }
            _ => false,
        };
        self.block.layers().any(keeps)
    }

    /// Whether enough tokens came to learn from: experts with too few keep the codes that they have.
    fn has_tokens(&self, reader: &Linear, expert: Option<usize>) -> bool {
        let Some(seen) = self.experts.get(&reader.path) else { return true };
        let columns = self.session.columns(&reader.path).unwrap_or(0);
        let tokens = seen.tokens.get(expert.unwrap_or(0)).copied().unwrap_or(0);
        tokens as f64 >= FEW_TOKENS * columns as f64
    }

    /// What does not learn, as it decodes.
    fn stays(
        &mut self,
        reader: &Linear,
        expert: Option<usize>,
        codes: Option<Pending>,
    ) -> Result<Expert, Error> {
        let mut weight = self.weight(reader, expert)?;
        if let Some(pending) = codes {
            let rounded = pending.fetch().map_err(WeightsError::from)?;
            let shape = (rounded.rows(), rounded.columns);
            weight =
                Tensor::from_vec(rounded.decoded(), shape, weight.device()).map_err(WeightsError::from)?;
            self.codes.insert((reader.path.clone(), expert), rounded.into());
        }
        let columns = weight.dims()[weight.rank() - 1];
        Ok(Expert::Stays(weight.reshape((REST, columns)).map_err(WeightsError::from)?))
    }
}
