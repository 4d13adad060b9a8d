//! The last matrix, a tile of the vocabulary at a time, for all windows and both models.

use mlx_quant_engine::Tensor;
use mlx_quant_engine::running::{RunningDivergence, RunningScore};
use mlx_quant_model::{Forward, Parameters, WeightsError};

use super::result::{Divergence, TokenMeasure};
use crate::Error;
use crate::observer::{Event, Observer, Unit};
use crate::walks::{Walk, each, tile_rows, tiles};

/// What is gathered of the tokens of one window.
enum Running {
    Alone(Vec<RunningScore>),
    Beside(Vec<RunningDivergence>),
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
    let tiles = tiles(&model.0.device, vocabulary);
    let mut passed = 0;
    let total = (vocabulary.div_ceil(tile_rows(&model.0.device)) * windows.len()) as u64;
    observer.event(Event::Phase { name: "head", unit: Unit::Parts, total, tokens: 0 });
    let fresh = |window: &&[u32]| {
        let tokens = window.len().saturating_sub(1);
        match &reference {
            Some(_) => Running::Beside(vec![RunningDivergence::default(); tokens]),
            None => Running::Alone(vec![RunningScore::default(); tokens]),
        }
    };
    let mut running: Vec<Running> = windows.iter().map(fresh).collect();
    let heads = [Some(&model), reference.as_ref()];
    let own = forward(&model)?;
    let other = reference.as_ref().map(forward).transpose()?;
    for rows in tiles {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
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
        let step = |(window, running): (usize, &mut Running)| -> mlx_quant_engine::Result<()> {
            let model = logits(&own, &loaded[0], &model, window)?;
            let (device, first, targets) = (model.device(), rows.start as u32, &windows[window][1..]);
            match (running, &other, &reference) {
                (Running::Alone(scores), ..) => device.score(&model, first, targets, scores),
                (Running::Beside(both), Some(other), Some(reference)) => {
                    let reference = logits(other, &loaded[1], reference, window)?;
                    device.compare(&reference, &model, first, targets, both)
                }
                (Running::Beside(_), ..) => Ok(()),
            }
        };
        each(&model.0.device, pool, running.iter_mut().enumerate(), step).map_err(WeightsError::from)?;
        passed += windows.len() as u64;
        observer.event(Event::Progress { done: passed });
    }
    Ok(running.into_iter().map(Running::measures).collect())
}

fn forward<'w>(states: &States<'w, '_>) -> Result<Forward<'w>, Error> {
    Ok(Forward::new(&states.0.decoder, 0, &states.0.device).map_err(WeightsError::from)?)
}

fn load(walk: &Walk<'_>, rows: std::ops::Range<usize>) -> Result<Parameters, Error> {
    let head = walk.decoder.head.linear.as_ref();
    let path = head.map_or(&walk.decoder.embedding.path, |linear| &linear.path);
    Ok(walk.weights.load_tile(path, rows, &walk.device)?)
}

impl Running {
    fn measures(self) -> Vec<TokenMeasure> {
        let alone = |score: RunningScore| TokenMeasure { nll: score.nll(), divergence: None };
        let beside = |both: RunningDivergence| TokenMeasure {
            nll: both.model.nll(),
            divergence: Some(Divergence {
                kl: both.divergence(),
                agrees: both.agrees(),
                reference_nll: both.reference.nll(),
            }),
        };
        match self {
            Self::Alone(scores) => scores.into_iter().map(alone).collect(),
            Self::Beside(both) => both.into_iter().map(beside).collect(),
        }
    }
}
