//! What layers are computed with: the engine, a block's weights, and who watches.

use mlx_quant_engine::{Device, LAST, Result, Tensor};

use super::tables::Table;
use super::watcher::{Reading, Watcher};
use crate::decoder::{Linear, Norm, NormKind};
use crate::parameters::Parameters;

/// One block's forward pass.
pub(crate) struct Pass<'p> {
    pub(crate) engine: &'p Device,
    pub(crate) parameters: &'p Parameters,
    pub(crate) tables: &'p [Table],
    pub(crate) watcher: Watcher<'p>,
}

/// `tensor * factor`, nothing for 1.
pub(crate) fn scaled(tensor: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(tensor) } else { tensor * factor }
}

impl Pass<'_> {
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
        let own = Reading { readers: linears.to_vec(), expert: None, input: x, tokens: None };
        match self.watcher.see(&[own]).await?.remove(0) {
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

    /// Rotary embedding `rope` of `[batch, tokens, heads, features]`.
    pub(crate) fn rotate(&self, x: &Tensor, rope: usize) -> Result<Tensor> {
        let table =
            self.tables.get(rope).ok_or_else(|| mlx_quant_engine::Error::msg("no such rotary embedding"))?;
        self.engine.rotary(x, &table.cos, &table.sin, table.pairing)
    }
}
