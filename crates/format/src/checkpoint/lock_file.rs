//! A file beside something that one process at a time may work on.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::lock::{Lock, try_lock};

/// A locked file, which goes when it is dropped. What a killed process leaves is taken over by the next.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    file: File,
    lock: Lock,
}

impl LockFile {
    /// Makes the file and locks it; `None` where another process holds it.
    ///
    /// # Errors
    /// What the system says.
    pub fn take(path: &Path) -> std::io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
            let lock = try_lock(&file)?;
            if lock == Lock::Busy {
                return Ok(None);
            }
            // Whoever held it may have removed it between our opening and our locking.
            if is_at(&file, path) {
                return Ok(Some(Self { path: path.to_owned(), file, lock }));
            }
        }
    }

    /// Whether others are kept out: not where the disk knows no locks.
    pub fn is_held(&self) -> bool {
        self.lock == Lock::Held
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Still locked, so that nobody loses a lock on what is removed here.
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether a path still leads to an open file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".out.lock");
        let first = LockFile::take(&path).unwrap().unwrap();
        assert!(first.is_held());
        assert!(LockFile::take(&path).unwrap().is_none());
        drop(first);
        assert!(!path.exists());
        // What a killed process leaves stands in nobody's way.
        std::fs::write(&path, "").unwrap();
        assert!(LockFile::take(&path).unwrap().is_some());
        assert!(!path.exists());
    }

    #[test]
    fn threads_that_race_never_hold_it_together() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".out.lock");
        let inside = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            let mut taken = 0;
            while taken < 300 {
                if let Some(lock) = LockFile::take(&path).unwrap() {
                    use std::sync::atomic::Ordering::SeqCst;
                    assert_eq!(inside.fetch_add(1, SeqCst), 0);
                    taken += 1;
                    // Long enough for the others to meet.
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    inside.fetch_sub(1, SeqCst);
                    drop(lock);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(work);
            }
        });
        assert!(!path.exists());
    }
}
