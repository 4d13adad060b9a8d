//! One block: what is done at its sites, and what of it is written.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::FloatType;
use mlx_format::checkpoint::Writer;
use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::decoder::{Block, Norm};
use mlx_quant_model::{Parameters, Producer, Site, View, WeightsError};
use rayon::prelude::*;

use super::Session;
use super::readers::{Standing, round_one};
use super::work::{AllCodes, BlockWork, Stored};
use crate::Error;
use crate::carry::write_rounded;
use crate::methods::{Gram, How, Method, Pending};
use crate::observer::Event;
use crate::plan::Job;
use crate::walks::calibrate::{Drift, Stand, Visitor};

impl BlockWork<'_> {
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
            self.round_readers(vec![Standing { site, gram, factors, drift: None }])?;
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
        let (site, drift) = (&sites[index], self.drifts.remove(&index));
        let mut passed = self.round_readers(vec![Standing { site, gram, factors, drift }])?;
        Ok(passed.pop().unwrap_or_default())
    }

    fn visit_all(&mut self, stands: Vec<Stand>) -> Result<Vec<Vec<Tensor>>, Error> {
        let sites = self.sites;
        let mut all = Vec::new();
        for Stand { site, gram, sample } in stands {
            self.visited.insert(site);
            let factors = self.factors(site, &gram, &sample)?;
            let drift = self.drifts.remove(&site);
            all.push(Standing { site: &sites[site], gram, factors, drift });
        }
        self.round_readers(all)
    }

    fn drifted(&mut self, index: usize, drift: Drift) {
        self.drifts.insert(index, drift);
    }

    fn wants_samples(&self) -> bool {
        self.session.recipe.folds()
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
