//! Several residual streams, computed.

use mlx_quant_engine::{LAST, Result, Tensor};

use super::pass::Pass;
use super::state::Keys;
use crate::decoder::{Linear, Streams, Update};

/// A stream of `[batch, tokens, streams, hidden]`, `[batch, tokens, hidden]`.
fn stream(all: &Tensor, index: usize) -> Result<Tensor> {
    all.narrow(2, index, 1)?.squeeze(2)
}

/// Root of the mean square over features.
fn magnitude(x: &Tensor, least: f32) -> Result<Tensor> {
    x.sqr()?.mean_keepdim(LAST)?.clamp(least, f32::INFINITY)?.sqrt()
}

impl Pass<'_> {
    /// What a linear makes of each token, as long as `like`.
    fn as_long(&self, linear: &Linear, x: &Tensor, like: &Tensor) -> Result<Tensor> {
        let own = self.linear(linear, x)?;
        own.broadcast_mul(&magnitude(like, 0.0)?.broadcast_div(&magnitude(&own, 1e-5)?)?)
    }

    /// All streams, `[batch, tokens, streams, hidden]`, of the first one, `[batch, tokens, hidden]`.
    pub(super) fn spread(&self, streams: &Streams, x: &Tensor) -> Result<Tensor> {
        let others = streams.spread.iter().map(|linear| self.as_long(linear, x, x));
        let all = std::iter::once(Ok(x.clone())).chain(others).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&all, 2)
    }

    /// Their mean, each but the first through its linear.
    pub(super) fn gather(&self, streams: &Streams, all: &Tensor) -> Result<Tensor> {
        let first = stream(all, 0)?;
        let mut sum = first.clone();
        for (at, linear) in streams.gather.iter().enumerate() {
            sum = (sum + self.as_long(linear, &stream(all, at + 1)?, &first)?)?;
        }
        sum / streams.count() as f64
    }

    /// tanh(router(norm(x) / hidden)), `[batch, tokens, streams]`
    fn modalities(&self, update: &Update, x: &Tensor) -> Result<Tensor> {
        let normed = (self.norm(&update.norm, x)? / x.dim(LAST)? as f64)?;
        self.linear(&update.router, &normed)?.tanh()
    }

    /// Every stream plus a mixture of all.
    pub(super) fn predict(&self, update: &Update, all: &Tensor) -> Result<Tensor> {
        let (batch, tokens, count, _) = all.dims4()?;
        let modalities = self.modalities(update, &stream(all, update.active)?)?;
        let factors = self.linear(&update.prediction, &modalities)?;
        let factors = factors.reshape((batch, tokens, count, count))?;
        let mut sum = all.clone();
        for source in 0..count {
            // [b, t, streams, 1] and [b, t, 1, hidden]
            let part = factors.narrow(3, source, 1)?.broadcast_mul(&all.narrow(2, source, 1)?)?;
            sum = (sum + part)?;
        }
        Ok(sum)
    }

    /// The active one of the predictions.
    pub(super) fn active(update: &Update, predictions: &Tensor) -> Result<Tensor> {
        stream(predictions, update.active)
    }

    /// Predictions corrected by what the stages made of the active one, `x`.
    pub(super) async fn correct(
        &mut self,
        (update, index): (&Update, usize),
        predictions: Tensor,
        x: Tensor,
        own: Option<&Tensor>,
    ) -> Result<Tensor> {
        let count = predictions.dim(2)?;
        let factors = (self.linear(&update.correction, &self.modalities(update, &x)?)? + 1.0)?;
        let change = (&x - stream(&predictions, update.active)?)?;
        let corrected = (predictions + factors.unsqueeze(3)?.broadcast_mul(&change.unsqueeze(2)?)?)?;
        let mut first = stream(&corrected, update.active)?;
        if update.scales {
            first = first.broadcast_mul(self.parameters.tensor(&update.scale)?)?;
        }
        let branch = &update.others;
        let read = match &branch.norm {
            Some(norm) => self.norm(norm, &first)?,
            None => first.clone(),
        };
        let mut added = self.layer(&branch.layer, index, (&first, &read), own, &mut Keys::new()).await?;
        if let Some(norm) = &branch.post_norm {
            added = self.norm(norm, &added)?;
        }
        let others = corrected.narrow(2, 1, count - 1)?.broadcast_add(&added.unsqueeze(2)?)?;
        Tensor::cat(&[corrected.narrow(2, 0, 1)?, others], 2)
    }
}
