//! What was asked of the hub, for tests that are about the asking.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Which of the hub's listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The hub itself.
    Hub,
    /// Where the hub sends clients for large files.
    Cdn,
    /// The store of chunks.
    Xet,
    /// A host that is none of the hub's.
    Elsewhere,
}

impl Server {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hub => "hub",
            Self::Cdn => "cdn",
            Self::Xet => "xet",
            Self::Elsewhere => "elsewhere",
        }
    }
}

/// One request and how it was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Where it arrived.
    pub server: Server,
    /// `GET`, `HEAD`, ...
    pub method: String,
    /// Its path and query, as they came.
    pub path: String,
    /// Its `Range` header.
    pub range: Option<String>,
    /// The answer's status; 0 while there is none.
    pub status: u16,
    /// The bytes of the answer's body that were handed to the connection.
    pub sent: u64,
    /// Whether it brought an `Authorization` header.
    pub authorization: bool,
    /// Whether it brought the hub's own token, which only the hub may see.
    pub token: bool,
}

pub(crate) struct Entry {
    request: Request,
    status: AtomicU16,
    sent: AtomicU64,
}

impl Entry {
    pub(crate) fn answered(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::SeqCst);
    }
}

#[derive(Default)]
pub(crate) struct Record(Mutex<Vec<Arc<Entry>>>);

impl Record {
    pub(crate) fn open(&self, request: Request) -> Arc<Entry> {
        let entry = Arc::new(Entry { request, status: AtomicU16::new(0), sent: AtomicU64::new(0) });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&entry));
        entry
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |entry: &Arc<Entry>| Request {
            status: entry.status.load(Ordering::SeqCst),
            sent: entry.sent.load(Ordering::SeqCst),
            ..entry.request.clone()
        };
        entries.iter().map(read).collect()
    }
}
