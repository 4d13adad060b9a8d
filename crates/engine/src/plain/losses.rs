//! Losses over a vocabulary, a tile of it at a time: rows of logits are read, and turned into gradients, on the
//! processor.

use crate::Tensor;
use crate::error::{Result, bail};
use crate::losses::{Candidates, Labels, Likeliest};
use crate::running::{RunningDivergence, RunningScore};
use crate::slopes;

/// The width of a tile of logits, for as many tokens as are kept beside it.
pub(crate) fn check_tile(logits: &Tensor, kept: usize, what: &str) -> Result<usize> {
    match logits.dims() {
        [tokens, width] if *tokens == kept && *width > 0 => Ok(*width),
        dims => bail!("{what}: logits {dims:?} beside {kept} tokens"),
    }
}

/// The token that followed each; one that is in no tile where none is asked for.
pub(crate) fn target_of(targets: &[u32], token: usize) -> u32 {
    targets.get(token).copied().unwrap_or(u32::MAX)
}

pub(crate) fn score(
    logits: &Tensor,
    first: u32,
    targets: &[u32],
    running: &mut [RunningScore],
) -> Result<()> {
    let width = check_tile(logits, running.len(), "score")?;
    logits.read(|values| {
        for (token, (score, row)) in running.iter_mut().zip(values.chunks_exact(width)).enumerate() {
            score.add(row, first, target_of(targets, token));
        }
    })
}

pub(crate) fn compare(
    reference: &Tensor,
    logits: &Tensor,
    first: u32,
    targets: &[u32],
    running: &mut [RunningDivergence],
) -> Result<()> {
    let width = check_tile(logits, running.len(), "compare")?;
    super::check_same(reference, logits, "compare")?;
    reference.read(|theirs| {
        logits.read(|own| {
            let rows = theirs.chunks_exact(width).zip(own.chunks_exact(width));
            for (token, (both, (theirs, own))) in running.iter_mut().zip(rows).enumerate() {
                both.add(theirs, own, first, target_of(targets, token));
            }
        })
    })?
}

pub(crate) fn keep_likeliest(
    logits: &Tensor,
    first: u32,
    kept: usize,
    candidates: &mut [Candidates],
) -> Result<()> {
    let width = check_tile(logits, candidates.len(), "likeliest tokens")?;
    logits.read(|values| {
        for (own, row) in candidates.iter_mut().zip(values.chunks_exact(width)) {
            own.score.add(row, first, u32::MAX);
            own.found.extend(row.iter().zip(first..).map(|(value, id)| (*value, id)));
            own.prune(kept);
        }
    })
}

pub(crate) fn label_slopes(
    logits: &Tensor,
    lse: &[f64],
    softcap: Option<f64>,
    last: bool,
    labels: &mut Labels,
) -> Result<(Tensor, Vec<f64>)> {
    let width = check_tile(logits, lse.len().min(labels.draws.len()), "labels")?;
    let mut slopes = logits.to_vec()?;
    let mut squares = vec![0.0; width];
    let caps: Option<Vec<f32>> = softcap.map(|cap| {
        let slope = |logit: &f32| (1.0 - (f64::from(*logit) / cap).powi(2)) as f32;
        slopes.iter().map(slope).collect()
    });
    for (token, row) in slopes.chunks_exact_mut(width).enumerate() {
        let (before, draw) = (labels.passed[token], labels.draws[token]);
        let mut own = vec![0.0; if caps.is_some() { width } else { 0 }];
        let to = if caps.is_some() { &mut own } else { &mut squares };
        let (sum, label) = slopes::probabilities(row, lse[token], to, before, draw);
        if let Some(caps) = &caps {
            for ((sum, square), cap) in squares.iter_mut().zip(&own).zip(&caps[token * width..]) {
                *sum += square * f64::from(*cap).powi(2);
            }
        }
        labels.passed[token] += sum;
        // Rounding may leave the sum of all a hair below the draw.
        let label = if last { label.or(Some(width - 1)) } else { label };
        if let Some(at) = label.filter(|_| !labels.chosen[token]) {
            labels.chosen[token] = true;
            row[at] -= 1.0;
        }
    }
    Ok((Tensor::from_vec(slopes, logits.dims(), logits.device())?, squares))
}

pub(crate) fn divergence_slopes(
    reference: &Tensor,
    logits: &Tensor,
    (reference_lse, lse): (&[f64], &[f64]),
    (factor, scale): (f64, f32),
    loss: &mut f64,
) -> Result<Tensor> {
    let width = check_tile(logits, lse.len().min(reference_lse.len()), "divergence")?;
    super::check_same(reference, logits, "divergence")?;
    let mut slopes = logits.to_vec()?;
    reference.read(|reference| {
        let rows = slopes.chunks_exact_mut(width).zip(reference.chunks_exact(width));
        for (token, (row, reference)) in rows.enumerate() {
            *loss += slopes::divergence(reference, reference_lse[token], row, lse[token], factor, scale);
        }
    })?;
    Tensor::from_vec(slopes, logits.dims(), logits.device())
}

/// Where a token lies in a tile of tokens `first..first + width`.
pub(crate) fn place_in_tile(id: u32, first: u32, width: usize) -> Result<usize> {
    match id.checked_sub(first).map(|at| at as usize).filter(|at| *at < width) {
        Some(at) => Ok(at),
        None => bail!("token {id} is not among {first}..{first}+{width}"),
    }
}

pub(crate) fn likeliest_slopes(
    logits: &Tensor,
    first: u32,
    likeliest: &[Likeliest<'_>],
    (lse, rest): (&[f64], &[f32]),
    (factor, scale): (f64, f32),
    loss: &mut f64,
) -> Result<Tensor> {
    let width = check_tile(logits, lse.len().min(rest.len()).min(likeliest.len()), "divergence")?;
    let mut slopes = logits.to_vec()?;
    for (token, row) in slopes.chunks_exact_mut(width).enumerate() {
        let Likeliest { ids, log_probabilities } = likeliest[token];
        let places = ids.iter().map(|id| place_in_tile(*id, first, width)).collect::<Result<Vec<_>>>()?;
        let own: Vec<f64> = places.iter().map(|at| f64::from(row[*at]) * factor - lse[token]).collect();
        slopes::scaled_probabilities(row, lse[token], factor, scale * rest[token]);
        for ((at, log), own) in places.iter().zip(log_probabilities).zip(own) {
            let slope = own.exp() - f64::from(*log).exp();
            row[*at] = slope as f32 * scale;
            *loss += f64::from(*log).exp() * (f64::from(*log) - own);
        }
    }
    Tensor::from_vec(slopes, logits.dims(), logits.device())
}

pub(crate) fn likeliest_probability(
    logits: &Tensor,
    first: u32,
    likeliest: &[Likeliest<'_>],
    (lse, factor): (&[f64], f64),
    known: &mut [f64],
) -> Result<()> {
    let width = check_tile(logits, lse.len().min(known.len()).min(likeliest.len()), "likeliest tokens")?;
    let add = |values: &[f32]| -> Result<()> {
        for (token, row) in values.chunks_exact(width).enumerate() {
            for id in likeliest[token].ids {
                let logit = f64::from(row[place_in_tile(*id, first, width)?]);
                known[token] += (logit * factor - lse[token]).exp();
            }
        }
        Ok(())
    };
    logits.read(add)?
}
