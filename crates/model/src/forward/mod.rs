//! The one forward pass: interprets a [`Decoder`], float32, in the order of the maths.
//!
//! It goes block by block and keeps nothing between blocks but a [`State`], so that a caller may hold one block's
//! weights at a time and take any number of windows through it. A [`Tap`] sees every [`Site`](crate::Site)'s input on the way.
//!
//! The result of a window depends neither on the number of threads nor on the windows beside it. The CPU engine runs each call on its
//! caller's thread, so that windows are the unit of parallel work there.

mod attention;
mod course;
mod feed_forward;

use std::collections::BTreeMap;
use std::sync::Arc;

use mlx_quant_engine::{Device, LAST, Pairing, Result, Tensor};

use crate::decoder::{
    Block, Decoder, Layer, Linear, Norm, NormKind, PerLayerInputs, Projections, Rope, Stage,
};
use crate::parameters::Parameters;
use crate::weights::{Weights, WeightsError};

pub use self::course::{Course, Progress, Stop};
use self::course::{Watcher, at_once};

/// Sees what linears read.
pub trait Tap: Send {
    /// `input` `[.., in]` is about to be read by `readers`; of stacked readers by that expert, which sees only the
    /// tokens that were routed to it.
    ///
    /// # Errors
    /// Whatever went wrong; the pass ends with it.
    fn see(&mut self, readers: &[&Linear], expert: Option<usize>, input: &Tensor) -> Result<()>;
}

/// Sees nothing.
impl Tap for () {
    fn see(&mut self, _: &[&Linear], _: Option<usize>, _: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// A forward pass over windows of one length.
#[derive(Clone, Debug)]
pub struct Forward<'d> {
    decoder: &'d Decoder,
    device: Device,
    tables: Tables,
}

/// Cosines and sines of every rotary embedding of a decoder, for windows of one length.
#[derive(Clone, Debug)]
pub struct Tables {
    tokens: usize,
    all: Arc<[Table]>,
}

impl Tables {
    /// For windows of `tokens` tokens.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(decoder: &Decoder, tokens: usize, device: &Device) -> Result<Self> {
        let table = |rope: &Rope| {
            let (cos, sin) = rope.tables(tokens);
            let shape = (tokens, rope.frequencies(tokens).len());
            let tensor = |values| Tensor::from_vec(values, shape, device);
            Ok(Table { cos: tensor(cos)?, sin: tensor(sin)?, pairing: rope.pairing })
        };
        let all = decoder.ropes.iter().map(table).collect::<Result<Vec<_>>>()?;
        Ok(Self { tokens, all: all.into() })
    }

    /// Tokens of a window.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// What goes from block to block, for a batch of windows.
#[derive(Clone, Debug)]
pub struct State {
    /// Residual stream `[batch, tokens, hidden]`.
    pub hidden: Tensor,
    /// Inputs of every block beside it, `[batch, tokens, blocks, width]`.
    per_layer: Option<Tensor>,
    /// Keys and values that later blocks use, by block.
    keys: Keys,
}

impl State {
    /// All its tensors under names, from which [`State::from_tensors`] makes it again.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("hidden".to_owned(), self.hidden.clone())];
        tensors.extend(self.per_layer.iter().map(|all| ("per_layer".to_owned(), all.clone())));
        for (block, (k, v)) in &self.keys {
            tensors.push((format!("keys.{block}"), k.clone()));
            tensors.push((format!("values.{block}"), v.clone()));
        }
        tensors
    }

    /// The inverse of [`State::tensors`]; `None` if something is missing.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Option<Self> {
        let mut all: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        let (hidden, per_layer) = (all.remove("hidden")?, all.remove("per_layer"));
        let blocks: Vec<usize> =
            all.keys().filter_map(|name| name.strip_prefix("keys.")?.parse().ok()).collect();
        let mut keys = Keys::new();
        for block in blocks {
            let pair = (all.remove(&format!("keys.{block}"))?, all.remove(&format!("values.{block}"))?);
            keys.insert(block, pair);
        }
        Some(Self { hidden, per_layer, keys })
    }

    /// Bytes of its tensors in float32.
    pub fn bytes(&self) -> usize {
        self.tensors().iter().map(|(_, tensor)| tensor.elem_count() * 4).sum()
    }
}

/// Keys `[batch, tokens, kv_heads, head_dim]` and values, by block.
type Keys = BTreeMap<usize, (Tensor, Tensor)>;

/// A rotary embedding for all positions.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// `[tokens, frequencies]`.
    cos: Tensor,
    /// `[tokens, frequencies]`.
    sin: Tensor,
    pairing: Pairing,
}

/// One block's forward pass.
pub(crate) struct Pass<'p> {
    pub(crate) engine: &'p Device,
    pub(crate) parameters: &'p Parameters,
    pub(crate) tables: &'p [Table],
    pub(crate) watcher: Watcher<'p>,
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
        let per_layer = match &embedding.per_layer {
            None => None,
            Some(inputs) => Some(self.per_layer_inputs(inputs, weights, &ids, &hidden)?),
        };
        Ok(State { hidden, per_layer, keys: Keys::new() })
    }

    /// What [`Forward::embed`] makes of the embedded windows beside them, `[batch, tokens, blocks, width]`, as a function of these
    /// (`hidden`, `[batch, tokens, hidden]`); `None` where blocks have no inputs of their own.
    ///
    /// # Errors
    /// As [`Forward::embed`].
    pub fn beside(
        &self,
        weights: &Weights<'_>,
        windows: &[&[u32]],
        hidden: &Tensor,
    ) -> std::result::Result<Option<Tensor>, WeightsError> {
        let inputs = self.decoder.embedding.per_layer.as_ref();
        inputs.map(|inputs| self.per_layer_inputs(inputs, weights, &windows.concat(), hidden)).transpose()
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
        let rows = weights.rows(&inputs.path, ids, &self.device)?.reshape(shape)?;
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
        for stage in &block.stages {
            hidden = pass.stage(stage, index, &hidden, own.as_ref(), &mut keys).await?;
        }
        if let Some(scalar) = &block.scalar {
            hidden = hidden.broadcast_mul(pass.parameters.tensor(scalar)?)?;
        }
        Ok(State { hidden, per_layer, keys })
    }

    /// The last norm: `[batch, tokens, hidden]`.
    ///
    /// # Errors
    /// As [`Forward::block`].
    pub fn finish(&self, parameters: &Parameters, state: &State) -> Result<Tensor> {
        let pass = Pass { engine: &self.device, parameters, tables: &[], watcher: Watcher::Tap(&mut ()) };
        pass.norm(&self.decoder.norm, &state.hidden)
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

impl Block {
    /// Blocks whose keys and values this one uses.
    pub fn shared_keys(&self) -> impl Iterator<Item = usize> {
        self.layers().filter_map(|layer| match layer {
            Layer::Attention(attention) => match attention.projections {
                Projections::Shared { block, .. } => Some(block),
                _ => None,
            },
            _ => None,
        })
    }
}

/// `tensor * factor`, nothing for 1.
pub(crate) fn scaled(tensor: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(tensor) } else { tensor * factor }
}

impl Pass<'_> {
    /// x + multiplier * sum of post_norm(layer(norm(x)))
    async fn stage(
        &mut self,
        stage: &Stage,
        index: usize,
        x: &Tensor,
        own: Option<&Tensor>,
        keys: &mut Keys,
    ) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        let mut normed: Option<(&Norm, Tensor)> = None;
        for branch in &stage.branches {
            let input = match (&branch.norm, &normed) {
                (None, _) => x.clone(),
                (Some(norm), Some((last, output))) if *last == norm => output.clone(),
                (Some(norm), _) => self.norm(norm, x)?,
            };
            normed = branch.norm.as_ref().map(|norm| (norm, input.clone()));
            let mut output = self.layer(&branch.layer, index, &input, own, keys).await?;
            if let Some(norm) = &branch.post_norm {
                output = self.norm(norm, &output)?;
            }
            sum = Some(match sum {
                None => output,
                Some(sum) => self.engine.add(&sum, &output, 1.0)?,
            });
        }
        match sum {
            None => Ok(x.clone()),
            Some(sum) => self.engine.add(x, &sum, stage.multiplier),
        }
    }

    /// layer(x)
    async fn layer(
        &mut self,
        layer: &Layer,
        index: usize,
        x: &Tensor,
        own: Option<&Tensor>,
        keys: &mut Keys,
    ) -> Result<Tensor> {
        match layer {
            Layer::Attention(attention) => self.attention(attention, index, x, keys).await,
            Layer::Latent(latent) => latent.forward(self, x).await,
            Layer::DeltaNet(net) => net.forward(self, x).await,
            Layer::ShortConvolution(convolution) => convolution.forward(self, x).await,
            Layer::Mlp(mlp) => self.mlp(mlp, x).await,
            Layer::Moe(moe) => self.moe(moe, x).await,
            Layer::PerLayerInput { gate, activation, projection } => {
                let own = own.ok_or_else(|| mlx_quant_engine::Error::msg("no per-layer inputs"))?;
                let gate = self.read(&[gate], x).await?.remove(0);
                let product = self.engine.glu(&gate, own, *activation)?;
                Ok(self.read(&[projection], &product).await?.remove(0))
            }
        }
    }

    /// Over the last axis.
    pub(crate) fn norm(&self, norm: &Norm, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = match &norm.path {
            None => (None, None),
            Some(path) => {
                (Some(self.norm_weight(path, norm.plus_one)?), self.parameters.get(&format!("{path}.bias")))
            }
        };
        match norm.kind {
            NormKind::Rms => self.engine.rms_norm(x, weight.as_ref(), norm.epsilon),
            NormKind::Layer => self.engine.layer_norm(x, weight.as_ref(), bias, norm.epsilon),
        }
    }

    /// `[features]`, or `[heads, features]` for a norm per head.
    fn norm_weight(&self, path: &str, plus_one: bool) -> Result<Tensor> {
        let weight = if path.contains("{head}") {
            let name = |head: usize| format!("{}.weight", path.replace("{head}", &head.to_string()));
            let heads: Vec<&Tensor> = (0..).map_while(|head| self.parameters.get(&name(head))).collect();
            Tensor::stack(&heads, 0)?
        } else {
            self.parameters.tensor(&format!("{path}.weight"))?.clone()
        };
        if plus_one { weight + 1.0 } else { Ok(weight) }
    }

    /// What several linears make of one site: shows it to the watcher, then multiplies.
    pub(crate) async fn read(&mut self, linears: &[&Linear], x: &Tensor) -> Result<Vec<Tensor>> {
        match self.watcher.see(linears, None, x).await? {
            None => linears.iter().map(|linear| self.linear(linear, x)).collect(),
            Some(weights) => {
                let multiply = |(linear, weight): (&&Linear, &Tensor)| {
                    self.engine.linear(x, weight, self.parameters.get(&format!("{}.bias", linear.path)))
                };
                linears.iter().zip(&weights).map(multiply).collect()
            }
        }
    }

    /// x @ weight^T + bias
    pub(crate) fn linear(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let bias = self.parameters.get(&format!("{}.bias", linear.path));
        if let Some(reader) = self.parameters.reader(&linear.path) {
            return reader.read(x, None, bias);
        }
        let weight = self.parameters.tensor(&format!("{}.weight", linear.path))?;
        let input = x.dim(LAST)?;
        if weight.rank() != 2 || weight.dim(1)? != input {
            return Err(mlx_quant_engine::Error::msg(format!(
                "{}.weight is {:?}, but reads {input} features",
                linear.path,
                weight.dims()
            )));
        }
        self.engine.linear(x, weight, bias)
    }
}
