//! How the engine of a card is opened.

use std::sync::Arc;

use super::Gpu;
use super::adapter::{Adapter, AdapterChoice};
use super::card::Card;
use super::tiles::Tiles;
use crate::error::Result;
use crate::settings::Precision;

impl Gpu {
    /// Opens an adapter.
    ///
    /// # Errors
    /// If there is none, it cannot be opened, or it is too small; the message says what to do.
    pub fn open(choice: &AdapterChoice) -> Result<Self> {
        Self::with_precision(choice, Precision::Float32)
    }

    /// [`Gpu::open`] with products that may be less exact, and are faster.
    ///
    /// # Errors
    /// As there; an adapter without such matrix units.
    pub fn with_precision(choice: &AdapterChoice, precision: Precision) -> Result<Self> {
        Ok(Self::of(Card::open(choice, precision, None)?))
    }

    /// [`Gpu::open`] with kernels that see at most `binding` bytes of a buffer at once: how operations on large tensors
    /// are tried with small ones.
    ///
    /// # Errors
    /// As there.
    pub fn with_binding(choice: &AdapterChoice, binding: u64) -> Result<Self> {
        Ok(Self::of(Card::open(choice, Precision::Float32, Some(binding))?))
    }

    fn of(card: Card) -> Self {
        Self { card: Arc::new(card), left: Arc::default() }
    }

    /// [`Gpu::open`] with products computed in a way that is not the usual one: for measurements. The bits are the same.
    ///
    /// # Errors
    /// As there.
    pub fn with_tiles(choice: &AdapterChoice, tiles: Tiles) -> Result<Self> {
        let mut card = Card::open(choice, Precision::Float32, None)?;
        card.tiles = tiles;
        Ok(Self::of(card))
    }

    /// What was opened.
    pub fn adapter(&self) -> &Adapter {
        &self.card.adapter
    }

    /// Waits until everything asked for so far is done: for measurements.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn finish(&self) -> Result<()> {
        self.card.finish()
    }
}
