//! A block: its stages, their branches, and which layer each is.

use mlx_quant_engine::{Result, Tensor};

use super::pass::{Pass, scaled};
use super::state::Keys;
use crate::decoder::{Layer, Norm, Stage};

impl Pass<'_> {
    /// scale * (x + multiplier * post_norm(sum of post_norm(layer(norm(x)))))
    pub(super) async fn stage(
        &mut self,
        stage: &Stage,
        index: usize,
        x: &Tensor,
        own: Option<&Tensor>,
        keys: &mut Keys,
    ) -> Result<Tensor> {
        self.watcher.begin(x);
        let mut sum: Option<Tensor> = None;
        let mut normed: Option<(&Norm, Tensor)> = None;
        for branch in &stage.branches {
            let input = match (&branch.norm, &normed) {
                (None, _) => x.clone(),
                (Some(norm), Some((last, output))) if *last == norm => output.clone(),
                (Some(norm), _) => self.norm(norm, x)?,
            };
            normed = branch.norm.as_ref().map(|norm| (norm, input.clone()));
            let mut output = self.layer(&branch.layer, index, (x, &input), own, keys).await?;
            if let Some(norm) = &branch.post_norm {
                output = self.norm(norm, &output)?;
            }
            sum = Some(match sum {
                None => output,
                Some(sum) => self.engine.add(&sum, &output, 1.0)?,
            });
        }
        let behind = match (sum, &stage.post_norm) {
            (None, _) => Ok(x.clone()),
            (Some(sum), None) => self.engine.add(x, &sum, stage.multiplier),
            (Some(sum), Some(norm)) => self.engine.add(x, &self.norm(norm, &sum)?, stage.multiplier),
        };
        scaled(behind?, stage.scale)
    }

    /// layer(x), beside the residual stream that x is the norm of
    pub(super) async fn layer(
        &mut self,
        layer: &Layer,
        index: usize,
        (stream, x): (&Tensor, &Tensor),
        own: Option<&Tensor>,
        keys: &mut Keys,
    ) -> Result<Tensor> {
        match layer {
            Layer::Attention(attention) => self.attention(attention, index, x, keys).await,
            Layer::Latent(latent) => latent.forward(self, x).await,
            Layer::DeltaNet(net) => net.forward(self, x).await,
            Layer::ShortConvolution(convolution) => convolution.forward(self, x).await,
            Layer::Mamba(mamba) => mamba.forward(self, x).await,
            Layer::Lightning(attention) => attention.forward(self, x).await,
            Layer::Mlp(mlp) => self.mlp(mlp, x).await,
            Layer::Moe(moe) => self.moe(moe, stream, x).await,
            Layer::Laurel { left, right, norm, .. } => {
                let inner = self.read(&[left], x).await?.remove(0);
                let added = self.read(&[right], &inner).await?.remove(0);
                self.engine.add(x, &self.norm(norm, &added)?, 1.0)
            }
            Layer::PerLayerInput { gate, activation, projection } => {
                let own = own.ok_or_else(|| mlx_quant_engine::Error::msg("no per-layer inputs"))?;
                let gate = self.read(&[gate], x).await?.remove(0);
                let product = self.engine.glu(&gate, own, *activation)?;
                Ok(self.read(&[projection], &product).await?.remove(0))
            }
        }
    }
}
