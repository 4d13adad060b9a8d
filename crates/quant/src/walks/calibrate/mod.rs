//! The calibrating walk: all windows go through a block site by site, and a site's readers are quantized before windows
//! go on.
//!
//! What reaches a site has passed everything that was quantized before it, in this block and in those before, so that
//! errors are seen where they arrive and later layers make up for them. Every matrix product runs once. With little
//! memory, windows are taken through a block a few at a time and once for each of its sites instead of being held
//! at each site all together; the sums are the same, window by window.

mod drift;
mod gram;
mod states;
mod statistics;
mod traveller;

use std::sync::PoisonError;

use mlx_quant_engine::{Device, Tensor};
use mlx_quant_model::{Forward, Parameters, Producer, Site, State, WeightsError};

pub(crate) use self::drift::{Drift, Second};
use self::drift::{DriftTree, Pair, add_drift, flat};
use self::gram::GramTree;
use self::gram::gram_of;
pub(crate) use self::gram::{add_gram, held_in_parts, sum_of_team};
pub(crate) use self::states::{Batches, Saving, States, apart, together};
pub(crate) use self::statistics::{Collector, Statistics};
use self::traveller::{Meeting, Steps, Traveller};
use crate::Error;
use crate::methods::Gram;
use crate::team::{Part, Team};
use crate::walks::spread::each;

/// The visitor of a calibrating walk: what is done at the sites of a block.
pub(crate) trait Visitor {
    /// All tokens stand before site `index` of the block. Gives the weight `[out, in]` with which windows pass each
    /// reader.
    ///
    /// `sample` holds the inputs of the first [`SAMPLE`] windows, without those of which no token came here.
    fn visit(&mut self, index: usize, gram: Gram, sample: &[Tensor]) -> Result<Vec<Tensor>, Error>;

    /// [`Visitor::visit`] for sites of several experts, at which tokens stand at once.
    fn visit_all(&mut self, stands: Vec<Stand>) -> Result<Vec<Vec<Tensor>>, Error> {
        stands.into_iter().map(|stand| self.visit(stand.site, stand.gram, &stand.sample)).collect()
    }

    /// How far what stands at site `index` is from the full-precision stream, before it is visited.
    fn drifted(&mut self, _index: usize, _drift: Drift) {}

    /// Whether it looks at samples.
    fn wants_samples(&self) -> bool {
        true
    }

    /// Whether to stop.
    fn cancelled(&self) -> bool;
}

/// What stands before a site, as [`Visitor::visit`] sees it.
pub(crate) struct Stand {
    pub(crate) site: usize,
    pub(crate) gram: Gram,
    pub(crate) sample: Vec<Tensor>,
}

/// Windows whose inputs are shown to the visitor as they are.
pub(crate) const SAMPLE: usize = 2;

fn unfinished() -> WeightsError {
    WeightsError::Tensor(mlx_quant_engine::Error::msg("a window did not leave its block"))
}

/// A block that windows are taken through.
#[derive(Clone, Copy)]
pub(crate) struct Passage<'p> {
    pub(crate) forward: &'p Forward<'p>,
    pub(crate) index: usize,
    pub(crate) sites: &'p [Site<'p>],
    pub(crate) parameters: &'p Parameters,
    /// How many batches of windows are within the block at a time: all of them travel once; fewer travel once for each
    /// site.
    pub(crate) wave: usize,
    /// How many experts of a layer are visited at once.
    pub(crate) experts: usize,
    /// Windows of a batch; the last one may have fewer.
    pub(crate) batch: usize,
    pub(crate) pool: &'p rayon::ThreadPool,
    /// Who else takes windows through it.
    pub(crate) team: &'p Team,
    /// Windows of members before this one, and of all.
    pub(crate) windows: (usize, usize),
    /// The full-precision stream, where it is compared with.
    pub(crate) second: Option<&'p Second<'p>>,
}

/// What is gathered at a site that windows come to a few at a time.
#[derive(Default)]
struct Gathered {
    sum: GramTree,
    sample: Vec<Tensor>,
    drift: DriftTree,
}

impl Gathered {
    fn finish(&mut self, size: usize, passage: &Passage<'_>) -> Result<Option<Gram>, Error> {
        let sum = sum_of_team(std::mem::take(&mut self.sum), size, passage.who())?;
        let gram = sum.map(|sum| passage.pool.install(|| sum.finish()));
        Ok(gram.transpose().map_err(WeightsError::from)?)
    }
}

impl<'p> Passage<'p> {
    /// Takes all windows through the block and leaves them behind it.
    pub(crate) fn take(&self, states: &mut States, visitor: &mut dyn Visitor) -> Result<(), Error> {
        self.go(states, visitor, true)
    }

    /// Takes all windows to every site of the block and leaves nothing behind it: [`States::put`] is the caller's.
    pub(crate) fn visit(&self, states: &mut States, visitor: &mut dyn Visitor) -> Result<(), Error> {
        self.go(states, visitor, false)
    }

    fn go(&self, states: &mut States, visitor: &mut dyn Visitor, arrives: bool) -> Result<(), Error> {
        let batches = states.len();
        let once = self.wave >= batches;
        let steps = Steps::new(self.sites, self.experts);
        let mut answers: Vec<Option<Vec<Tensor>>> = vec![None; self.sites.len()];
        let mut held = Vec::new();
        if once {
            held = states
                .take_all()?
                .into_iter()
                .map(|state| self.traveller(state))
                .collect::<Result<_, _>>()?;
        }
        let mut full = if once { self.second_from(0, batches)? } else { Vec::new() };
        let mut beyond = 0;
        for (step, sites) in steps.all.iter().enumerate() {
            if visitor.cancelled() {
                return Err(Error::Interrupted);
            }
            let mut gathered: Vec<Gathered> = sites.iter().map(|_| Gathered::default()).collect();
            let mut grams = Vec::new();
            if once {
                self.reach(&mut held, &steps, step, &answers)?;
                // No window stands any more before those of earlier steps.
                let earlier = answers.iter_mut().zip(&steps.of).filter(|(_, own)| **own < step);
                earlier.for_each(|(weights, _)| *weights = None);
                self.reach(&mut full, &steps, step, &[])?;
                for (site, gathered) in sites.iter().zip(&mut gathered) {
                    self.gather_drift(&held, &full, *site, 0, gathered);
                    gathered.sample = self.sample(&held, *site, 0)?;
                    grams.push(self.gram(&held, *site)?);
                }
            } else {
                for from in (0..batches).step_by(self.wave) {
                    let mut travellers = self.depart(states, from)?;
                    self.reach(&mut travellers, &steps, step, &answers)?;
                    let mut full = self.second_from(from, batches.min(from + self.wave))?;
                    self.reach(&mut full, &steps, step, &[])?;
                    for (site, gathered) in sites.iter().zip(&mut gathered) {
                        self.gather_drift(&travellers, &full, *site, from, gathered);
                        self.gather(&travellers, *site, from, gathered)?;
                    }
                }
                for (site, gathered) in sites.iter().zip(&mut gathered) {
                    grams.push(gathered.finish(self.size(*site), self)?);
                }
            }
            if visitor.wants_samples() {
                for gathered in &mut gathered {
                    gathered.sample = self.leaders(std::mem::take(&mut gathered.sample))?;
                }
            }
            let mut stands = Vec::new();
            for ((site, gram), gathered) in sites.iter().zip(grams).zip(gathered) {
                let Some(gram) = gram else { continue };
                let multiplier = self.second.and_then(|second| second.writes[*site]);
                let drift = self.pool.install(|| drift::finish(gathered.drift, multiplier));
                if let Some(drift) = drift.map_err(WeightsError::from)? {
                    visitor.drifted(*site, drift);
                }
                stands.push(Stand { site: *site, gram, sample: gathered.sample });
            }
            if stands.is_empty() {
                continue;
            }
            let visited: Vec<usize> = stands.iter().map(|stand| stand.site).collect();
            for (site, weights) in visited.into_iter().zip(visitor.visit_all(stands)?) {
                answers[site] = Some(weights);
            }
            beyond = step + 1;
        }
        self.second_arrives(full, &steps)?;
        if !arrives {
            return Ok(());
        }
        if once {
            return self.arrive(held, (&steps, beyond), &answers, states, 0);
        }
        for from in (0..batches).step_by(self.wave) {
            let travellers = self.depart(states, from)?;
            self.arrive(travellers, (&steps, beyond), &answers, states, from)?;
        }
        Ok(())
    }

    fn traveller(&self, state: State) -> Result<Traveller<'p>, Error> {
        let windows = state.hidden.dim(0).map_err(WeightsError::from)?;
        Ok(Traveller::new(self.forward.course(self.index, self.parameters, state, self.experts), windows))
    }

    /// A wave of batches in front of the block.
    fn depart(&self, states: &States, from: usize) -> Result<Vec<Traveller<'p>>, Error> {
        let wave = from..states.len().min(from + self.wave);
        wave.map(|batch| self.traveller(states.get(batch)?)).collect()
    }

    fn reach(
        &self,
        travellers: &mut [Traveller<'p>],
        steps: &Steps<'_>,
        step: usize,
        answers: &[Option<Vec<Tensor>>],
    ) -> Result<(), Error> {
        let reach = |traveller: &mut Traveller<'p>| traveller.reach(steps, step, answers);
        each(self.forward.device(), self.pool, travellers, reach).map(drop)
    }

    fn gather(
        &self,
        travellers: &[Traveller<'p>],
        site: usize,
        from: usize,
        gathered: &mut Gathered,
    ) -> Result<(), Error> {
        for (at, traveller) in travellers.iter().enumerate() {
            let Some(input) = traveller.input(site) else { continue };
            let window = self.windows.0 + (from + at) * self.batch;
            self.pool.install(|| add_gram(&mut gathered.sum, window, input))?;
        }
        gathered.sample.extend(self.sample(travellers, site, from)?);
        Ok(())
    }

    /// These batches of the full-precision stream in front of the block; none where nobody asks.
    fn second_from(&self, from: usize, end: usize) -> Result<Vec<Traveller<'p>>, Error> {
        let Some(second) = self.second else { return Ok(Vec::new()) };
        let states = second.states.lock().unwrap_or_else(PoisonError::into_inner);
        let course = |state: &State| {
            let windows = state.hidden.dim(0).map_err(WeightsError::from)?;
            let course = self.forward.course(self.index, second.parameters, state.clone(), self.experts);
            Ok(Traveller::new(course, windows))
        };
        states[from..end].iter().map(course).collect()
    }

    /// Leaves the full-precision stream behind the block; `held` if all of it is on the way.
    fn second_arrives(&self, held: Vec<Traveller<'p>>, steps: &Steps<'_>) -> Result<(), Error> {
        let Some(second) = self.second else { return Ok(()) };
        let behind = steps.all.len();
        let count = second.states.lock().unwrap_or_else(PoisonError::into_inner).len();
        let wave = if held.len() == count { count } else { self.wave };
        let mut held = Some(held).filter(|held| held.len() == count);
        for from in (0..count).step_by(wave.max(1)) {
            let mut travellers = match held.take() {
                Some(held) => held,
                None => self.second_from(from, count.min(from + wave))?,
            };
            self.reach(&mut travellers, steps, behind, &[])?;
            let mut states = second.states.lock().unwrap_or_else(PoisonError::into_inner);
            for (state, traveller) in states[from..].iter_mut().zip(travellers) {
                *state = traveller.done.ok_or_else(unfinished)?;
            }
        }
        Ok(())
    }

    /// Adds what stands at a site on both streams.
    fn gather_drift(
        &self,
        own: &[Traveller<'p>],
        full: &[Traveller<'p>],
        site: usize,
        from: usize,
        gathered: &mut Gathered,
    ) {
        let meetings: Vec<_> = own.iter().zip(full).map(|(own, full)| Meeting::of(own, full, site)).collect();
        self.pool.install(|| {
            for (at, meeting) in meetings.into_iter().enumerate() {
                if let Some(pair) = self.pair(meeting, site).transpose() {
                    add_drift(&mut gathered.drift, self.windows.0 + (from + at) * self.batch, pair);
                }
            }
        });
    }

    /// What stands at a site on both streams; `None` where that cannot be said. An expert is given the tokens that come to it on
    /// the quantized stream, as they are on the full-precision one.
    fn pair(&self, meeting: Meeting, site: usize) -> mlx_quant_engine::Result<Option<Pair>> {
        let Meeting { own: Some(stop), full, routed } = meeting else { return Ok(None) };
        let Some(second) = self.second else { return Ok(None) };
        let (of, own) = (&self.sites[site], flat(&stop.input)?);
        if of.expert.is_none() {
            let Some(other) = full else { return Ok(None) };
            let streams = match (second.writes[site], other.stream, stop.stream) {
                (Some(_), Some(full), Some(own)) => Some((flat(&full)?, flat(&own)?)),
                _ => None,
            };
            return Ok(Some(Pair { own, full: flat(&other.input)?, streams }));
        }
        let (Some(routed), Some(tokens)) = (&routed, &stop.tokens) else { return Ok(None) };
        let rows = flat(routed)?.rows(tokens)?;
        let full = match of.producer {
            Producer::Norm(_) => rows,
            Producer::Product(mlp) => self.forward.inner(second.parameters, mlp, of.slice, &rows)?,
            _ => return Ok(None),
        };
        Ok(Some(Pair { own, full, streams: None }))
    }

    /// The Gram matrix of all windows, which stand at a site; `None` where no token came there.
    fn gram(&self, travellers: &[Traveller<'p>], site: usize) -> Result<Option<Gram>, Error> {
        let at = |(at, traveller): (usize, &Traveller<'p>)| {
            let window = self.windows.0 + at * self.batch;
            traveller.input(site).map(|input| (window, input.clone()))
        };
        let inputs: Vec<(usize, Tensor)> = travellers.iter().enumerate().filter_map(at).collect();
        gram_of(&inputs, (self.size(site), self.windows.1), self.who())
    }

    fn who(&self) -> (&'p Team, &'p Device, &'p rayon::ThreadPool) {
        (self.team, self.forward.device(), self.pool)
    }

    /// Input features of a site.
    fn size(&self, site: usize) -> usize {
        let name = format!("{}.weight", self.sites[site].readers[0].path);
        self.parameters.get(&name).and_then(|weight| weight.dims().last().copied()).unwrap_or(1)
    }

    /// What stands at a site of the first [`SAMPLE`] windows, as far as these batches, the first of which is `from` of this
    /// member's, hold them.
    fn sample(
        &self,
        travellers: &[Traveller<'_>],
        site: usize,
        from: usize,
    ) -> Result<Vec<Tensor>, WeightsError> {
        let mut all = Vec::new();
        for (at, traveller) in travellers.iter().enumerate() {
            let left = SAMPLE.saturating_sub(self.windows.0 + (from + at) * self.batch);
            if left == 0 {
                break;
            }
            all.extend(traveller.sample(site, left)?);
        }
        Ok(all)
    }

    /// The samples of the leader, which has the first windows.
    fn leaders(&self, sample: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        if self.team.is_alone() {
            return Ok(sample);
        }
        let all = self.team.gather(Part { tensors: sample, ..Part::default() })?;
        let here = |tensor: &Tensor| tensor.on(self.forward.device());
        let tensors = self.pool.install(|| all[0].tensors.iter().map(here).collect::<Result<Vec<_>, _>>());
        Ok(tensors.map_err(WeightsError::from)?)
    }

    /// Behind the block.
    fn arrive(
        &self,
        mut travellers: Vec<Traveller<'p>>,
        (steps, beyond): (&Steps<'_>, usize),
        answers: &[Option<Vec<Tensor>>],
        states: &mut States,
        from: usize,
    ) -> Result<(), Error> {
        self.reach(&mut travellers, steps, beyond, answers)?;
        let done = travellers.into_iter().map(|traveller| Ok(traveller.done.ok_or_else(unfinished)?));
        let done = done.collect::<Result<Vec<State>, Error>>()?;
        self.pool.install(|| states.put(from, done))
    }
}
