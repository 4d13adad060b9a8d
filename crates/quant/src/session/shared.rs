//! Readers that a team rounds: each member some rows of a site, or some of several experts' sites, and all get all of it.
//!
//! Rows are rounded alone, whatever stands beside them, so that who rounds which decides nothing. What travels is codes,
//! scales and biases; weights are decoded where they are needed.

use std::ops::Range;
use std::sync::Arc;

use mlx_quant_engine::{Device, Tensor};
use mlx_quant_model::WeightsError;

use super::readers::{Done, Ready};
use super::work::{BlockWork, Stored};
use crate::Error;
use crate::methods::awq;
use crate::methods::{Pending, Rounded};
use crate::team::{Part, Team};

/// Rows are shared out in multiples of this.
const ROWS: usize = 64;

/// Which rows a member rounds of which reader of which site.
struct Task {
    site: usize,
    reader: usize,
    rows: Range<usize>,
}

/// Rows that a member has rounded, and the weight that they stand for.
type Piece = (Arc<Rounded>, Tensor);

/// What a member rounds: whole sites where there are several, otherwise rows.
fn tasks(team: &Team, ready: &[Ready<'_>]) -> Result<Vec<Task>, WeightsError> {
    let mut tasks = Vec::new();
    let sites = if ready.len() > 1 { team.shared(ready.len(), 1) } else { 0..1 };
    for (site, own) in ready.iter().enumerate().filter(|(site, _)| sites.contains(site)) {
        for (reader, rows) in own.rows()?.into_iter().enumerate() {
            let rows = if ready.len() > 1 { 0..rows } else { team.shared(rows, ROWS) };
            let quantized = matches!(own.stored[reader], Stored::Quantized(..));
            if quantized && !rows.is_empty() {
                tasks.push(Task { site, reader, rows });
            }
        }
    }
    Ok(tasks)
}

/// What codes, scales and biases decode to, where `device` computes.
fn decoded(rounded: &Rounded, device: &Device) -> mlx_quant_engine::Result<Tensor> {
    let (rows, scheme) = (rounded.rows(), rounded.scheme);
    if !scheme.has_biases() || !device.is_card() {
        return Tensor::from_vec(rounded.decoded(), (rows, rounded.columns), device);
    }
    let groups = rounded.columns / scheme.group_size();
    let grid = |numbers: &[f32]| Tensor::from_slice(numbers, (rows, groups), device);
    let codes = device.hold(rounded.codes.clone())?;
    let (scales, biases) = (grid(&rounded.scales)?, grid(&rounded.biases)?);
    Ok(device.decode(&codes, (scheme.group_size(), 0.0), &scales, &biases)?.weight.clone())
}

impl BlockWork<'_> {
    /// Sites of which this member makes factors.
    pub(super) fn factored(&self, sites: usize) -> Range<usize> {
        let team = self.session.team;
        if sites > 1 { team.shared(sites, 1) } else { 0..sites }
    }

    /// Rounds what is this member's of the sites, and gets the rest from the others.
    pub(super) fn round_shared(&self, ready: &mut [Ready<'_>]) -> Result<Vec<Vec<Done>>, Error> {
        let team = self.session.team;
        let mut part = Part::default();
        let mut mine = Vec::new();
        if ready.len() > 1 {
            let share = self.factored(ready.len());
            part.head.extend(ready[share.clone()].iter().map(|own| u64::from(own.factor.is_some())));
            mine.extend(self.round(&ready[share])?.into_iter().flatten());
        } else {
            let own = tasks(team, ready)?;
            let rows = own.iter().map(|task| (task.reader, task.rows.clone())).collect::<Vec<_>>();
            if !rows.is_empty() {
                mine.extend(self.round(&[ready[0].of_rows(&rows)?])?.remove(0));
            }
        }
        let mut held = Vec::new();
        for (codes, weight) in mine {
            let Some(codes) = codes else { continue };
            let rounded = codes.fetch().map_err(WeightsError::from)?;
            part.rounded.push(Arc::new(rounded));
            held.push(weight);
        }
        let all = team.gather(part)?;
        let mut held = held.into_iter();
        let mut parts: Vec<Vec<Vec<Piece>>> =
            ready.iter().map(|own| own.stored.iter().map(|_| Vec::new()).collect()).collect();
        for (member, brought) in team.members().iter().zip(all.iter()) {
            if ready.len() > 1 {
                let compensated = member.shared(ready.len(), 1).zip(&brought.head);
                compensated.for_each(|(site, factor)| ready[site].compensated = *factor > 0);
            }
            for (task, rounded) in tasks(member, ready)?.iter().zip(&brought.rounded) {
                let mine = if member.is(team) { held.next() } else { None };
                let weight = mine.map_or_else(|| self.brought(&ready[task.site], rounded), Ok)?;
                parts[task.site][task.reader].push((rounded.clone(), weight));
            }
        }
        let mut done = Vec::new();
        for (own, parts) in ready.iter().zip(parts) {
            let all = parts.into_iter().zip(&own.weights).map(|(pieces, weight)| joined(pieces, weight));
            done.push(all.collect::<Result<Vec<_>, WeightsError>>()?);
        }
        Ok(done)
    }

    /// The weight that rows which another member has rounded stand for on the unscaled input.
    fn brought(&self, own: &Ready<'_>, rounded: &Rounded) -> Result<Tensor, WeightsError> {
        let device = &self.session.walk.device;
        let weight = self.session.pool.install(|| decoded(rounded, device))?;
        Ok(match &own.factors {
            Some(factors) => awq::over(&weight, factors)?,
            None => weight,
        })
    }
}

/// What several members have.
fn pending(rounded: Arc<Rounded>) -> Pending {
    if rounded.scheme.has_biases() {
        let rows = rounded.rows();
        return Pending::new(rows, move || Ok(Arc::unwrap_or_clone(rounded)));
    }
    Arc::unwrap_or_clone(rounded).into()
}

/// Rows that lie below each other as one weight; a weight that is not quantized as it is.
fn joined(pieces: Vec<Piece>, weight: &Tensor) -> Result<Done, WeightsError> {
    if pieces.is_empty() {
        return Ok((None, weight.clone()));
    }
    let (codes, weights): (Vec<Pending>, Vec<Tensor>) =
        pieces.into_iter().map(|(rounded, weight)| (pending(rounded), weight)).unzip();
    Ok((Some(Pending::joined(codes)), Tensor::cat(&weights, 0)?))
}
