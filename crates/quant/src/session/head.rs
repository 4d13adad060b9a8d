//! The head: the one matrix behind the last block, rounded on the final hidden states of the quantized model.

use candle_core::Tensor;
use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Mode, Scheme};
use mlx_quant_model::{Forward, Parameters, WeightsError};

use super::Session;
use crate::Error;
use crate::calibrate::{States, Statistics};
use crate::carry::write_rounded;
use crate::methods::{Factor, Gram, GramSum, How, Method, round};
use crate::observer::Quiet;
use crate::plan::Job;

/// Rows at a time.
const TILE: usize = 8192;

impl Session<'_> {
    /// The item of a head with a matrix of its own that is to be quantized.
    pub(super) fn head_item(&self) -> Option<usize> {
        let item = self.item(&self.walk.decoder.head.linear.as_ref()?.path)?;
        matches!(self.plan.items[item].job, Job::Quantize { .. }).then_some(item)
    }

    pub(super) fn head(
        &self,
        item: usize,
        forward: &Forward<'_>,
        states: &States,
        statistics: Option<&Statistics>,
        writer: &mut Writer,
    ) -> Result<(), Error> {
        let first = self.plan.items[item].first_output;
        match &self.plan.items[item].job {
            Job::Quantize { scheme, float, view } if scheme.mode() == Mode::Affine => {
                let blocks = self.walk.decoder.blocks.len();
                let gram = match statistics.filter(|statistics| statistics.has(blocks)) {
                    Some(statistics) => statistics.load(blocks, 0)?,
                    None => None,
                };
                let gram = match gram {
                    Some(gram) => gram,
                    None => self.final_gram(forward, states, view.columns())?,
                };
                if let Some(statistics) = statistics.filter(|statistics| !statistics.has(blocks)) {
                    statistics.store(blocks, 0, &gram)?;
                    statistics.finish(blocks)?;
                }
                self.round_head(item, &gram, (*scheme, *float), writer)?;
                writer.record([first])?;
                Ok(())
            }
            _ => self.carrier(&Quiet(self.observer)).carry(writer, [item]).map(|_| ()),
        }
    }

    fn final_gram(&self, forward: &Forward<'_>, states: &States, size: usize) -> Result<Gram, Error> {
        let last = match &self.walk.decoder.norm.path {
            Some(path) => self.walk.weights.module(path, &self.walk.device)?,
            None => Parameters::default(),
        };
        let mut sum = GramSum::new(size);
        for window in 0..states.len() {
            let hidden: Tensor = forward.finish(&last, &states.get(window)?).map_err(WeightsError::from)?;
            self.pool.install(|| sum.add(&[&hidden])).map_err(WeightsError::from)?;
        }
        Ok(self.pool.install(|| sum.finish()))
    }

    fn round_head(
        &self,
        item: usize,
        gram: &Gram,
        (scheme, float): (Scheme, FloatType),
        writer: &Writer,
    ) -> Result<(), Error> {
        let item = &self.plan.items[item];
        let method = &self.settings.method;
        let diagonal = gram.diagonal();
        let factor = (self.recipe.rounding() == Method::Gptq)
            .then(|| Factor::new(gram, (0..gram.size).collect(), method.damping))
            .flatten();
        let how = match &factor {
            Some(factor) => How::Compensated { factor, block_size: method.block_size, sweeps: method.sweeps },
            None if self.recipe.rounding() == Method::Rtn => How::Plain,
            None => How::Nearest { weights: &diagonal },
        };
        let rows = item.views().next().map_or(0, mlx_quant_model::View::rows);
        for start in (0..rows).step_by(TILE) {
            if self.observer.cancelled() {
                return Err(Error::Interrupted);
            }
            let range = start..rows.min(start + TILE);
            let tile =
                self.pool.install(|| self.walk.weights.load_tile(&item.name, range, &self.walk.device))?;
            let weight = tile.tensor(&format!("{}.weight", item.name)).map_err(WeightsError::from)?;
            let values = weight
                .flatten_all()
                .and_then(|weight| weight.to_vec1::<f32>())
                .map_err(WeightsError::from)?;
            let rounded = self.pool.install(|| round(&values, gram.size, scheme, float, how));
            write_rounded(writer, item.first_output, start, float, &rounded)?;
            self.walk.weights.release();
        }
        Ok(())
    }
}
