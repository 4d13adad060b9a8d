//! Rotary embeddings as tables.

use std::sync::Arc;

use mlx_quant_engine::{Device, Pairing, Result, Tensor};

use crate::decoder::{Decoder, Rope};

/// Cosines and sines of every rotary embedding of a decoder, for windows of one length.
#[derive(Clone, Debug)]
pub struct Tables {
    pub(super) tokens: usize,
    pub(super) all: Arc<[Table]>,
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

/// A rotary embedding for all positions.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// `[tokens, frequencies]`.
    pub(super) cos: Tensor,
    /// `[tokens, frequencies]`.
    pub(super) sin: Tensor,
    pub(super) pairing: Pairing,
}
