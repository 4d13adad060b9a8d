//! What only one process may do at a time.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mlx_format::checkpoint::{CLAIM, Lock, is_at, remove_claimed, sweep_gone, try_lock};

/// How often somebody who waits looks again.
const PAUSE: Duration = Duration::from_millis(200);

/// The right to work on something, for as long as this lives; the system takes it from a process that is killed.
///
/// It is a lock on a file of its own, which is removed with the claim. Whoever opened that file before it was removed
/// notices that, and opens the one that is there now.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    lock: Lock,
    /// Closed last, after the file is removed.
    file: File,
}

impl Claim {
    /// The file by which a file or directory is claimed before it is made: `.NAME.lock` beside it.
    pub fn beside(target: &Path) -> PathBuf {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        target.with_file_name(format!(".{name}.lock"))
    }

    /// Claims a directory by its file `lock`; the directory is made if it is not there. `None` while another process
    /// claims it.
    ///
    /// # Errors
    /// What the system says.
    pub fn within(directory: &Path) -> Result<Option<Self>> {
        sweep_gone(directory);
        loop {
            let made = std::fs::create_dir_all(directory);
            match made.and_then(|()| Self::try_new(&directory.join(CLAIM))) {
                // It was removed meanwhile, by whoever had the claim: between two looks of ours at it.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists && !is_taken(directory) => {}
                other => return other,
            }
        }
    }

    /// Claims by the file `path`; `None` while another process has the claim.
    ///
    /// # Errors
    /// What the system says of the file.
    pub fn try_new(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
            let lock = try_lock(&file)?;
            if lock == Lock::Busy {
                return Ok(None);
            }
            if is_at(&file, path) {
                return Ok(Some(Self { path: path.to_owned(), lock, file }));
            }
        }
    }

    /// As [`Claim::try_new`], but waits for another process. `None` if `stop` says so first. `waits` is called once, if
    /// it has to wait.
    ///
    /// # Errors
    /// As [`Claim::try_new`].
    pub fn wait(path: &Path, stop: impl Fn() -> bool, waits: impl FnOnce()) -> Result<Option<Self>> {
        let mut waits = Some(waits);
        loop {
            if let Some(own) = Self::try_new(path)? {
                return Ok(Some(own));
            }
            if let Some(waits) = waits.take() {
                waits();
            }
            if stop() {
                return Ok(None);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Removes a directory that is claimed by a file in it.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(self, directory: &Path) -> Result<()> {
        remove_claimed(directory, &self.file)
    }

    /// Whether other processes are kept out: not where the disk knows no locks.
    pub fn is_certain(&self) -> bool {
        self.lock == Lock::Held
    }
}

/// Whether something stands at a path that is no directory.
fn is_taken(path: &Path) -> bool {
    path.symlink_metadata().is_ok() && !path.is_dir()
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock is still held: whoever has the file open will find that it is at its path no more. If the directory
        // went before, the file of another process may be there by now.
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = Claim::beside(&directory.path().join("out"));
        assert!(path.ends_with(".out.lock"));
        let (inside, passed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Some(own) = Claim::try_new(&path).unwrap() else { continue };
                        assert!(own.is_certain());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        passed.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(passed.into_inner() > 0);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    /// A lock on a file that went with another claim is none.
    #[test]
    fn a_file_that_is_gone_is_no_claim() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let own = Claim::try_new(&path).unwrap().unwrap();
        let late = File::open(&path).unwrap();
        assert!(is_at(&late, &path));
        drop(own);
        assert!(!is_at(&late, &path));
        let other = Claim::try_new(&path).unwrap().unwrap();
        assert_eq!(try_lock(&late).unwrap(), Lock::Held);
        assert!(!is_at(&late, &path));
        drop(other);
    }

    /// Whoever has the claim may remove the directory with it.
    #[test]
    fn a_directory_may_go_with_the_claim() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("a/place");
        let passed = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Some(own) = Claim::within(&place).unwrap() else { continue };
                        std::fs::write(place.join("work"), "x").unwrap();
                        assert!(place.join("work").exists(), "somebody else removed it");
                        std::fs::remove_file(place.join("work")).unwrap();
                        own.remove(&place).unwrap();
                        passed.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(passed.into_inner() > 0);
    }

    /// A file or a link to nothing where the directory should be is an error, not another try.
    #[test]
    fn what_is_no_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(directory.path().join("nothing"), &link).unwrap();
        for path in [&file, &link, &file.join("below")] {
            assert!(Claim::within(path).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn who_waits_says_so_and_may_give_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        // What a killed process left is no claim.
        std::fs::write(&path, "").unwrap();
        let own = Claim::try_new(&path).unwrap().unwrap();
        assert!(Claim::try_new(&path).unwrap().is_none());
        let mut told = 0;
        assert!(Claim::wait(&path, || true, || told += 1).unwrap().is_none());
        assert_eq!(told, 1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Claim::wait(&path, || false, || {}).unwrap().is_some());
            std::thread::sleep(Duration::from_millis(20));
            drop(own);
            assert!(waiting.join().unwrap());
        });
        assert!(!path.exists());
    }
}
