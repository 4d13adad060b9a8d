//! A hub for tests.
//!
//! The tool downloads from and uploads to the Hugging Face hub, and most of what can go wrong there goes wrong
//! rarely: a connection that breaks at the tenth gigabyte, a proxy's login page, a token that is not enough. A
//! test cannot wait for that. This crate speaks the hub's endpoints on loopback, as far as the crate hf-hub and
//! Python's huggingface_hub use them, remembers what it was asked, and fails on request.
//!
//! There are four listeners, because there are several hosts in reality and clients must treat them differently:
//! the hub, which sees the token; the CDN, which serves large files and must never see it; the xet store, which is
//! the in-memory simulation of xet's own client crate behind a listener that can misbehave as well; and a host that
//! has nothing to do with the hub, to which a link or a redirect may lead.

mod answer;
mod call;
mod card;
mod cas;
mod cdn;
mod commit;
mod encoding;
mod fault;
mod hub;
mod listing;
mod record;
mod repository;
mod resolve;
mod routes;
mod server;
mod state;
mod upload;

pub use card::Verdict;
pub use fault::Fault;
pub use hub::Hub;
pub use record::{Request, Server};
pub use repository::{Commit, Kind};
