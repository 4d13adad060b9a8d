//! The calibrating walk: all windows through a block, site by site, each site being left with quantized readers.
//!
//! What reaches a site has passed everything that was quantized before it, in this block and in those before, so that
//! errors are seen where they arrive and later layers make up for them. Every matrix product runs once. With little
//! memory, windows are taken through a block a few at a time and once for each of its sites instead of being held
//! at each site all together; the sums are the same, window by window.

mod states;
mod statistics;

use candle_core::Tensor;
use mlx_quant_model::{Course, Forward, Parameters, Progress, Site, State, Stop, WeightsError};
use rayon::prelude::*;

pub(crate) use self::states::States;
pub(crate) use self::statistics::{Collector, Statistics};
use crate::Error;
use crate::methods::{Gram, GramSum};

/// What is done at the sites of a block.
pub(crate) trait Visitor {
    /// All tokens stand before site `index` of the block; gives the weight `[out, in]` with which each reader is passed.
    ///
    /// `sample` holds the inputs of the first windows (those of them that have any).
    fn visit(&mut self, index: usize, gram: Gram, sample: &[Tensor]) -> Result<Vec<Tensor>, Error>;

    /// Whether to stop.
    fn cancelled(&self) -> bool;
}

/// Windows whose inputs are shown to the visitor as they are.
pub(crate) const SAMPLE: usize = 2;

/// One window within a block.
struct Traveller<'f> {
    course: Course<'f>,
    /// Where it stands: site, and what stands there.
    at: Option<(usize, Stop)>,
    done: Option<State>,
}

/// Which site of the block a stop is.
fn site_of(sites: &[Site<'_>], stop: &Stop) -> Result<usize, Error> {
    let same =
        |site: &&Site<'_>| site.expert == stop.expert && site.readers.iter().copied().eq(stop.readers.iter());
    let unknown = || {
        let readers: Vec<&str> = stop.readers.iter().map(|reader| reader.path.as_str()).collect();
        WeightsError::Tensor(candle_core::Error::msg(format!("no site of the block is read by {readers:?}")))
    };
    Ok(sites.iter().position(|site| same(&site)).ok_or_else(unknown)?)
}

impl<'f> Traveller<'f> {
    fn new(course: Course<'f>) -> Self {
        Self { course, at: None, done: None }
    }

    fn advance(&mut self, sites: &[Site<'_>], weights: Option<Vec<Tensor>>) -> Result<(), Error> {
        match self.course.advance(weights).map_err(WeightsError::from)? {
            Progress::At(stop) => self.at = Some((site_of(sites, &stop)?, stop)),
            Progress::Done(state) => (self.at, self.done) = (None, Some(state)),
        }
        Ok(())
    }

    /// Goes on while it stands before `site`; `answers` holds the weights of the sites that were visited.
    fn reach(
        &mut self,
        sites: &[Site<'_>],
        site: usize,
        answers: &[Option<Vec<Tensor>>],
    ) -> Result<(), Error> {
        if self.at.is_none() && self.done.is_none() {
            self.advance(sites, None)?;
        }
        while let Some((at, _)) = self.at.as_ref().filter(|(at, _)| *at < site) {
            let weights = answers[*at].clone();
            self.advance(sites, weights)?;
        }
        Ok(())
    }

    fn input(&self, site: usize) -> Option<&Tensor> {
        self.at.as_ref().filter(|(at, _)| *at == site).map(|(_, stop)| &stop.input)
    }
}

/// Weights of sites that no window stands before any more.
fn passed(answers: &mut [Option<Vec<Tensor>>], site: usize) {
    answers[..site].iter_mut().for_each(|weights| *weights = None);
}

/// Takes `states` through block `index` and leaves them behind it.
///
/// `wave` is how many windows are within the block at a time: all of them travel once; fewer travel once for each site.
pub(crate) fn through_block(
    forward: &Forward<'_>,
    index: usize,
    sites: &[Site<'_>],
    parameters: &Parameters,
    states: &mut States,
    wave: usize,
    pool: &rayon::ThreadPool,
    visitor: &mut dyn Visitor,
) -> Result<(), Error> {
    let windows = states.len();
    let once = wave >= windows;
    let mut answers: Vec<Option<Vec<Tensor>>> = vec![None; sites.len()];
    let mut held: Vec<Traveller<'_>> = Vec::new();
    if once {
        held = states
            .take_all()?
            .into_iter()
            .map(|state| Traveller::new(forward.course(index, parameters, state)))
            .collect();
    }
    let mut last = 0;
    for site in 0..sites.len() {
        if visitor.cancelled() {
            return Err(Error::Interrupted);
        }
        let mut sum: Option<GramSum> = None;
        let mut sample = Vec::new();
        let mut gather = |travellers: &[Traveller<'_>], from: usize| -> Result<(), Error> {
            let inputs: Vec<&Tensor> =
                travellers.iter().filter_map(|traveller| traveller.input(site)).collect();
            let Some(first) = inputs.first() else { return Ok(()) };
            let size = first.dims().last().copied().unwrap_or(1);
            let sum = sum.get_or_insert_with(|| GramSum::new(size));
            pool.install(|| sum.add(&inputs)).map_err(WeightsError::from)?;
            if from < SAMPLE {
                let own = travellers.iter().take(SAMPLE - from).filter_map(|traveller| traveller.input(site));
                sample.extend(own.cloned());
            }
            Ok(())
        };
        let reach = |travellers: &mut [Traveller<'_>]| -> Result<(), Error> {
            pool.install(|| {
                travellers.par_iter_mut().try_for_each(|traveller| traveller.reach(sites, site, &answers))
            })
        };
        if once {
            reach(&mut held)?;
            gather(&held, 0)?;
            passed(&mut answers, site);
        } else {
            for from in (0..windows).step_by(wave) {
                let mut travellers = (from..windows.min(from + wave))
                    .map(|window| Ok(Traveller::new(forward.course(index, parameters, states.get(window)?))))
                    .collect::<Result<Vec<_>, Error>>()?;
                reach(&mut travellers)?;
                gather(&travellers, from)?;
            }
        }
        if let Some(sum) = sum {
            let gram = pool.install(|| sum.finish());
            answers[site] = Some(visitor.visit(site, gram, &sample)?);
            last = site;
        }
    }
    let beyond = last + 1;
    let finish = |traveller: &mut Traveller<'_>| -> Result<State, Error> {
        traveller.reach(sites, beyond, &answers)?;
        let unfinished = || WeightsError::Tensor(candle_core::Error::msg("a window did not leave its block"));
        Ok(traveller.done.take().ok_or_else(unfinished)?)
    };
    if once {
        let done: Vec<State> =
            pool.install(|| held.par_iter_mut().map(finish).collect::<Result<_, Error>>())?;
        drop(held);
        return pool.install(|| states.put(0, done));
    }
    for from in (0..windows).step_by(wave) {
        let mut travellers = (from..windows.min(from + wave))
            .map(|window| Ok(Traveller::new(forward.course(index, parameters, states.get(window)?))))
            .collect::<Result<Vec<_>, Error>>()?;
        let done: Vec<State> =
            pool.install(|| travellers.par_iter_mut().map(finish).collect::<Result<_, Error>>())?;
        drop(travellers);
        pool.install(|| states.put(from, done))?;
    }
    Ok(())
}
