//! Readers of sites, rounded: those of one site, or of several experts' sites at once.

use std::collections::BTreeSet;
use std::ops::Range;

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Site, WeightsError};
use rayon::prelude::*;

use super::Session;
use super::aim::corrected;
use super::work::{BlockWork, Stored};
use crate::Error;
use crate::methods::awq;
use crate::methods::{Factor, Gram, How, Method, Pending};
use crate::walks::Walk;
use crate::walks::calibrate::Drift;

/// An expert that saw fewer tokens than this part of its input features has no Hessian worth the name.
pub(super) const FEW_TOKENS: f64 = 0.25;

/// Bytes of Gram matrices of experts' sites that are made at once.
const TOGETHER: usize = 256 << 20;

/// A weight as it is rounded: codes, where it is quantized, and what they decode to on the unscaled input.
pub(super) type Done = (Option<Pending>, Tensor);

/// How many experts of a layer are calibrated at once, of a block with these sites: a card makes their factors in one
/// launch, and rounds their weights in one.
pub(crate) fn experts_at_once(walk: &Walk<'_>, sites: &[Site<'_>], second_order: bool) -> usize {
    let size = |site: &Site<'_>| {
        let shape = walk.weights.shape(&format!("{}.weight", site.readers[0].path)).unwrap_or(&[]);
        shape.last().copied().unwrap_or(1)
    };
    match sites.iter().filter(|site| site.expert.is_some()).map(size).max() {
        Some(largest) if walk.device.is_card() && second_order => {
            (TOGETHER / (largest * largest * 4).max(1)).max(1)
        }
        _ => 1,
    }
}

/// A site whose readers are about to be rounded.
pub(super) struct Standing<'w> {
    pub(super) site: &'w Site<'w>,
    pub(super) gram: Gram,
    /// Factors that were folded in front of it.
    pub(super) factors: Option<Vec<f32>>,
    /// How far what stands there is from the full-precision stream.
    pub(super) drift: Option<Drift>,
}

/// The same, with what rounding needs.
pub(super) struct Ready<'w> {
    site: &'w Site<'w>,
    pub(super) factors: Option<Vec<f32>>,
    tokens: u64,
    pub(super) stored: Vec<Stored>,
    pub(super) diagonal: Vec<f32>,
    pub(super) factor: Option<Factor>,
    /// Whether there is a factor, here or where it is rounded.
    pub(super) compensated: bool,
    pub(super) weights: Vec<Tensor>,
    /// Where losses are asked for.
    noted: Option<Gram>,
}

impl Ready<'_> {
    fn how<'h>(&'h self, session: &'h Session<'_>) -> How<'h> {
        let method = &session.settings.method;
        let (block_size, sweeps) = (method.block_size, method.sweeps);
        match (&self.factor, session.recipe.rounding()) {
            (Some(factor), Method::Refine) => How::Refined { factor, block_size, sweeps },
            (Some(factor), _) => How::Compensated { factor, block_size, sweeps },
            (None, Method::Rtn) => How::Plain,
            (None, _) => How::Nearest { weights: &self.diagonal },
        }
    }

    /// How all readers are stored, where they can be rounded as rows of one weight.
    fn alike(&self) -> Option<Stored> {
        let first = self.stored[0];
        let alike = matches!(first, Stored::Quantized(..)) && self.stored.iter().all(|other| *other == first);
        alike.then_some(first)
    }

    /// The same with some rows of some readers alone.
    pub(super) fn of_rows(&self, rows: &[(usize, Range<usize>)]) -> Result<Self, WeightsError> {
        let part =
            |(reader, rows): &(usize, Range<usize>)| self.weights[*reader].narrow(0, rows.start, rows.len());
        Ok(Self {
            site: self.site,
            factors: self.factors.clone(),
            tokens: self.tokens,
            stored: rows.iter().map(|(reader, _)| self.stored[*reader]).collect(),
            diagonal: self.diagonal.clone(),
            factor: self.factor.clone(),
            compensated: self.compensated,
            weights: rows.iter().map(part).collect::<mlx_quant_engine::Result<_>>()?,
            noted: None,
        })
    }

    pub(super) fn rows(&self) -> Result<Vec<usize>, WeightsError> {
        Ok(self.weights.iter().map(|weight| weight.dim(0)).collect::<mlx_quant_engine::Result<_>>()?)
    }
}

impl<'b> BlockWork<'b> {
    /// Order in which columns are rounded: groups of every size that a reader has stay together.
    fn order(&self, diagonal: &[f32], sizes: &BTreeSet<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = (0..diagonal.len()).collect();
        if self.session.settings.method.act_order {
            order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
            // From the smallest to the largest: a stable sort keeps what was sorted within.
            for &size in sizes {
                let mut loud = vec![0f32; diagonal.len().div_ceil(size)];
                diagonal.iter().enumerate().for_each(|(at, square)| loud[at / size] += square);
                let key = |at: usize| (loud[at / size], at / size);
                order.sort_by(|a, b| {
                    let (a, b) = (key(*a), key(*b));
                    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
                });
            }
        }
        order
    }

    /// Rounds the readers of some sites; gives what their stored form computes with. Of the Gram matrices nothing is held
    /// while Hessians are factored, unless losses are asked for.
    pub(super) fn round_readers(&mut self, all: Vec<Standing<'b>>) -> Result<Vec<Vec<Tensor>>, Error> {
        let session = self.session;
        let (mut ready, mut grams) = (Vec::new(), Vec::new());
        let mut drifts = Vec::new();
        for Standing { site, gram, factors, drift } in all {
            drifts.push(drift);
            let noted = session.observer.wants_notes().then(|| gram.clone());
            let tokens = gram.tokens;
            grams.push(match &factors {
                Some(factors) => gram.scaled(factors).map_err(WeightsError::from)?,
                None => gram,
            });
            let stored = site.readers.iter().map(|reader| self.stored(reader)).collect();
            let (diagonal, factor, weights, compensated) = (Vec::new(), None, Vec::new(), false);
            ready.push(Ready {
                site,
                factors,
                tokens,
                stored,
                diagonal,
                factor,
                compensated,
                weights,
                noted,
            });
        }
        let diagonals = Gram::diagonals(&grams.iter().collect::<Vec<_>>()).map_err(WeightsError::from)?;
        ready.iter_mut().zip(diagonals).for_each(|(own, diagonal)| own.diagonal = diagonal);
        self.factor(&mut ready, grams)?;
        for (own, drift) in ready.iter_mut().zip(drifts) {
            let site = own.site;
            let weight = |reader| self.weight(reader, site.slice);
            own.weights = site.readers.iter().map(|reader| weight(reader)).collect::<Result<_, _>>()?;
            if let (Some(factor), Some(drift)) = (&own.factor, drift) {
                let (how, part) = ((factor, own.factors.as_deref()), session.settings.method.correction);
                let correct = || corrected(&own.weights, &own.stored, how, &drift, part);
                own.weights = session.pool.install(correct).map_err(WeightsError::from)?;
            }
        }
        let done = if session.team.is_alone() { self.round(&ready)? } else { self.round_shared(&mut ready)? };
        ready.into_iter().zip(done).map(|(own, done)| self.note(own, done)).collect()
    }

    /// Makes the factors of those sites whose rounding asks for one.
    fn factor(&self, ready: &mut [Ready<'_>], grams: Vec<Gram>) -> Result<(), Error> {
        let session = self.session;
        let second_order = session.recipe.is_second_order();
        let (mut asked, mut inputs) = (Vec::new(), Vec::new());
        let mine = self.factored(ready.len());
        for (at, (own, gram)) in ready.iter().zip(grams).enumerate().filter(|(at, _)| mine.contains(at)) {
            let few = own.site.expert.is_some() && (own.tokens as f64) < FEW_TOKENS * gram.size as f64;
            let size = |stored: &Stored| match stored {
                Stored::Quantized(scheme, _) => Some(scheme.group_size()),
                _ => None,
            };
            let sizes: BTreeSet<usize> = own.stored.iter().filter_map(size).collect();
            if second_order && !few && !sizes.is_empty() {
                asked.push(at);
                inputs.push((gram, own.diagonal.clone(), self.order(&own.diagonal, &sizes)));
            }
        }
        let damping = session.settings.method.damping;
        let make = || match <[_; 1]>::try_from(inputs) {
            Ok([(gram, _, order)]) => Ok(vec![Factor::of(gram, order, damping)?]),
            Err(inputs) => Factor::of_all(inputs, damping),
        };
        let factors = session.pool.install(make).map_err(WeightsError::from)?;
        for (at, factor) in asked.into_iter().zip(factors) {
            ready[at].compensated = factor.is_some();
            ready[at].factor = factor;
        }
        Ok(())
    }

    /// Rounds all weights: on a card those of a site as rows of one, and of all sites that are alike.
    pub(super) fn round(&self, ready: &[Ready<'_>]) -> Result<Vec<Vec<Done>>, WeightsError> {
        let session = self.session;
        let card = session.walk.device.is_card();
        let like = |own: &Ready<'_>| -> Result<Option<(Stored, Vec<usize>, usize)>, WeightsError> {
            let Some(stored) = own.alike().filter(|_| own.factor.is_some()) else { return Ok(None) };
            Ok(Some((stored, own.rows()?, own.weights[0].dim(1)?)))
        };
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (at, own) in ready.iter().enumerate() {
            let same = match (card, groups.last()) {
                (true, Some(last)) => {
                    let before = like(&ready[last[0]])?;
                    before.is_some() && before == like(own)?
                }
                _ => false,
            };
            match groups.last_mut().filter(|_| same) {
                Some(group) => group.push(at),
                None => groups.push(vec![at]),
            }
        }
        let mut all = Vec::new();
        for group in groups {
            let own: Vec<&Ready<'_>> = group.iter().map(|at| &ready[*at]).collect();
            match own[..] {
                [one] => all.push(session.pool.install(|| round_site(session, one))?),
                _ => all.extend(session.pool.install(|| round_sites(session, &own))?),
            }
        }
        Ok(all)
    }

    /// Takes down what a site's readers became.
    fn note(&mut self, own: Ready<'_>, done: Vec<Done>) -> Result<Vec<Tensor>, Error> {
        let session = self.session;
        let Ready { site, factors, stored, weights, noted, tokens, compensated, .. } = own;
        if site.expert.is_some() {
            let fell_back = session.recipe.is_second_order() && !compensated;
            for reader in &site.readers {
                let seen = self.experts.entry(reader.path.clone()).or_default();
                seen.set(site.slice.unwrap_or(0), tokens, fell_back);
            }
        }
        let factors = factors.as_deref();
        if let Some(gram) = noted {
            self.losses(&gram, &weights, &stored, &done)?;
        }
        let mut passed = Vec::new();
        for ((reader, original), (codes, weight)) in site.readers.iter().zip(&weights).zip(done) {
            if session.recipe.learns() {
                self.note_for_learning(reader, site.slice, (original, &weight), factors, codes.is_some())?;
            }
            passed.push(weight);
            if let Some(codes) = codes {
                self.codes.insert((reader.path.clone(), site.slice), codes);
            } else if let Some(factors) = factors {
                let name = format!("{}.weight", reader.path);
                let elements = passed[passed.len() - 1].elem_count();
                let start = site.slice.unwrap_or(0) * elements;
                let own = &mut self.edit(&name)?[start..start + elements];
                for row in own.chunks_exact_mut(factors.len().max(1)) {
                    row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
                }
            }
        }
        Ok(passed)
    }

    /// Adds what a site's readers lose, beside what plain rounding would.
    fn losses(
        &mut self,
        gram: &Gram,
        weights: &[Tensor],
        stored: &[Stored],
        done: &[(Option<Pending>, Tensor)],
    ) -> Result<(), WeightsError> {
        for ((weight, stored), (_, passed)) in weights.iter().zip(stored).zip(done) {
            let plain = self.session.pool.install(|| round_one(weight, *stored, None, How::Plain))?.1;
            let lost = |other: &Tensor| -> Result<f64, WeightsError> {
                let changes = (other - weight)?;
                let rows = changes.dim(0)?;
                let parts: Vec<usize> = (0..rows).step_by(128).collect();
                let part = |start: &usize| gram.loss(&changes.narrow(0, *start, 128.min(rows - start))?);
                let parts = self.session.pool.install(|| parts.par_iter().map(part).collect::<Vec<_>>());
                Ok(parts.into_iter().sum::<mlx_quant_engine::Result<f64>>()?)
            };
            let (own, usual) = (lost(passed)?, lost(&plain)?);
            self.losses = (self.losses.0 + own, self.losses.1 + usual);
        }
        Ok(())
    }
}

/// Rounds a site's readers.
fn round_site(session: &Session<'_>, own: &Ready<'_>) -> Result<Vec<Done>, WeightsError> {
    let (factors, how) = (own.factors.as_deref(), own.how(session));
    let together = session.walk.device.is_card() && own.weights.len() > 1;
    match own.alike() {
        Some(stored) if together => round_together(&own.weights, stored, factors, how),
        _ => {
            let one = |(weight, stored): (&Tensor, &Stored)| round_one(weight, *stored, factors, how);
            own.weights.par_iter().zip(&own.stored).map(one).collect()
        }
    }
}

/// [`round_site`] for sites that are alike and have a factor each: the numbers are the same.
fn round_sites(session: &Session<'_>, all: &[&Ready<'_>]) -> Result<Vec<Vec<Done>>, WeightsError> {
    let scaled = |own: &&Ready<'_>| -> Result<Tensor, WeightsError> {
        let whole = Tensor::cat(&own.weights, 0)?;
        Ok(match &own.factors {
            Some(factors) => awq::times(&whole, factors)?,
            None => whole,
        })
    };
    let weights = all.iter().map(scaled).collect::<Result<Vec<_>, _>>()?;
    let whole = Tensor::cat(&weights, 0)?;
    drop(weights);
    let Some(Stored::Quantized(scheme, float)) = all[0].alike() else {
        return all.iter().map(|own| round_site(session, own)).collect();
    };
    let hows: Vec<How<'_>> = all.iter().map(|own| own.how(session)).collect();
    let (codes, decoded) = whole.device().round_parts(&whole, scheme, float, &hows)?;
    let rows = all[0].rows()?;
    let mut codes = codes.split(&rows.repeat(all.len())).into_iter();
    let mut first = 0;
    let mut done = Vec::new();
    for own in all {
        let mut of_site = Vec::new();
        for rows in &rows {
            let decoded = decoded.narrow(0, first, *rows)?;
            first += rows;
            let decoded = match &own.factors {
                Some(factors) => awq::over(&decoded, factors)?,
                None => decoded,
            };
            of_site.push((codes.next(), decoded));
        }
        done.push(of_site);
    }
    Ok(done)
}

/// [`round_one`] for weights of a site, whose rows lie below each other meanwhile: the numbers are the same.
fn round_together(
    weights: &[Tensor],
    stored: Stored,
    factors: Option<&[f32]>,
    how: How<'_>,
) -> Result<Vec<(Option<Pending>, Tensor)>, WeightsError> {
    let rows = weights.iter().map(|weight| weight.dim(0)).collect::<mlx_quant_engine::Result<Vec<_>>>()?;
    let all = Tensor::cat(&weights.iter().collect::<Vec<_>>(), 0)?;
    let (codes, decoded) = round_one(&all, stored, factors, how)?;
    let parts = codes.map(|pending| pending.split(&rows)).unwrap_or_default();
    let mut first = 0;
    let mut done = Vec::new();
    for (codes, rows) in parts.into_iter().zip(rows) {
        done.push((Some(codes), decoded.narrow(0, first, rows)?));
        first += rows;
    }
    Ok(done)
}

/// Codes of one weight after scaling, and the weight that they stand for on the unscaled input.
pub(super) fn round_one(
    weight: &Tensor,
    stored: Stored,
    factors: Option<&[f32]>,
    how: How<'_>,
) -> Result<(Option<Pending>, Tensor), WeightsError> {
    let Stored::Quantized(scheme, float) = stored else { return Ok((None, weight.clone())) };
    let scaled = factors.map_or_else(|| Ok(weight.clone()), |factors| awq::times(weight, factors))?;
    let (codes, decoded) = weight.device().round(&scaled, scheme, float, how)?;
    match factors {
        None => Ok((Some(codes), decoded)),
        Some(factors) => Ok((Some(codes), awq::over(&decoded, factors)?)),
    }
}
