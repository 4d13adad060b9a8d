//! One block: what is done at its sites, and what of it is written.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::FloatType;
use mlx_format::checkpoint::Writer;
use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::decoder::{Block, Norm};
use mlx_quant_model::{Parameters, Producer, Site, View, WeightsError};
use rayon::prelude::*;

use super::Session;
use super::aim::corrected;
use super::work::{AllCodes, BlockWork, Stored};
use crate::Error;
use crate::carry::write_rounded;
use crate::methods::awq;
use crate::methods::{Factor, Gram, How, Method, Pending};
use crate::observer::Event;
use crate::plan::Job;
use crate::walks::calibrate::{Drift, Visitor};

/// An expert that saw fewer tokens than this part of its input features has no Hessian worth the name.
pub(super) const FEW_TOKENS: f64 = 0.25;

impl BlockWork<'_> {
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

    /// Rounds one site's readers; gives what their stored form computes with. Of the Gram matrix nothing is held while the
    /// Hessian is factored, unless losses are asked for.
    fn round_readers(
        &mut self,
        (site, drift): (&Site<'_>, Option<&Drift>),
        gram: Gram,
        factors: Option<&[f32]>,
    ) -> Result<Vec<Tensor>, Error> {
        let session = self.session;
        let (tokens, size) = (gram.tokens, gram.size);
        let noted = session.observer.wants_notes().then(|| gram.clone());
        let own = match factors {
            Some(factors) => {
                let scaled = gram.scaled(factors).map_err(WeightsError::from)?;
                drop(gram);
                scaled
            }
            None => gram,
        };
        let diagonal = own.diagonal().map_err(WeightsError::from)?;
        let few = site.expert.is_some() && (tokens as f64) < FEW_TOKENS * size as f64;
        let stored: Vec<Stored> = site.readers.iter().map(|reader| self.stored(reader)).collect();
        let sizes: BTreeSet<usize> = stored
            .iter()
            .filter_map(|stored| match stored {
                Stored::Quantized(scheme, _) => Some(scheme.group_size()),
                _ => None,
            })
            .collect();
        let method = &session.settings.method;
        let second_order = matches!(session.recipe.rounding(), Method::Gptq | Method::Refine);
        let compensate = second_order && !few && !sizes.is_empty();
        let factor = if compensate {
            let factor = || Factor::of(own, self.order(&diagonal, &sizes), method.damping);
            session.pool.install(factor).map_err(WeightsError::from)?
        } else {
            drop(own);
            None
        };
        if site.expert.is_some() {
            let fell_back = second_order && factor.is_none();
            for reader in &site.readers {
                let seen = self.experts.entry(reader.path.clone()).or_default();
                seen.set(site.slice.unwrap_or(0), tokens, fell_back);
            }
        }
        let how = match (&factor, session.recipe.rounding()) {
            (Some(factor), Method::Refine) => {
                How::Refined { factor, block_size: method.block_size, sweeps: method.sweeps }
            }
            (Some(factor), _) => {
                How::Compensated { factor, block_size: method.block_size, sweeps: method.sweeps }
            }
            (None, Method::Rtn) => How::Plain,
            (None, _) => How::Nearest { weights: &diagonal },
        };
        let weights = site
            .readers
            .iter()
            .map(|reader| self.weight(reader, site.slice))
            .collect::<Result<Vec<_>, _>>()?;
        let weights = match (&factor, drift) {
            (Some(factor), Some(drift)) => {
                let correct = || corrected(&weights, &stored, (factor, factors), drift, method.correction);
                session.pool.install(correct).map_err(WeightsError::from)?
            }
            _ => weights,
        };
        // A card rounds all rows of a site together.
        let together = session.walk.device.memory().is_some() && weights.len() > 1;
        let done = session.pool.install(|| match stored[0] {
            Stored::Quantized(..) if together && stored.iter().all(|other| *other == stored[0]) => {
                round_together(&weights, stored[0], factors, how)
            }
            _ => {
                let one = |(weight, stored): (&Tensor, &Stored)| round_one(weight, *stored, factors, how);
                weights.par_iter().zip(&stored).map(one).collect::<Result<Vec<_>, WeightsError>>()
            }
        })?;
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

    /// Tells what the block's readers lose, where somebody asks.
    pub(super) fn note_losses(&self) {
        let observer = self.session.observer;
        if !observer.wants_notes() {
            return;
        }
        let (own, plain) = self.losses;
        let prefix = self.block.prefix.trim_end_matches('.');
        let text = format!(
            "{prefix}: output error {own:.4e}, {:.3} of round-to-nearest's",
            own / plain.max(f64::MIN_POSITIVE)
        );
        observer.event(Event::Note { text: &text });
    }

    /// Readers that no token reached: experts that were never chosen.
    pub(super) fn round_the_rest(&mut self) -> Result<(), Error> {
        let sites = self.sites;
        for (index, site) in sites.iter().enumerate() {
            if self.visited.contains(&index) {
                continue;
            }
            let weight = self.weight(site.readers[0], site.slice)?;
            let size = weight.dims()[1];
            let (mut squares, mut factors) = (vec![1.0; size], None);
            if let Producer::Norm(Norm { path: Some(path), .. }) = site.producer {
                squares = self.squares.get(path).cloned().unwrap_or(squares);
                factors = self.norms.get(path).cloned().flatten();
            }
            let gram = Gram::of_squares(&squares, weight.device()).map_err(WeightsError::from)?;
            self.round_readers((site, None), gram, factors.as_deref())?;
            self.visited.insert(index);
        }
        Ok(())
    }

    /// Everything of the block that is to be written, `session` being that which it belongs to.
    pub(super) fn outputs<'s>(mut self, session: &'s Session<'s>) -> Result<Outputs<'s>, Error> {
        self.round_the_rest()?;
        Ok(Outputs {
            session,
            prefix: &session.walk.decoder.blocks[self.index].prefix,
            codes: self.codes,
            edited: self.edited,
        })
    }
}

/// What is made of a block, once nothing more is asked of it.
pub(super) struct Outputs<'b> {
    session: &'b Session<'b>,
    prefix: &'b str,
    codes: AllCodes,
    edited: BTreeMap<String, Vec<f32>>,
}

impl Outputs<'_> {
    /// Items of the block whose values are as the source has them, or are rounded without text.
    pub(super) fn left(&self) -> Vec<usize> {
        let session = self.session;
        let made = |index: &usize| {
            let item = &session.plan.items[*index];
            match item.job {
                Job::Quantize { .. } => {
                    let first = self.codes.range((item.name.clone(), None)..).next();
                    first.is_some_and(|((path, _), _)| *path == item.name)
                }
                Job::Copy { .. } | Job::Dequantize { .. } | Job::Repeat { .. } => {
                    self.edited.contains_key(&item.name)
                }
            }
        };
        session.items_below(self.prefix).into_iter().filter(|index| !made(index)).collect()
    }

    /// Writes all other items; gives the first tensor of each. What a card still has is fetched.
    pub(super) fn write(mut self, writer: &Writer) -> Result<Vec<usize>, Error> {
        let session = self.session;
        let (mut done, mut pieces) = (Vec::new(), Vec::new());
        for index in session.items_below(self.prefix) {
            let item = &session.plan.items[index];
            let first = item.first_output;
            match &item.job {
                Job::Quantize { float, .. } => {
                    let (mut row, before) = (0, pieces.len());
                    let mut rest = self.codes.split_off(&(item.name.clone(), None));
                    while let Some(codes) = rest.first_entry().filter(|entry| entry.key().0 == item.name) {
                        let codes = codes.remove();
                        let next = row + codes.rows();
                        pieces.push(Piece { first, row, float: *float, codes });
                        row = next;
                    }
                    self.codes.append(&mut rest);
                    done.extend((pieces.len() > before).then_some(first));
                }
                Job::Copy { .. } | Job::Dequantize { .. } | Job::Repeat { .. } => {
                    if let Some(values) = self.edited.get(&item.name) {
                        let float = session.float_of(&item.name).unwrap_or(FloatType::F32);
                        let mut bytes = vec![0u8; values.len() * float.size()];
                        float.narrow(values, &mut bytes);
                        writer.write_at(first, 0, &bytes)?;
                        done.push(first);
                    }
                }
            }
        }
        // All results, so that the same piece is blamed whatever the timing.
        let write = || pieces.into_par_iter().map(|piece| piece.write(writer)).collect::<Vec<_>>();
        session.pool.install(write).into_iter().collect::<Result<(), Error>>()?;
        Ok(done)
    }
}

/// Codes of a reader (of an expert), and where they go.
struct Piece {
    /// The weight's index in the layout.
    first: usize,
    /// Its first row.
    row: usize,
    float: FloatType,
    codes: Pending,
}

impl Piece {
    fn write(self, writer: &Writer) -> Result<(), Error> {
        let rounded = self.codes.fetch().map_err(WeightsError::from)?;
        write_rounded(writer, self.first, self.row, self.float, &rounded)
    }
}

impl Visitor for BlockWork<'_> {
    fn visit(&mut self, index: usize, gram: Gram, sample: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let sites = self.sites;
        self.visited.insert(index);
        let factors = self.factors(index, &gram, sample)?;
        let drift = self.drifts.remove(&index);
        self.round_readers((&sites[index], drift.as_ref()), gram, factors.as_deref())
    }

    fn drifted(&mut self, index: usize, drift: Drift) {
        self.drifts.insert(index, drift);
    }

    fn cancelled(&self) -> bool {
        self.session.observer.cancelled()
    }
}

/// What of a block is no reader of a site, as it will be written: quantized matrices (parts of latent attention that lie between
/// heads), and tensors that change their dtype. Gives the block with these as they decode, and the codes.
pub(super) fn round_others(
    session: &Session<'_>,
    block: &Block,
    sites: &[Site<'_>],
    parameters: &Parameters,
) -> Result<(Parameters, AllCodes), Error> {
    let read: BTreeSet<&str> =
        sites.iter().flat_map(|site| &site.readers).map(|reader| reader.path.as_str()).collect();
    let (mut parameters, mut all) = (parameters.clone(), AllCodes::new());
    for index in session.items_below(&block.prefix) {
        let item = &session.plan.items[index];
        if let Job::Copy { view, float: Some(float) } = &item.job {
            as_written(&mut parameters, &item.name, view, *float)?;
        }
        let Job::Quantize { scheme, float, .. } = &item.job else { continue };
        if read.contains(item.name.as_str()) {
            continue;
        }
        let name = format!("{}.weight", item.name);
        let weight = parameters.tensor(&name).map_err(WeightsError::from)?.clone();
        let columns = weight.dims()[weight.rank() - 1];
        let flat = weight.reshape((REST, columns)).map_err(WeightsError::from)?;
        let stored = Stored::Quantized(*scheme, *float);
        let even = vec![1.0; columns];
        let how = match session.recipe.rounding() {
            Method::Rtn => How::Plain,
            _ => How::Nearest { weights: &even },
        };
        let (codes, decoded) = session.pool.install(|| round_one(&flat, stored, None, how))?;
        parameters.insert(name, decoded.reshape(weight.dims()).map_err(WeightsError::from)?);
        all.extend(codes.map(|codes| ((item.name.clone(), None), codes)));
    }
    Ok((parameters, all))
}

/// A tensor that is not quantized, in the dtype in which it is written.
fn as_written(
    parameters: &mut Parameters,
    name: &str,
    view: &View,
    float: FloatType,
) -> Result<(), WeightsError> {
    let Some(tensor) = parameters.get(name) else { return Ok(()) };
    let from = FloatType::from_dtype(view.dtype).unwrap_or(float);
    // Values are changed in the dtype of the source.
    let tensor =
        if view.change.is_some() { tensor.rounded(from)?.rounded(float)? } else { tensor.rounded(float)? };
    parameters.insert(name.to_owned(), tensor);
    Ok(())
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
fn round_one(
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
