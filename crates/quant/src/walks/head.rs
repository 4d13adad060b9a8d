//! The head and the loss behind it, a tile of the vocabulary at a time: logits of a tile are all that is ever in
//! memory.
//!
//! Two passes over the tiles: the first finds each token's log-sum-exp, the second its probabilities, and from them
//! gradients.

use std::ops::Range;

use mlx_quant_engine::running::RunningScore;
use mlx_quant_engine::{Device, Gradients, Labels, Likeliest, Tensor};
use mlx_quant_model::{Decoder, Forward, Parameters, WeightsError};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use super::spread::each;
use crate::Error;
use crate::reduce::InOrder;

/// If all tokens that are not among the likeliest have less probability than this together, it is rounding of float32
/// sums and counts as nothing.
const REST: f64 = 1e-6;

/// Reads rows of a head.
pub(crate) type Tiles<'t> = &'t (dyn Fn(Range<usize>) -> Result<Parameters, Error> + Sync);

/// What sampled labels give.
pub(crate) struct Sampled {
    /// Gradients with respect to the final hidden states of each window, `[tokens, hidden]`.
    pub(crate) gradients: Vec<Tensor>,
}

/// Rows of the vocabulary in a tile on a processor: enough for the matrix product to run at its full rate, few enough for
/// a tile of 512 tokens' logits (4 MB) to stay in a core's cache.
const TILE: usize = 2048;

/// Rows on a card, which is waited for once a tile and window.
const CARD_TILE: usize = 16_384;

/// Rows of the vocabulary in a tile.
pub(crate) fn tile_rows(device: &Device) -> usize {
    if device.memory().is_some() { CARD_TILE } else { TILE }
}

/// All tiles of a vocabulary.
pub(crate) fn tiles(device: &Device, vocabulary: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let rows = tile_rows(device);
    (0..vocabulary).step_by(rows).map(move |start| start..vocabulary.min(start + rows))
}

/// A head that is passed tile by tile.
#[derive(Clone, Copy)]
pub(crate) struct HeadPass<'p> {
    pub(crate) forward: &'p Forward<'p>,
    pub(crate) decoder: &'p Decoder,
    pub(crate) pool: &'p rayon::ThreadPool,
}

/// The log-sum-exp of every token's logits times `factor`, by window.
fn log_sum_exps(
    pass: HeadPass<'_>,
    tile: Tiles<'_>,
    hidden: &[Tensor],
    factor: f64,
) -> Result<Vec<Vec<f64>>, Error> {
    let HeadPass { forward, decoder, pool } = pass;
    let mut running: Vec<Vec<RunningScore>> = Vec::new();
    for window in hidden {
        running.push(vec![RunningScore::default(); window.dim(0).map_err(WeightsError::from)?]);
    }
    for rows in tiles(forward.device(), decoder.vocabulary) {
        let parameters = pool.install(|| tile(rows.clone()))?;
        let step = |(running, hidden): (&mut Vec<RunningScore>, &Tensor)| -> mlx_quant_engine::Result<()> {
            let logits = tempered(forward.logits(&parameters, hidden)?, factor)?;
            logits.device().score(&logits, rows.start as u32, &[], running)
        };
        each(forward.device(), pool, running.iter_mut().zip(hidden), step).map_err(WeightsError::from)?;
    }
    Ok(running.iter().map(|window| window.iter().map(RunningScore::log_sum_exp).collect()).collect())
}

fn tempered(logits: Tensor, factor: f64) -> mlx_quant_engine::Result<Tensor> {
    if factor == 1.0 { Ok(logits) } else { logits * factor }
}

/// A random number in `[0, 1)` for each token of a window, which is number `window` of all.
fn draws(seed: u64, window: u64, tokens: usize) -> Vec<f64> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&window.to_le_bytes());
    let mut generator = ChaCha20Rng::from_seed(key);
    (0..tokens).map(|_| (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64).collect()
}

/// Draws a next token for every token from the model's own distribution and gives the gradient of its negative log
/// probability. (The Fisher matrix is the second moment of these gradients.)
///
/// Adds expected squares of the gradient with respect to the head's output to `rows_sum`, by tile of the vocabulary.
/// `hidden` are final hidden states `[tokens, hidden]` of windows, the first of which is number `first` of all.
pub(crate) fn sampled(
    pass: HeadPass<'_>,
    tile: Tiles<'_>,
    hidden: &[Tensor],
    (seed, first): (u64, usize),
    rows_sum: &mut Vec<InOrder<Vec<f64>>>,
) -> Result<Sampled, Error> {
    struct Window<'h> {
        hidden: &'h Tensor,
        lse: Vec<f64>,
        labels: Labels,
        gradient: Option<Tensor>,
        squares: Vec<f64>,
    }
    let HeadPass { forward, decoder, pool } = pass;
    let (vocabulary, multiplier, softcap) =
        (decoder.vocabulary, decoder.head.multiplier, decoder.head.softcap);
    let lse = log_sum_exps(pass, tile, hidden, 1.0)?;
    let mut windows: Vec<Window<'_>> = hidden
        .iter()
        .zip(lse)
        .enumerate()
        .map(|(at, (hidden, lse))| Window {
            hidden,
            labels: Labels::new(draws(seed, (first + at) as u64, lse.len())),
            lse,
            gradient: None,
            squares: Vec::new(),
        })
        .collect();
    rows_sum.resize_with(tiles(forward.device(), vocabulary).count(), InOrder::default);
    for rows in tiles(forward.device(), vocabulary) {
        let parameters = pool.install(|| tile(rows.clone()))?;
        let last = rows.end == vocabulary;
        let step = |window: &mut Window<'_>| -> mlx_quant_engine::Result<()> {
            let input = window.hidden.variable();
            let logits = forward.logits(&parameters, &input)?;
            let own = logits.detach();
            let (slopes, squares) =
                own.device().label_slopes(&own, &window.lse, softcap, last, &mut window.labels)?;
            window.squares = squares;
            let store = logits.gradients(&slopes)?;
            add(&mut window.gradient, store.get(&input))
        };
        each(forward.device(), pool, &mut windows, step).map_err(WeightsError::from)?;
        let sum = &mut rows_sum[rows.start / tile_rows(forward.device())];
        for (at, window) in windows.iter().enumerate() {
            let squares = window.squares.iter().map(|square| square * multiplier.powi(2)).collect();
            sum.add(first + at, squares);
        }
    }
    let gradients = windows.into_iter().filter_map(|window| window.gradient).collect();
    Ok(Sampled { gradients })
}

fn add(sum: &mut Option<Tensor>, part: Option<&Tensor>) -> mlx_quant_engine::Result<()> {
    let part = part.ok_or_else(|| mlx_quant_engine::Error::msg("the head passes no gradient"))?;
    *sum = Some(match sum.take() {
        None => part.clone(),
        Some(sum) => (sum + part)?,
    });
    Ok(())
}

/// What a student is to learn.
pub(crate) enum Teacher<'t> {
    /// Final hidden states of each window, and the head behind them: the whole distribution.
    Whole { forward: &'t Forward<'t>, tile: Tiles<'t>, hidden: Vec<Tensor> },
    /// The likeliest tokens, and one number for all others.
    Top(Vec<Top>),
}

/// The likeliest tokens of each token of a window, at one temperature.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Top {
    /// Tokens kept for each.
    pub(crate) count: usize,
    /// `[tokens, count]`, ascending.
    pub(crate) ids: Vec<u32>,
    /// `[tokens, count]`: log probabilities.
    pub(crate) log_probabilities: Vec<f32>,
}

/// A head that learns: rows of it, and the variables (scales and centers) of these rows where they are trained.
pub(crate) type TrainedHead<'h> =
    &'h (dyn Fn(Range<usize>) -> Result<(Parameters, Option<[Tensor; 2]>), Error> + Sync);

/// Mean divergence of student from teacher, and its gradients.
pub(crate) struct Divergence {
    /// Of each window, nats a token, at the temperature.
    pub(crate) losses: Vec<f64>,
    /// With respect to the student's final hidden states.
    pub(crate) gradients: Vec<Tensor>,
    /// With respect to the head's scales and centers, `[vocabulary, groups]`, where they are trained.
    pub(crate) head: Option<[Tensor; 2]>,
}

/// One window between the two passes.
struct Pupil<'h> {
    hidden: &'h Tensor,
    lse: Vec<f64>,
    reference_lse: Vec<f64>,
    /// Of a [`Top`]: for each token the factor of what is not among its likeliest.
    rest: Vec<f32>,
    loss: f64,
    gradient: Option<Tensor>,
    store: Option<Gradients>,
}

/// `KL(teacher || student)` at a temperature, averaged over all tokens, and gradients of it if they are asked for.
pub(crate) fn divergence(
    pass: HeadPass<'_>,
    head: TrainedHead<'_>,
    hidden: &[Tensor],
    teacher: &Teacher<'_>,
    (temperature, gradients): (f64, bool),
) -> Result<Divergence, Error> {
    let HeadPass { forward, decoder, pool } = pass;
    let vocabulary = decoder.vocabulary;
    let factor = 1.0 / temperature;
    let plain = |rows| Ok(head(rows)?.0);
    let lse = log_sum_exps(pass, &plain, hidden, factor)?;
    let reference = match teacher {
        Teacher::Whole { forward, tile, hidden } => {
            log_sum_exps(HeadPass { forward, ..pass }, *tile, hidden, factor)?
        }
        Teacher::Top(_) => vec![Vec::new(); hidden.len()],
    };
    let tokens: usize = lse.iter().map(Vec::len).sum();
    let scale = (factor / tokens.max(1) as f64) as f32;
    let fresh = |((hidden, lse), reference_lse)| Pupil {
        hidden,
        lse,
        reference_lse,
        rest: Vec::new(),
        loss: 0.0,
        gradient: None,
        store: None,
    };
    let mut pupils: Vec<Pupil<'_>> = hidden.iter().zip(lse).zip(reference).map(fresh).collect();
    if let Teacher::Top(tops) = teacher {
        weigh_rest(pass, &plain, &mut pupils, tops, factor)?;
    }
    let mut head_gradients: [Vec<Tensor>; 2] = Default::default();
    for rows in tiles(forward.device(), vocabulary) {
        let (parameters, variables) = pool.install(|| head(rows.clone()))?;
        let theirs = match teacher {
            Teacher::Whole { tile, .. } => Some(pool.install(|| tile(rows.clone()))?),
            Teacher::Top(_) => None,
        };
        let step = |(window, pupil): (usize, &mut Pupil<'_>)| -> mlx_quant_engine::Result<()> {
            let input = pupil.hidden.variable();
            let logits = forward.logits(&parameters, &input)?;
            let own = logits.detach();
            let factors = (factor, scale);
            let slopes = match (teacher, &theirs) {
                (Teacher::Whole { forward, hidden, .. }, Some(theirs)) => {
                    let reference = forward.logits(theirs, &hidden[window])?;
                    let lses = (&*pupil.reference_lse, &*pupil.lse);
                    own.device().divergence_slopes(&reference, &own, lses, factors, &mut pupil.loss)?
                }
                (Teacher::Top(tops), _) => {
                    let likeliest = tops[window].within(&rows);
                    let tokens = (&*pupil.lse, &*pupil.rest);
                    let first = rows.start as u32;
                    own.device().likeliest_slopes(
                        &own,
                        first,
                        &likeliest,
                        tokens,
                        factors,
                        &mut pupil.loss,
                    )?
                }
                (Teacher::Whole { .. }, None) => return Ok(()),
            };
            if gradients {
                let store = logits.gradients(&slopes)?;
                add(&mut pupil.gradient, store.get(&input))?;
                pupil.store = Some(store);
            }
            Ok(())
        };
        each(forward.device(), pool, pupils.iter_mut().enumerate(), step).map_err(WeightsError::from)?;
        let Some(variables) = variables.filter(|_| gradients) else { continue };
        let stores =
            pupils.iter().enumerate().filter_map(|(window, pupil)| Some((window, pupil.store.as_ref()?)));
        for (all, variable) in head_gradients.iter_mut().zip(&variables) {
            all.push(sum_of(variable, stores.clone(), false)?);
        }
    }
    let losses = pupils.iter().map(|pupil| pupil.loss / pupil.lse.len().max(1) as f64).collect();
    let gradients = pupils.into_iter().filter_map(|pupil| pupil.gradient).collect();
    let [scales, centers] = head_gradients.each_ref().map(|tiles| joined(tiles));
    let head = scales?.zip(centers?);
    Ok(Divergence { losses, gradients, head: head.map(|(scales, centers)| [scales, centers]) })
}

/// Rows one below the other; nothing where there are none.
pub(crate) fn joined(parts: &[Tensor]) -> Result<Option<Tensor>, Error> {
    match parts {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        parts => Ok(Some(Tensor::cat(parts, 0).map_err(WeightsError::from)?)),
    }
}

/// The sum of a variable's gradients over windows: `stores` has those of each batch of them, with its first window, in
/// their order. Unless `some`, each must have one; where none has one, the sum is zeros.
pub(crate) fn sum_of<'s>(
    variable: &Tensor,
    stores: impl Iterator<Item = (usize, &'s Gradients)>,
    some: bool,
) -> Result<Tensor, Error> {
    let missing = || mlx_quant_engine::Error::msg("what is trained has no gradient");
    let mut sum = InOrder::default();
    for (window, store) in stores {
        match store.get(variable) {
            None if some => {}
            found => sum.add(window, found.cloned().ok_or_else(missing)),
        }
    }
    let flat = || Tensor::full(0.0, variable.dims(), variable.device());
    Ok(sum.finish().unwrap_or_else(flat).map_err(WeightsError::from)?)
}

impl Top {
    /// Those that lie among `rows`, of each token.
    fn within(&self, rows: &Range<usize>) -> Vec<Likeliest<'_>> {
        let tokens = self
            .ids
            .chunks_exact(self.count.max(1))
            .zip(self.log_probabilities.chunks_exact(self.count.max(1)));
        tokens
            .map(|(ids, logs)| {
                let [start, end] =
                    [rows.start, rows.end].map(|row| ids.partition_point(|id| (*id as usize) < row));
                Likeliest { ids: &ids[start..end], log_probabilities: &logs[start..end] }
            })
            .collect()
    }
}

/// What the tokens that are not among the likeliest have together: a part of the loss, and the factor of their
/// gradients, `1 - p / q` with `p` and `q` the whole rest's probability by teacher and student.
fn weigh_rest(
    pass: HeadPass<'_>,
    tile: Tiles<'_>,
    pupils: &mut [Pupil<'_>],
    tops: &[Top],
    factor: f64,
) -> Result<(), Error> {
    let HeadPass { forward, decoder, pool } = pass;
    let vocabulary = decoder.vocabulary;
    let mut known: Vec<Vec<f64>> = pupils.iter().map(|pupil| vec![0.0; pupil.lse.len()]).collect();
    for rows in tiles(forward.device(), vocabulary) {
        let parameters = pool.install(|| tile(rows.clone()))?;
        let step = |((pupil, top), known): ((&Pupil<'_>, &Top), &mut Vec<f64>)| {
            let logits = forward.logits(&parameters, pupil.hidden)?;
            let (first, likeliest) = (rows.start as u32, top.within(&rows));
            logits.device().likeliest_probability(&logits, first, &likeliest, (&pupil.lse, factor), known)
        };
        let shared: &[Pupil<'_>] = pupils;
        let all = shared.iter().zip(tops).zip(&mut known);
        each(forward.device(), pool, all, step).map_err(WeightsError::from)?;
    }
    for ((pupil, top), known) in pupils.iter_mut().zip(tops).zip(known) {
        for (token, known) in known.into_iter().enumerate() {
            let logs = &top.log_probabilities[token * top.count..][..top.count];
            let theirs: f64 = logs.iter().map(|log| f64::from(*log).exp()).sum();
            let (p, q) = ((1.0 - theirs).max(0.0), (1.0 - known).max(REST));
            // Nothing is left where all tokens are kept, or no more than rounding leaves.
            let whole = top.count == vocabulary || p < REST;
            pupil.rest.push(if whole { 1.0 } else { (1.0 - p / q) as f32 });
            pupil.loss += if whole { 0.0 } else { p * (p / q).ln() };
        }
    }
    Ok(())
}
