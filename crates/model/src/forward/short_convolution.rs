//! The gated short convolution, computed.

use mlx_quant_engine::{Result, Tensor};

use super::causal::causal_convolution;
use super::pass::Pass;
use crate::decoder::ShortConvolution;

impl ShortConvolution {
    pub(crate) async fn forward(&self, pass: &mut Pass<'_>, x: &Tensor) -> Result<Tensor> {
        let projected = pass.read(&[&self.input], x).await?.remove(0);
        let hidden = projected.dim(2)? / 3;
        let part = |index: usize| projected.narrow(2, index * hidden, hidden);
        let (b, c, x) = (part(0)?, part(1)?, part(2)?);
        let weight = pass.parameters.tensor(&format!("{}.weight", self.convolution))?;
        let bias = pass.parameters.get(&format!("{}.bias", self.convolution));
        let mixed = (c * causal_convolution(&(b * x)?, weight, bias)?)?;
        Ok(pass.read(&[&self.output], &mixed).await?.remove(0))
    }
}
