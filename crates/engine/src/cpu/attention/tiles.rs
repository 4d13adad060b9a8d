//! What a tile of attention is computed with, forward and backward.

use faer::MatRef;

use crate::Tensor;
use crate::error::Result;

/// Softmax attention over tiles.
#[derive(Clone, Copy)]
pub(super) struct Attention {
    pub(super) window: Option<usize>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
}

/// Keys or values: those of a token lie `token` apart, those of a head `head`.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub(super) values: &'a [f32],
    pub(super) token: usize,
    pub(super) head: usize,
    pub(super) features: usize,
}

impl<'a> Strided<'a> {
    /// All of `[batch, tokens, heads, features]`.
    pub(super) fn all(x: &'a Tensor) -> Result<Self> {
        let (_, _, heads, features) = x.dims4()?;
        Ok(Self { values: x.host()?, token: heads * features, head: features, features })
    }

    /// `[tokens, features]` of one head of one batch row, `first` being counted through the batch.
    pub(super) fn of(self, head: usize, first: usize, tokens: usize) -> MatRef<'a, f32> {
        let start = first * self.token + head * self.head;
        let end = start + (tokens - 1) * self.token + self.features;
        MatRef::from_row_major_slice_with_stride(&self.values[start..end], tokens, self.features, self.token)
    }
}

/// About as many rows of queries as the matmul needs to be fast; more would meet more masked keys.
pub(super) const TILE_ROWS: usize = 128;
