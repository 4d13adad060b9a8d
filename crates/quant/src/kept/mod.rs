//! What is kept on disk for later runs and shared by runs at the same time: the one way in which that is done.
//!
//! * **A file is there whole or not at all** ([`write()`]): it grows under a name that no other process has, its bytes
//!   are on the disk before it gets its own name, and what a killed process left of that is removed by the next one
//!   (`sweep`).
//! * **A directory says what is in it** (`Keyed`): a file with a key, made once, by whichever process comes first.
//!   Another key, another version or somebody else's files are refused in words.
//! * **What only one process may do is claimed** ([`Claim`]): a second one waits or is refused. What follows from a key
//!   alone (statistics, targets, hidden states) needs no claim, because two processes write the same bytes.
//!
//! Nothing here deletes what it did not make.

mod claim;
mod file;
mod keyed;
mod tensors;

use std::path::Path;

use mlx_format::checkpoint::{Arrays, read_arrays, write_arrays};

pub use self::claim::Claim;
pub use self::file::write;
pub(crate) use self::file::{sweep, sync_directory, write_part, write_with};
pub(crate) use self::keyed::Keyed;
pub(crate) use self::tensors::{from_tensors, to_tensors};

/// Writes arrays as a file that is there whole or not at all. Until [`sync_directory`] a power failure may take its
/// name.
pub(crate) fn store(path: &Path, arrays: &Arrays<'_>) -> std::io::Result<()> {
    write_part(path, |out| write_arrays(out, arrays))
}

/// The arrays of a file.
pub(crate) fn load(path: &Path) -> std::io::Result<Arrays<'static>> {
    read_arrays(std::fs::File::open(path)?)
}
