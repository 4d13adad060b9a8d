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

use std::sync::PoisonError;

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Course, Forward, Parameters, Producer, Progress, Site, State, Stop, WeightsError};

pub(crate) use self::drift::{Drift, Second};
use self::drift::{DriftTree, Pair, add_drift, flat};
use self::gram::GramTree;
pub(crate) use self::gram::{add_gram, gram_of, held_in_parts};
pub(crate) use self::states::{Batches, Saving, States, apart, together};
pub(crate) use self::statistics::{Collector, Statistics};
use crate::Error;
use crate::methods::Gram;
use crate::walks::spread::each;

/// The visitor of a calibrating walk: what is done at the sites of a block.
pub(crate) trait Visitor {
    /// All tokens stand before site `index` of the block. Gives the weight `[out, in]` with which windows pass each
    /// reader.
    ///
    /// `sample` holds the inputs of the first [`SAMPLE`] windows, without those of which no token came here.
    fn visit(&mut self, index: usize, gram: Gram, sample: &[Tensor]) -> Result<Vec<Tensor>, Error>;

    /// How far what stands at site `index` is from the full-precision stream, before it is visited.
    fn drifted(&mut self, _index: usize, _drift: Drift) {}

    /// Whether to stop.
    fn cancelled(&self) -> bool;
}

/// Windows whose inputs are shown to the visitor as they are.
pub(crate) const SAMPLE: usize = 2;

/// One batch of windows within a block.
struct Traveller<'f> {
    course: Course<'f>,
    windows: usize,
    /// Where it stands: site, and what stands there.
    at: Option<(usize, Stop)>,
    /// What the router read, which stood at the site before the first expert's.
    routed: Option<Tensor>,
    done: Option<State>,
}

/// Which site of the block a stop is.
fn site_of(sites: &[Site<'_>], stop: &Stop) -> Result<usize, Error> {
    let same =
        |site: &&Site<'_>| site.expert == stop.expert && site.readers.iter().copied().eq(stop.readers.iter());
    let unknown = || {
        let readers: Vec<&str> = stop.readers.iter().map(|reader| reader.path.as_str()).collect();
        WeightsError::Tensor(mlx_quant_engine::Error::msg(format!(
            "no site of the block is read by {readers:?}"
        )))
    };
    Ok(sites.iter().position(|site| same(&site)).ok_or_else(unknown)?)
}

impl<'f> Traveller<'f> {
    fn new(course: Course<'f>, windows: usize) -> Self {
        Self { course, windows, at: None, routed: None, done: None }
    }

    fn advance(&mut self, sites: &[Site<'_>], weights: Option<Vec<Tensor>>) -> Result<(), Error> {
        match self.course.advance(weights).map_err(WeightsError::from)? {
            Progress::At(stop) => self.at = Some((site_of(sites, &stop)?, stop)),
            Progress::Done(state) => (self.at, self.done) = (None, Some(state)),
        }
        Ok(())
    }

    /// Goes on until it stands at `site` or behind it; `answers` holds the weights of the sites that were visited.
    fn reach(
        &mut self,
        sites: &[Site<'_>],
        site: usize,
        answers: &[Option<Vec<Tensor>>],
    ) -> Result<(), Error> {
        if self.at.is_none() && self.done.is_none() {
            self.advance(sites, None)?;
            self.note_routed(sites);
        }
        while let Some((at, _)) = self.at.as_ref().filter(|(at, _)| *at < site) {
            let weights = answers.get(*at).cloned().flatten();
            self.advance(sites, weights)?;
            self.note_routed(sites);
        }
        Ok(())
    }

    fn note_routed(&mut self, sites: &[Site<'_>]) {
        if let Some((at, stop)) = &self.at
            && stop.expert.is_none()
            && sites.get(at + 1).is_some_and(|next| next.expert.is_some())
        {
            self.routed = Some(stop.input.clone());
        }
    }

    fn input(&self, site: usize) -> Option<&Tensor> {
        self.at.as_ref().filter(|(at, _)| *at == site).map(|(_, stop)| &stop.input)
    }

    /// What stands at a site of the first `windows` windows, one by one; where tokens were sorted out of them (before an
    /// expert), a part of the tokens together.
    fn sample(&self, site: usize, windows: usize) -> mlx_quant_engine::Result<Vec<Tensor>> {
        let Some(input) = self.input(site) else { return Ok(Vec::new()) };
        let windows = windows.min(self.windows);
        if input.rank() > 2 {
            return (0..windows).map(|window| input.narrow(0, window, 1)).collect();
        }
        let rows = (input.dim(0)? * windows).div_ceil(self.windows.max(1));
        Ok(vec![input.narrow(0, 0, rows)?])
    }
}

fn unfinished() -> WeightsError {
    WeightsError::Tensor(mlx_quant_engine::Error::msg("a window did not leave its block"))
}

/// Weights of sites that no window stands before any more.
fn passed(answers: &mut [Option<Vec<Tensor>>], site: usize) {
    answers[..site].iter_mut().for_each(|weights| *weights = None);
}

/// A batch of windows on both streams, where they stand at a site.
struct Meeting {
    own: Option<Stop>,
    full: Option<Stop>,
    routed: Option<Tensor>,
}

impl Meeting {
    fn of(own: &Traveller<'_>, full: &Traveller<'_>, site: usize) -> Self {
        let at = |traveller: &Traveller<'_>| {
            traveller.at.as_ref().filter(|(at, _)| *at == site).map(|(_, stop)| stop.clone())
        };
        Self { own: at(own), full: at(full), routed: full.routed.clone() }
    }
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
    /// Windows of a batch; the last one may have fewer.
    pub(crate) batch: usize,
    pub(crate) pool: &'p rayon::ThreadPool,
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

/// What stands at a site of the first [`SAMPLE`] windows, as far as these batches, the first of which is `from`, hold
/// them.
fn sample(
    travellers: &[Traveller<'_>],
    site: usize,
    from: usize,
    batch: usize,
) -> Result<Vec<Tensor>, WeightsError> {
    let mut all = Vec::new();
    for (at, traveller) in travellers.iter().enumerate() {
        let left = SAMPLE.saturating_sub((from + at) * batch);
        if left == 0 {
            break;
        }
        all.extend(traveller.sample(site, left)?);
    }
    Ok(all)
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
        for site in 0..self.sites.len() {
            if visitor.cancelled() {
                return Err(Error::Interrupted);
            }
            let mut gathered = Gathered::default();
            let gram = if once {
                self.reach(&mut held, site, &answers)?;
                passed(&mut answers, site);
                self.reach(&mut full, site, &[])?;
                self.gather_drift(&held, &full, site, 0, &mut gathered);
                gathered.sample = sample(&held, site, 0, self.batch)?;
                self.gram(&held, site)?
            } else {
                for from in (0..batches).step_by(self.wave) {
                    let mut travellers = self.depart(states, from)?;
                    self.reach(&mut travellers, site, &answers)?;
                    let mut full = self.second_from(from, batches.min(from + self.wave))?;
                    self.reach(&mut full, site, &[])?;
                    self.gather_drift(&travellers, &full, site, from, &mut gathered);
                    self.gather(&travellers, site, from, &mut gathered)?;
                }
                let sum = std::mem::take(&mut gathered.sum);
                let gram = self.pool.install(|| sum.finish().map(|sum| sum.and_then(|sum| sum.0.finish())));
                gram.transpose().map_err(WeightsError::from)?
            };
            let Some(gram) = gram else { continue };
            let multiplier = self.second.and_then(|second| second.writes[site]);
            let drift = self.pool.install(|| drift::finish(gathered.drift, multiplier));
            if let Some(drift) = drift.map_err(WeightsError::from)? {
                visitor.drifted(site, drift);
            }
            answers[site] = Some(visitor.visit(site, gram, &gathered.sample)?);
            beyond = site + 1;
        }
        self.second_arrives(full)?;
        if !arrives {
            return Ok(());
        }
        if once {
            return self.arrive(held, beyond, &answers, states, 0);
        }
        for from in (0..batches).step_by(self.wave) {
            let travellers = self.depart(states, from)?;
            self.arrive(travellers, beyond, &answers, states, from)?;
        }
        Ok(())
    }

    fn traveller(&self, state: State) -> Result<Traveller<'p>, Error> {
        let windows = state.hidden.dim(0).map_err(WeightsError::from)?;
        Ok(Traveller::new(self.forward.course(self.index, self.parameters, state), windows))
    }

    /// A wave of batches in front of the block.
    fn depart(&self, states: &States, from: usize) -> Result<Vec<Traveller<'p>>, Error> {
        let wave = from..states.len().min(from + self.wave);
        wave.map(|batch| self.traveller(states.get(batch)?)).collect()
    }

    fn reach(
        &self,
        travellers: &mut [Traveller<'p>],
        site: usize,
        answers: &[Option<Vec<Tensor>>],
    ) -> Result<(), Error> {
        let reach = |traveller: &mut Traveller<'p>| traveller.reach(self.sites, site, answers);
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
            self.pool.install(|| add_gram(&mut gathered.sum, (from + at) * self.batch, input))?;
        }
        gathered.sample.extend(sample(travellers, site, from, self.batch)?);
        Ok(())
    }

    /// These batches of the full-precision stream in front of the block; none where nobody asks.
    fn second_from(&self, from: usize, end: usize) -> Result<Vec<Traveller<'p>>, Error> {
        let Some(second) = self.second else { return Ok(Vec::new()) };
        let states = second.states.lock().unwrap_or_else(PoisonError::into_inner);
        let course = |state: &State| {
            let windows = state.hidden.dim(0).map_err(WeightsError::from)?;
            let course = self.forward.course(self.index, second.parameters, state.clone());
            Ok(Traveller::new(course, windows))
        };
        states[from..end].iter().map(course).collect()
    }

    /// Leaves the full-precision stream behind the block; `held` if all of it is on the way.
    fn second_arrives(&self, held: Vec<Traveller<'p>>) -> Result<(), Error> {
        let Some(second) = self.second else { return Ok(()) };
        let behind = self.sites.len();
        let count = second.states.lock().unwrap_or_else(PoisonError::into_inner).len();
        let wave = if held.len() == count { count } else { self.wave };
        let mut held = Some(held).filter(|held| held.len() == count);
        for from in (0..count).step_by(wave.max(1)) {
            let mut travellers = match held.take() {
                Some(held) => held,
                None => self.second_from(from, count.min(from + wave))?,
            };
            self.reach(&mut travellers, behind, &[])?;
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
                    add_drift(&mut gathered.drift, (from + at) * self.batch, pair);
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
        let Some(expert) = of.expert else {
            let Some(other) = full else { return Ok(None) };
            let streams = match (second.writes[site], other.stream, stop.stream) {
                (Some(_), Some(full), Some(own)) => Some((flat(&full)?, flat(&own)?)),
                _ => None,
            };
            return Ok(Some(Pair { own, full: flat(&other.input)?, streams }));
        };
        let (Some(routed), Some(tokens)) = (&routed, &stop.tokens) else { return Ok(None) };
        let rows = flat(routed)?.rows(tokens)?;
        let full = match of.producer {
            Producer::Norm(_) => rows,
            Producer::Product(mlp) => {
                self.forward.inner(second.parameters, mlp, (expert, of.slice), &rows)?
            }
            _ => return Ok(None),
        };
        Ok(Some(Pair { own, full, streams: None }))
    }

    /// The Gram matrix of all windows, which stand at a site; `None` where no token came there.
    fn gram(&self, travellers: &[Traveller<'p>], site: usize) -> Result<Option<Gram>, Error> {
        let at = |(at, traveller): (usize, &Traveller<'p>)| {
            traveller.input(site).map(|input| (at * self.batch, input.clone()))
        };
        let inputs: Vec<(usize, Tensor)> = travellers.iter().enumerate().filter_map(at).collect();
        Ok(self.pool.install(|| gram_of(&inputs))?)
    }

    /// Behind the block.
    fn arrive(
        &self,
        mut travellers: Vec<Traveller<'p>>,
        beyond: usize,
        answers: &[Option<Vec<Tensor>>],
        states: &mut States,
        from: usize,
    ) -> Result<(), Error> {
        self.reach(&mut travellers, beyond, answers)?;
        let done = travellers.into_iter().map(|traveller| Ok(traveller.done.ok_or_else(unfinished)?));
        let done = done.collect::<Result<Vec<State>, Error>>()?;
        self.pool.install(|| states.put(from, done))
    }
}
