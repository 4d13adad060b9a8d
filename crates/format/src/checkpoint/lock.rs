//! Locks on files, and disks that know none.
//!
//! Some network and user-space file systems answer a request for a lock with an error. That is no reason not to use them: a lock
//! only keeps two runs apart, and most people start one.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::io::Errno;

/// What asking for a lock gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// It is held until the file is closed.
    Held,
    /// Another process holds it.
    Busy,
    /// The file system knows no locks.
    Unknown,
}

/// Asks for the exclusive lock of a file, without waiting.
///
/// # Errors
/// What the system says, unless that means that there are no locks.
pub fn try_lock(file: &File) -> std::io::Result<Lock> {
    match file.try_lock() {
        Ok(()) => Ok(Lock::Held),
        Err(TryLockError::WouldBlock) => Ok(Lock::Busy),
        Err(TryLockError::Error(error)) if knows_none(&error) => Ok(Lock::Unknown),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether a path leads to an open file, and not to nothing or to another one that was made since: who waited for a lock may hold that
/// of a file that is gone.
pub fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn knows_none(error: &std::io::Error) -> bool {
    /// Linux's ENOTSUPP, which no program should see and NFS lets out.
    const INTERNAL: i32 = 524;
    let errno = Errno::from_io_error(error);
    // Two of them are one on Linux.
    let known = [Errno::NOSYS, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOLCK];
    errno.is_some_and(|errno| known.contains(&errno)) || error.raw_os_error() == Some(INTERNAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_without_locks_are_told_from_other_errors() {
        for errno in [Errno::NOSYS, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOLCK] {
            assert!(knows_none(&errno.into()), "{errno:?}");
        }
        assert!(knows_none(&std::io::Error::from_raw_os_error(524)));
        for errno in [Errno::ACCESS, Errno::IO, Errno::NOSPC, Errno::STALE, Errno::PERM] {
            assert!(!knows_none(&errno.into()), "{errno:?}");
        }
    }

    #[test]
    fn a_lock_is_held_until_the_file_is_closed() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(path.path()).unwrap();
        let first = open();
        assert_eq!(try_lock(&first).unwrap(), Lock::Held);
        assert_eq!(try_lock(&open()).unwrap(), Lock::Busy);
        drop(first);
        assert_eq!(try_lock(&open()).unwrap(), Lock::Held);
    }
}
