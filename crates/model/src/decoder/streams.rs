//! Several residual streams side by side, of which each block computes one ([`super::Update`]): alternating updates (Gemma 3n;
//! arXiv 2301.13310). The layout is `transformers`' `modeling_gemma3n.py`.

use super::Linear;

/// How a model's streams come and go: the first is the embedding, the others are made of it; at the end their mean is
/// what the last norm reads. What these linears give is as long as the first stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Streams {
    /// `hidden -> hidden`, one for each stream but the first, from the embedding.
    pub spread: Vec<Linear>,
    /// The same, behind the last block.
    pub gather: Vec<Linear>,
}

impl Streams {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.spread.len() + 1
    }
}
