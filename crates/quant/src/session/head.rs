//! The head: the one matrix behind the last block, rounded on the final hidden states of the quantized model.

use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, WeightsError};

use super::Session;
use crate::Error;
use crate::carry::write_rounded;
use crate::data::Windows;
use crate::methods::{Factor, Gram, GramSum, How, Method, Pending};
use crate::observer::Quiet;
use crate::plan::Job;
use crate::reduce::InOrder;
use crate::team::Team;
use crate::walks;
use crate::walks::calibrate::{States, Statistics};

/// Rows that are rounded at a time.
pub(crate) const HEAD_ROWS: usize = 8192;

/// A table that is embedding and head: as an embedding its errors weigh alike in all features, so this part of the mean is
/// added to each feature's weight as a head. Measured on the demo model, 4 bits (KL, part 0 / 0.3 / 1 / 3 / 10): 0.0561 / 0.0556 /
/// 0.0566 / 0.0567 / 0.0575; without a pilot, weighted by the norm alone 0.0594.
const EVEN: f32 = 0.3;

/// Windows of a pilot.
const PILOT: usize = 4;

/// What a head is rounded with.
pub(super) struct Head {
    diagonal: Vec<f32>,
    factor: Option<Factor>,
}

impl Head {
    fn new(session: &Session<'_>, gram: Gram, even: f32) -> Result<Self, WeightsError> {
        let gptq = session.recipe.is_second_order();
        let damping = session.settings.method.damping + even;
        let mut diagonal = gram.diagonal()?;
        let order = (0..gram.size).collect();
        let factor = || session.pool.install(|| Factor::of(gram, order, damping));
        let factor = if gptq { factor()? } else { None };
        let mean = diagonal.iter().sum::<f32>() / diagonal.len().max(1) as f32;
        for value in &mut diagonal {
            *value += even * mean;
        }
        Ok(Self { diagonal, factor })
    }

    pub(super) fn how(&self, session: &Session<'_>) -> How<'_> {
        let method = &session.settings.method;
        match &self.factor {
            Some(factor) if session.recipe.rounding() == Method::Refine => {
                How::Refined { factor, block_size: method.block_size, sweeps: method.sweeps }
            }
            Some(factor) => How::Compensated { factor, block_size: method.block_size, sweeps: method.sweeps },
            None if session.recipe.rounding() == Method::Rtn => How::Plain,
            None => How::Nearest { weights: &self.diagonal },
        }
    }
}

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
        (before, statistics): (usize, Option<&Statistics>),
        writer: Option<&mut Writer>,
    ) -> Result<(), Error> {
        let first = self.plan.items[item].first_output;
        let Job::Quantize { scheme, float, view } = &self.plan.items[item].job else {
            let Some(writer) = writer else { return Ok(()) };
            return self.carrier(&Quiet(self.observer)).carry(writer, [item]).map(|_| ());
        };
        let blocks = self.walk.decoder.blocks.len();
        let make = || self.final_gram(forward, states, (before, view.columns()));
        let gram = match statistics {
            None => make()?,
            Some(statistics) => statistics.or_make(blocks, view.columns(), make)?,
        };
        let Some(writer) = writer else { return Ok(()) };
        let head = Head::new(self, gram, 0.0)?;
        self.round_head(item, head.how(self), (*scheme, *float), writer)?;
        writer.record([first])?;
        Ok(())
    }

    fn final_gram(
        &self,
        forward: &Forward<'_>,
        states: &States,
        (before, size): (usize, usize),
    ) -> Result<Gram, Error> {
        let last = self.walk.last_norm()?;
        let hidden = |batch: usize| -> Result<_, Error> {
            let hidden = forward.finish(&last, &states.get(batch)?).map_err(WeightsError::from)?;
            Ok((before + batch * self.walk.batch(), hidden))
        };
        self.gram((size, self.team), (0..states.len()).map(hidden))
    }

    /// Of hidden states of batches of windows, each with its first window; with those of a team's other members.
    fn gram(
        &self,
        (size, team): (usize, &Team),
        hidden: impl Iterator<Item = Result<(usize, Tensor), Error>>,
    ) -> Result<Gram, Error> {
        let mut sum = InOrder::default();
        for batch in hidden {
            let (window, hidden) = batch?;
            self.pool.install(|| walks::calibrate::add_gram(&mut sum, window, &hidden))?;
        }
        let device = &self.walk.device;
        let sum = match walks::calibrate::sum_of_team(sum, size, (team, device, self.pool))? {
            Some(sum) => sum,
            None => GramSum::new(size, device).map_err(WeightsError::from)?,
        };
        Ok(self.pool.install(|| sum.finish()).map_err(WeightsError::from)?)
    }

    /// Rounds a table that is embedding and head at once. Gives what it was rounded with.
    pub(super) fn round_tied(
        &self,
        item: usize,
        windows: &Windows,
        statistics: Option<&Statistics>,
        writer: Option<&Writer>,
    ) -> Result<Head, Error> {
        let gram = match statistics {
            None => self.pilot(windows)?,
            Some(statistics) => {
                let (blocks, size) = (self.walk.decoder.blocks.len(), self.walk.decoder.hidden_size);
                statistics.or_make(blocks + 1, size, || self.pilot(windows))?
            }
        };
        let table = Head::new(self, gram, EVEN)?;
        if let (Job::Quantize { scheme, float, .. }, Some(writer)) = (&self.plan.items[item].job, writer) {
            self.round_head(item, table.how(self), (*scheme, *float), writer)?;
        }
        Ok(table)
    }

    /// Final hidden states of a few windows in the full-precision model, for a table that is embedding and head at once and has
    /// to be rounded before anything else.
    fn pilot(&self, windows: &Windows) -> Result<Gram, Error> {
        let few: Vec<&[u32]> =
            windows.picked.iter().take(PILOT).map(|window| window.tokens.as_slice()).collect();
        let hidden = self.walk.hidden(&few, self.pool, &Quiet(self.observer), &mut 0)?;
        // Few enough for each member to take all of them.
        let alone = Team::alone();
        self.gram((self.walk.decoder.hidden_size, &alone), hidden.into_iter().enumerate().map(Ok))
    }

    /// Rounds a head, a tile of its rows at a time.
    fn round_head(
        &self,
        item: usize,
        how: How<'_>,
        (scheme, float): (Scheme, FloatType),
        writer: &Writer,
    ) -> Result<(), Error> {
        let item = &self.plan.items[item];
        let rows = item.views().next().map_or(0, mlx_quant_model::View::rows);
        let write = |start, pending: Pending| -> Result<(), Error> {
            let rounded = pending.fetch().map_err(WeightsError::from)?;
            write_rounded(writer, item.first_output, start, float, &rounded)
        };
        let load = |start: usize| -> Result<_, Error> {
            let range = start..rows.min(start + HEAD_ROWS);
            Ok(self.pool.install(|| self.walk.weights.load_tile(&item.name, range, &self.walk.device))?)
        };
        // A card rounds some rows while the next ones are read and the last ones are fetched and written.
        let mut last = None;
        walks::in_turn(&self.walk.device, (0..rows).step_by(HEAD_ROWS), &load, |start, tile| {
            if self.observer.cancelled() {
                return Err(Error::Interrupted);
            }
            let weight = tile.tensor(&format!("{}.weight", item.name)).map_err(WeightsError::from)?;
            let rounded = self.pool.install(|| weight.device().round(weight, scheme, float, how));
            let (pending, _) = rounded.map_err(WeightsError::from)?;
            if let Some((start, pending)) = last.replace((start, pending)) {
                write(start, pending)?;
            }
            self.walk.weights.release();
            Ok(())
        })?;
        last.map_or(Ok(()), |(start, pending)| write(start, pending))
    }
}
