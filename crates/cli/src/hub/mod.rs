//! Models and data from the Hugging Face hub, and models to it.
//!
//! hf-hub speaks with the hub: its API, redirects, xet. What it leaves out is here: downloads that resume at the byte where they
//! broke, hashes that are checked, `Retry-After`, the offline switch, and errors that say what to do next. Downloads go into
//! the cache of Python's huggingface_hub. Nothing that is downloaded is ever run; `.bin` and `.pt` files are not even fetched.

mod cache;
mod card;
mod client;
mod connection;
mod dataset;
mod direct;
mod environment;
mod explain;
mod fetch;
mod hash;
mod id;
mod kind;
mod listing;
mod model;
mod remote;
mod repository;
mod upload;

use self::cache::length;
pub(crate) use self::connection::{Hub, Snapshot};
use self::connection::{shown, sleep};
use self::id::is_hash;
pub(crate) use self::id::{Address, check_revision};
use self::kind::Kind;
pub(crate) use self::kind::RemoteFile;
use self::repository::Repository;
pub(crate) use self::upload::Upload;
