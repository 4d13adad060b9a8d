//! A block under way: what is known of it, and what has been chosen so far.

use std::collections::{BTreeMap, BTreeSet};

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::decoder::{Block, Linear};
use mlx_quant_model::{Forward, Parameters, Site, WeightsError};

use super::{ExpertTokens, Session};
use crate::Error;
use crate::methods::Pending;
use crate::plan::Job;
use crate::walks::calibrate::Drift;

/// How a reader is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stored {
    /// Codes, scales and biases are chosen here.
    Quantized(Scheme, FloatType),
    /// Not quantized.
    Plain(FloatType),
    /// Packed in the source, copied.
    Fixed,
}

/// The codes of readers, by path and expert.
pub(super) type AllCodes = BTreeMap<(String, Option<usize>), Pending>;

/// A block under way.
pub(super) struct BlockWork<'b> {
    pub(super) session: &'b Session<'b>,
    pub(super) forward: &'b Forward<'b>,
    pub(super) index: usize,
    pub(super) block: &'b Block,
    pub(super) sites: &'b [Site<'b>],
    pub(super) parameters: &'b Parameters,
    pub(super) codes: AllCodes,
    /// Tensors that are stored with other values than the source's.
    pub(super) edited: BTreeMap<String, Vec<f32>>,
    /// Chosen for a norm's output, by the norm's path.
    pub(super) norms: BTreeMap<String, Option<Vec<f32>>>,
    /// Mean squares of a norm's output, by the norm's path; for experts that saw no token.
    pub(super) squares: BTreeMap<String, Vec<f32>>,
    pub(super) visited: BTreeSet<usize>,
    /// Tokens that each expert saw, by the path of its linear.
    pub(super) experts: BTreeMap<String, ExpertTokens>,
    /// Sites at which a fold was applied, and at which one was possible.
    pub(super) folded: (usize, usize),
    /// Error of the readers' outputs, summed over sites: as they are rounded, and as plain rounding would have left them. For notes.
    pub(super) losses: (f64, f64),
    /// Where rounding is learned: what weights are above what their codes decode to, scaled as the codes are.
    pub(super) above: BTreeMap<(String, Option<usize>), Vec<f32>>,
    /// How far what stands at a site is from the full-precision stream, by site.
    pub(super) drifts: BTreeMap<usize, Drift>,
}

impl<'b> BlockWork<'b> {
    pub(super) fn new(
        session: &'b Session<'b>,
        forward: &'b Forward<'b>,
        index: usize,
        sites: &'b [Site<'b>],
        parameters: &'b Parameters,
        codes: AllCodes,
    ) -> Self {
        let block = &session.walk.decoder.blocks[index];
        Self {
            session,
            forward,
            index,
            block,
            sites,
            parameters,
            codes,
            edited: BTreeMap::new(),
            norms: BTreeMap::new(),
            squares: BTreeMap::new(),
            visited: BTreeSet::new(),
            experts: BTreeMap::new(),
            folded: (0, 0),
            losses: (0.0, 0.0),
            above: BTreeMap::new(),
            drifts: BTreeMap::new(),
        }
    }

    pub(super) fn stored(&self, linear: &Linear) -> Stored {
        let session = self.session;
        if session.walk.weights.scheme(&linear.path).is_some() {
            return Stored::Fixed;
        }
        match session.item(&linear.path).map(|item| &session.plan.items[item].job) {
            Some(Job::Quantize { scheme, float, .. }) => Stored::Quantized(*scheme, *float),
            _ => session.float_of(&format!("{}.weight", linear.path)).map_or(Stored::Fixed, Stored::Plain),
        }
    }

    /// A reader's weight `[out, in]`; all experts' below each other if none is named.
    pub(super) fn weight(&self, linear: &Linear, expert: Option<usize>) -> Result<Tensor, Error> {
        let weight =
            self.parameters.tensor(&format!("{}.weight", linear.path)).map_err(WeightsError::from)?;
        let weight = match (expert, weight.rank()) {
            (Some(expert), 3) => weight.get(expert),
            (_, rank) => weight.reshape((REST, weight.dims()[rank - 1])),
        };
        Ok(weight.map_err(WeightsError::from)?)
    }

    pub(super) fn edit(&mut self, name: &str) -> Result<&mut Vec<f32>, Error> {
        if !self.edited.contains_key(name) {
            let tensor = self.parameters.tensor(name).map_err(WeightsError::from)?;
            tensor.device().leave("norms and biases that a fold changes", "they go to a file next");
            let values = tensor.to_vec().map_err(WeightsError::from)?;
            self.edited.insert(name.to_owned(), values);
        }
        Ok(self.edited.entry(name.to_owned()).or_default())
    }
}
