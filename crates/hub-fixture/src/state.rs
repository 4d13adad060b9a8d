//! What the listeners share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::card::Rules;
use crate::cas::Cas;
use crate::fault::Faults;
use crate::record::Record;
use crate::repository::Store;

/// What the first part of the paths of the xet store begins with, which tells one run from another.
pub(crate) const RUN: &str = "run-";

/// Where they listen.
pub(crate) struct Addresses {
    pub(crate) hub: String,
    pub(crate) cdn: String,
    pub(crate) xet: String,
    pub(crate) elsewhere: String,
}

pub(crate) struct Shared {
    store: Mutex<Store>,
    pub(crate) addresses: Addresses,
    pub(crate) cas: Cas,
    pub(crate) faults: Faults,
    pub(crate) cards: Rules,
    pub(crate) record: Record,
}

impl Shared {
    pub(crate) fn new(addresses: Addresses, cas: Cas) -> Self {
        Self {
            store: Mutex::default(),
            addresses,
            cas,
            faults: Faults::default(),
            cards: Rules::default(),
            record: Record::default(),
        }
    }

    /// The store, also after a panic: the test that panicked has failed already.
    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
