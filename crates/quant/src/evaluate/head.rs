//! The last matrix, a tile of the vocabulary at a time, for all windows and both models.

use mlx_quant_engine::Tensor;
use mlx_quant_engine::running::{RunningDivergence, RunningScore};
use mlx_quant_model::{Forward, Parameters, WeightsError};
use rayon::prelude::*;

use super::result::{Divergence, TokenMeasure};
use crate::Error;
use crate::observer::{Event, Observer, Unit};
use crate::walks::{TILE, Walk};

/// What is gathered of one token.
#[derive(Clone, Copy)]
enum Running {
    Alone(RunningScore),
    Beside(RunningDivergence),
}

/// Final hidden states of all windows, each `[tokens, hidden]`.
pub type States<'w, 'm> = (&'w Walk<'m>, Vec<Tensor>);

/// Measures of every predicted token, by window.
pub fn measure(
    model: States<'_, '_>,
    reference: Option<States<'_, '_>>,
    windows: &[&[u32]],
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<Vec<Vec<TokenMeasure>>, Error> {
    let vocabulary = model.0.decoder.vocabulary;
    let tiles = vocabulary.div_ceil(TILE);
    let total = (tiles * windows.len()) as u64;
    observer.event(Event::Phase { name: "head", unit: Unit::Parts, total, tokens: 0 });
    let fresh = if reference.is_some() {
        Running::Beside(RunningDivergence::default())
    } else {
        Running::Alone(RunningScore::default())
    };
    let mut running: Vec<Vec<Running>> = windows.iter().map(|window| vec![fresh; window.len() - 1]).collect();
    let heads = [Some(&model), reference.as_ref()];
    let own = forward(&model)?;
    let other = reference.as_ref().map(forward).transpose()?;
    for tile in 0..tiles {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        let rows = tile * TILE..((tile + 1) * TILE).min(vocabulary);
        let mut loaded = Vec::new();
        for states in heads.into_iter().flatten() {
            loaded.push(pool.install(|| load(states.0, rows.clone()))?);
            states.0.weights.release();
        }
        let logits =
            |forward: &Forward<'_>, parameters: &Parameters, states: &States<'_, '_>, window: usize| {
                let hidden = &states.1[window];
                let predicting = hidden.narrow(0, 0, hidden.dim(0)? - 1)?;
                forward.logits(parameters, &predicting)
            };
        let step = |(window, running): (usize, &mut Vec<Running>)| -> mlx_quant_engine::Result<()> {
            let own = logits(&own, &loaded[0], &model, window)?;
            let other = match (&other, &reference) {
                (Some(other), Some(reference)) => Some(logits(other, &loaded[1], reference, window)?),
                _ => None,
            };
            let targets = &windows[window][1..];
            own.read(|own| match &other {
                None => {
                    add(running, targets, rows.clone(), own, &[]);
                    Ok(())
                }
                Some(other) => other.read(|other| add(running, targets, rows.clone(), own, other)),
            })?
        };
        pool.install(|| running.par_iter_mut().enumerate().try_for_each(step)).map_err(WeightsError::from)?;
        observer.event(Event::Progress { done: ((tile + 1) * windows.len()) as u64 });
    }
    Ok(running.into_iter().map(|window| window.into_iter().map(TokenMeasure::from).collect()).collect())
}

fn forward<'w>(states: &States<'w, '_>) -> Result<Forward<'w>, Error> {
    Ok(Forward::new(&states.0.decoder, 0, &states.0.device).map_err(WeightsError::from)?)
}

fn load(walk: &Walk<'_>, rows: std::ops::Range<usize>) -> Result<Parameters, Error> {
    let head = walk.decoder.head.linear.as_ref();
    let path = head.map_or(&walk.decoder.embedding.path, |linear| &linear.path);
    Ok(walk.weights.load_tile(path, rows, &walk.device)?)
}

fn add(running: &mut [Running], targets: &[u32], rows: std::ops::Range<usize>, own: &[f32], other: &[f32]) {
    let width = rows.len();
    let first = rows.start as u32;
    for (token, (running, &target)) in running.iter_mut().zip(targets).enumerate() {
        let own = &own[token * width..][..width];
        match running {
            Running::Alone(score) => score.add(own, first, target),
            Running::Beside(both) => both.add(&other[token * width..][..width], own, first, target),
        }
    }
}

impl From<Running> for TokenMeasure {
    fn from(running: Running) -> Self {
        match running {
            Running::Alone(score) => Self { nll: score.nll(), divergence: None },
            Running::Beside(both) => Self {
                nll: both.model.nll(),
                divergence: Some(Divergence {
                    kl: both.divergence(),
                    agrees: both.agrees(),
                    reference_nll: both.reference.nll(),
                }),
            },
        }
    }
}
