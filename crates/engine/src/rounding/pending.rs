//! A rounded weight that its engine still has.

use std::sync::{Arc, Mutex, PoisonError};

use super::rounded::Rounded;
use crate::error::{Error, Result};

/// What a weight was rounded to, where the engine has it: a card goes on while nobody needs the numbers.
pub struct Pending {
    rows: usize,
    /// First rows, and powers of two that rows from there on are multiplied by.
    factors: Vec<(usize, Vec<f32>)>,
    numbers: Box<dyn FnOnce() -> Result<Rounded> + Send + Sync>,
}

/// A weight that several wait for: whoever comes first fetches it for all.
enum Shared {
    Pending(Pending),
    Fetched(Result<Rounded>),
}

impl Shared {
    fn fetched(&mut self) -> Result<&Rounded> {
        if let Self::Pending(_) = self {
            let before = std::mem::replace(self, Self::Fetched(Err(Error::msg("a weight is being fetched"))));
            if let Self::Pending(pending) = before {
                *self = Self::Fetched(pending.fetch());
            }
        }
        match self {
            Self::Fetched(rounded) => rounded.as_ref().map_err(Clone::clone),
            Self::Pending(_) => Err(Error::msg("a weight is being fetched")),
        }
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pending {} rows", self.rows)
    }
}

impl From<Rounded> for Pending {
    fn from(rounded: Rounded) -> Self {
        Self::new(rounded.rows(), move || Ok(rounded))
    }
}

impl Pending {
    /// A weight of `rows` rows that `numbers` fetches.
    pub fn new(rows: usize, numbers: impl FnOnce() -> Result<Rounded> + Send + Sync + 'static) -> Self {
        Self { rows, factors: Vec::new(), numbers: Box::new(numbers) }
    }

    /// As several weights, which have so many rows each.
    #[must_use]
    pub fn split(self, rows: &[usize]) -> Vec<Self> {
        let mut first = 0;
        let all = Arc::new(Mutex::new(Shared::Pending(self)));
        let part = |rows: &usize| {
            let (all, own) = (all.clone(), first..first + rows);
            first = own.end;
            Self::new(*rows, move || {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(all.fetched()?.rows_of(own))
            })
        };
        rows.iter().map(part).collect()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// As [`Rounded::scale_rows`].
    pub fn scale_rows(&mut self, first: usize, factors: &[f32]) {
        self.factors.push((first, factors.to_vec()));
    }

    /// The numbers.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn fetch(self) -> Result<Rounded> {
        let mut rounded = (self.numbers)()?;
        for (first, factors) in &self.factors {
            rounded.scale_rows(*first, factors);
        }
        Ok(rounded)
    }
}
