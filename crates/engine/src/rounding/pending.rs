//! A rounded weight that its engine still has.

use std::sync::{Arc, Mutex, PoisonError};

use super::rounded::Rounded;
use crate::error::{Error, Result};

/// What a weight was rounded to, where the engine has it: a card goes on while nobody needs the numbers.
pub struct Pending {
    rows: usize,
    /// First rows, and powers of two that rows from there on are multiplied by.
    factors: Vec<(usize, Vec<f32>)>,
    /// As [`Rounded::room`], of the fp modes.
    room: Option<Vec<(f32, f32)>>,
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
        let room = (!rounded.scheme.has_biases()).then(|| rounded.room());
        Self { room, ..Self::new(rounded.rows(), move || Ok(rounded)) }
    }
}

impl Pending {
    /// A weight of `rows` rows that `numbers` fetches, affine.
    pub fn new(rows: usize, numbers: impl FnOnce() -> Result<Rounded> + Send + Sync + 'static) -> Self {
        Self { rows, factors: Vec::new(), room: None, numbers: Box::new(numbers) }
    }

    /// Weights of one scheme and width below each other, as one.
    pub fn joined(parts: Vec<Self>) -> Self {
        let rows = parts.iter().map(|part| part.rows).sum();
        let room = parts.iter().map(|part| part.room.clone()).collect::<Option<Vec<_>>>();
        let numbers = move || {
            let mut parts = parts.into_iter();
            let first = parts.next().ok_or_else(|| Error::msg("no weight"))?;
            let mut all = first.fetch()?;
            for part in parts {
                all.append(part.fetch()?);
            }
            Ok(all)
        };
        Self { room: room.map(|rooms| rooms.concat()), ..Self::new(rows, numbers) }
    }

    /// As several weights, which have so many rows each.
    #[must_use]
    pub fn split(self, rows: &[usize]) -> Vec<Self> {
        let mut first = 0;
        let room = self.room.clone();
        let all = Arc::new(Mutex::new(Shared::Pending(self)));
        let part = |rows: &usize| {
            let (all, own) = (all.clone(), first..first + rows);
            first = own.end;
            let room = room.as_ref().map(|room| room[own.clone()].to_vec());
            let numbers = move || {
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(all.fetched()?.rows_of(own))
            };
            Self { room, ..Self::new(*rows, numbers) }
        };
        rows.iter().map(part).collect()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Powers of two by which rows from `first` on may be multiplied, the smallest and the largest of each; `None` where
    /// there is no limit.
    pub fn room(&self, first: usize) -> Option<&[(f32, f32)]> {
        self.room.as_ref().map(|room| &room[first..])
    }

    /// As [`Rounded::scale_rows`].
    pub fn scale_rows(&mut self, first: usize, factors: &[f32]) {
        if let Some(room) = &mut self.room {
            for ((least, most), factor) in room[first..].iter_mut().zip(factors) {
                (*least, *most) = (*least / factor, *most / factor);
            }
        }
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
