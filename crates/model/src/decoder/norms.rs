//! The norms of a block.

use std::collections::BTreeSet;

use super::{Block, LatentQueries, Layer, Norm, Projections};

impl Block {
    /// Its norms that what leaves it depends on: around its branches, of queries and keys, within mixers. Routers' own,
    /// indexers' and norms of keys that nobody reads are not among them. A norm that several branches share comes once.
    pub fn norms(&self) -> Vec<&Norm> {
        let mut norms: Vec<&Norm> = self.norm.iter().collect();
        for branch in self.branches() {
            norms.extend(branch.norm.iter().chain(&branch.post_norm));
            match &branch.layer {
                Layer::Attention(attention) => {
                    let own = attention.norms.iter();
                    norms.extend(own.clone().map(|norms| &norms.q));
                    if !matches!(attention.projections, Projections::Shared { .. }) {
                        norms.extend(own.flat_map(|norms| norms.k.iter().chain(&norms.v)));
                    }
                }
                Layer::Latent(latent) => {
                    if let LatentQueries::LowRank { norm, .. } = &latent.queries {
                        norms.push(norm);
                    }
                    norms.push(&latent.norm);
                }
                Layer::DeltaNet(net) => norms.push(&net.norm),
                Layer::Laurel { norm, .. } => norms.push(norm),
                Layer::Mamba(mamba) => norms.extend(mamba.norm.iter().map(|own| &own.norm)),
                Layer::Lightning(attention) => {
                    let own = attention.norms.iter();
                    norms.extend(own.flat_map(|norms| std::iter::once(&norms.q).chain(&norms.k)));
                    norms.push(&attention.norm.norm);
                }
                Layer::ShortConvolution(_) | Layer::Mlp(_) | Layer::Moe(_) | Layer::PerLayerInput { .. } => {}
            }
        }
        norms.extend(self.stages.iter().filter_map(|stage| stage.post_norm.as_ref()));
        let mut seen = BTreeSet::new();
        norms.retain(|norm| norm.path.as_ref().is_some_and(|path| seen.insert(path.clone())));
        norms
    }
}
