//! The one forward pass: interprets a [`Decoder`], float32, in the order of the maths.
//!
//! It goes block by block and keeps nothing between blocks but a [`State`], so that a caller may hold one block's
//! weights at a time and take any number of windows through it. A [`Tap`] sees every [`Site`](crate::Site)'s input on the way.
//!
//! The result of a window depends neither on the number of threads nor on the windows beside it. The CPU engine runs each call on its
//! caller's thread, so that windows are the unit of parallel work there.

mod attention;
mod block;
mod causal;
mod course;
mod delta_net;
mod feed_forward;
mod latent;
mod linear_attention;
mod pass;
mod short_convolution;
mod state;
mod streams;
mod tables;
mod watcher;

use mlx_quant_engine::{Device, Result, Tensor};

use crate::decoder::{Decoder, Linear, PerLayerInputs};
use crate::parameters::Parameters;
use crate::weights::{Weights, WeightsError};

pub use self::course::{Course, Progress};
use self::pass::{Pass, scaled};
use self::state::Keys;
pub use self::state::State;
pub use self::tables::Tables;
pub use self::watcher::{Stop, Tap};
use self::watcher::{Watcher, at_once};

/// A forward pass over windows of one length.
#[derive(Clone, Debug)]
pub struct Forward<'d> {
    decoder: &'d Decoder,
    device: Device,
    tables: Tables,
}

impl<'d> Forward<'d> {
    /// For windows of `tokens` tokens, on a device.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(decoder: &'d Decoder, tokens: usize, device: &Device) -> Result<Self> {
        Ok(Self::with_tables(decoder, Tables::new(decoder, tokens, device)?, device))
    }

    /// With tables that were made before.
    pub fn with_tables(decoder: &'d Decoder, tables: Tables, device: &Device) -> Self {
        Self { decoder, device: device.clone(), tables }
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The beginning: embeds windows of `tokens` tokens each. Only the rows that occur are read from the table.
    ///
    /// # Errors
    /// If a token lies outside the vocabulary or a weight is missing or damaged.
    pub fn embed(
        &self,
        weights: &Weights<'_>,
        windows: &[&[u32]],
    ) -> std::result::Result<State, WeightsError> {
        let embedding = &self.decoder.embedding;
        let shape = |last: usize| (windows.len(), self.tables.tokens, last);
        if let Some(dense) = self.decoder.dense_tokens().filter(|dense| self.tables.tokens > *dense) {
            return Err(WeightsError::Sparse { tokens: self.tables.tokens, dense });
        }
        let ids = windows.concat();
        let rows = weights.rows(&embedding.path, &ids, &self.device)?;
        let mut hidden = rows.reshape(shape(self.decoder.hidden_size))?;
        if let Some(path) = &embedding.positions {
            let known = weights
                .shape(&format!("{path}.weight"))
                .and_then(|shape| shape.first().copied())
                .unwrap_or(0);
            if self.tables.tokens > known {
                return Err(WeightsError::Positions { tokens: self.tables.tokens, known });
            }
            let positions: Vec<u32> = (0..self.tables.tokens as u32).collect();
            hidden = hidden.broadcast_add(&weights.rows(path, &positions, &self.device)?)?;
        }
        let hidden = scaled(hidden, embedding.multiplier)?;
        self.set_out(weights, windows, &hidden)
    }

    /// What [`Forward::embed`] makes of the embedded windows, as a function of these (`embedded`, `[batch, tokens, hidden]`):
    /// the residual stream, or all of them, and what blocks have for inputs of their own.
    ///
    /// # Errors
    /// As [`Forward::embed`].
    pub fn set_out(
        &self,
        weights: &Weights<'_>,
        windows: &[&[u32]],
        embedded: &Tensor,
    ) -> std::result::Result<State, WeightsError> {
        let inputs = self.decoder.embedding.per_layer.as_ref();
        let inputs = inputs.map(|inputs| self.per_layer_inputs(inputs, weights, &windows.concat(), embedded));
        let per_layer = inputs.transpose()?;
        let hidden = match &self.decoder.streams {
            None => embedded.clone(),
            Some(streams) => {
                let mut parameters = Parameters::default();
                for linear in &streams.spread {
                    parameters.extend(weights.module(&linear.path, &self.device)?);
                }
                self.outside(&parameters, &mut ()).spread(streams, embedded)?
            }
        };
        Ok(State { hidden, per_layer, keys: Keys::new() })
    }

    /// Whether [`Forward::set_out`] gives embedded windows as they are, and nothing else.
    pub fn sets_out_as_embedded(&self) -> bool {
        self.decoder.streams.is_none() && self.decoder.embedding.per_layer.is_none()
    }

    /// The embedded windows `[batch, tokens, hidden]` of what [`Forward::embed`] gave.
    ///
    /// # Errors
    /// If the device fails.
    pub fn embedded(&self, state: &State) -> Result<Tensor> {
        if self.decoder.streams.is_some() {
            state.hidden.narrow(2, 0, 1)?.squeeze(2)
        } else {
            Ok(state.hidden.clone())
        }
    }

    /// What computes outside of blocks.
    fn outside<'p>(&'p self, parameters: &'p Parameters, tap: &'p mut ()) -> Pass<'p> {
        Pass { engine: &self.device, parameters, tables: &[], watcher: Watcher::Tap(tap) }
    }

    /// `(norm(projection(hidden)) + embedding) * multiplier`, `[batch, tokens, blocks, width]`.
    fn per_layer_inputs(
        &self,
        inputs: &PerLayerInputs,
        weights: &Weights<'_>,
        ids: &[u32],
        hidden: &Tensor,
    ) -> std::result::Result<Tensor, WeightsError> {
        let (batch, tokens, _) = hidden.dims3()?;
        let shape = (batch, tokens, self.decoder.blocks.len(), inputs.width);
        let rows = weights.rows(&inputs.path, &inputs.ids(ids), &self.device)?.reshape(shape)?;
        let mut parameters = weights.module(&inputs.projection.path, &self.device)?;
        if let Some(norm) = &inputs.norm.path {
            parameters.extend(weights.module(norm, &self.device)?);
        }
        let pass = Pass {
            engine: &self.device,
            parameters: &parameters,
            tables: &[],
            watcher: Watcher::Tap(&mut ()),
        };
        let projected = scaled(pass.linear(&inputs.projection, hidden)?, inputs.projection_multiplier)?;
        let projected = pass.norm(&inputs.norm, &projected.reshape(shape)?)?;
        let sum = (projected + scaled(rows, inputs.multiplier)?)?;
        Ok(scaled(sum, inputs.sum_multiplier)?)
    }

    /// Block `index`, whose weights are `parameters`.
    ///
    /// # Errors
    /// If a weight is missing or has another shape than the description says; the message names it.
    pub fn block(
        &self,
        index: usize,
        parameters: &Parameters,
        state: State,
        tap: &mut dyn Tap,
    ) -> Result<State> {
        at_once(self.take(index, parameters, state, Watcher::Tap(tap)))
    }

    /// [`Forward::block`], stopping where the watcher stops it.
    async fn take<'a>(
        &'a self,
        index: usize,
        parameters: &'a Parameters,
        state: State,
        watcher: Watcher<'a>,
    ) -> Result<State> {
        let State { mut hidden, per_layer, mut keys } = state;
        let block = &self.decoder.blocks[index];
        let own = per_layer.as_ref().map(|all| all.narrow(2, index, 1)?.squeeze(2)).transpose()?;
        let mut pass = Pass { engine: &self.device, parameters, tables: &self.tables.all, watcher };
        if let Some(norm) = &block.norm {
            hidden = pass.norm(norm, &hidden)?;
        }
        let predictions = block.update.as_ref().map(|update| pass.predict(update, &hidden)).transpose()?;
        let predicted = block.update.as_ref().zip(predictions);
        if let Some((update, predictions)) = &predicted {
            hidden = Pass::active(update, predictions)?;
        }
        for stage in &block.stages {
            hidden = pass.stage(stage, index, &hidden, own.as_ref(), &mut keys).await?;
        }
        if let Some((update, predictions)) = predicted {
            hidden = pass.correct((update, index), predictions, hidden, own.as_ref()).await?;
        }
        if let Some(scalar) = &block.scalar {
            hidden = hidden.broadcast_mul(pass.parameters.tensor(scalar)?)?;
        }
        Ok(State { hidden, per_layer, keys })
    }

    /// What the head reads, `[batch, tokens, hidden]`: the last norm, of all streams' mean where there are several.
    ///
    /// # Errors
    /// As [`Forward::block`].
    pub fn finish(&self, parameters: &Parameters, state: &State) -> Result<Tensor> {
        let pass = Pass { engine: &self.device, parameters, tables: &[], watcher: Watcher::Tap(&mut ()) };
        match &self.decoder.streams {
            None => pass.norm(&self.decoder.norm, &state.hidden),
            Some(streams) => pass.norm(&self.decoder.norm, &pass.gather(streams, &state.hidden)?),
        }
    }

    /// Logits `[.., vocabulary]` of what [`Forward::finish`] gave, any number of rows of it. `parameters` may hold some
    /// rows of the head only ([`Weights::load_tile`]): then these tokens' logits alone.
    ///
    /// # Errors
    /// As [`Forward::block`].
    pub fn logits(&self, parameters: &Parameters, hidden: &Tensor) -> Result<Tensor> {
        let head = &self.decoder.head;
        let pass = Pass { engine: &self.device, parameters, tables: &[], watcher: Watcher::Tap(&mut ()) };
        let table = Linear::new(&*self.decoder.embedding.path);
        let logits = pass.linear(head.linear.as_ref().unwrap_or(&table), hidden)?;
        let logits = scaled(logits, head.multiplier)?;
        match head.softcap {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }
}
