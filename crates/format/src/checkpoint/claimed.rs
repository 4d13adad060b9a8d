//! Removing a directory that is claimed by a lock on a file in it.
//!
//! Somebody may be on the way in while it goes, and the process that removes it may be killed at any point. So it gets a name under
//! which nobody enters it (`.NAME.NUMBER.gone`) before anything in it is removed, and whoever comes next finishes what was begun.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::lock::{Lock, is_at, try_lock};

/// The file whose lock claims a directory.
pub const CLAIM: &str = "lock";

const GONE: &str = ".gone";

/// The directory that a path is in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes a directory; `claim` is the file in it whose lock the caller holds.
///
/// # Errors
/// What the system says.
pub fn remove_claimed(directory: &Path, claim: &File) -> Result<()> {
    // Nobody else has this file open under that number before the directory is gone.
    remove_as(directory, directory, claim.metadata()?.ino())
}

/// Removes a directory that nobody claims, under a name that [`sweep_gone`] of `target` knows.
pub(super) fn remove_under_another_name(directory: &Path, target: &Path) -> Result<()> {
    match fs::symlink_metadata(directory).and_then(|found| remove_as(directory, target, found.ino())) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_as(directory: &Path, target: &Path, number: u64) -> Result<()> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let aside = target.with_file_name(format!(".{name}.{number}{GONE}"));
    fs::rename(directory, &aside)?;
    remove(&aside)
}

/// Removes a directory, and what somebody who was on the way in when it was renamed put there meanwhile.
fn remove(aside: &Path) -> Result<()> {
    loop {
        match fs::remove_dir_all(aside) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            // Somebody else finished it.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => return other,
        }
    }
}

/// Finishes what [`remove_claimed`] of the same directory began in a process that was killed. What cannot be removed stays.
pub fn sweep_gone(directory: &Path) {
    let Some(name) = directory.file_name() else { return };
    let prefix = format!(".{}.", name.to_string_lossy());
    let number = |found: &OsStr| {
        let number = found.to_str().and_then(|found| found.strip_prefix(&prefix)?.strip_suffix(GONE));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let Ok(entries) = fs::read_dir(parent(directory)) else { return };
    for entry in entries.filter_map(std::result::Result::ok) {
        if number(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = remove(&entry.path());
        }
    }
}

/// Removes a directory that nobody claims any more. One that has never been claimed is not ours, unless it is empty.
///
/// # Errors
/// What the system says.
pub fn remove_unclaimed(directory: &Path) -> Result<()> {
    sweep_gone(directory);
    if !fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let path = directory.join(CLAIM);
    match OpenOptions::new().write(true).open(&path) {
        Ok(claim) if try_lock(&claim)? == Lock::Held && is_at(&claim, &path) => {
            remove_claimed(directory, &claim)
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => match fs::remove_dir(directory) {
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => {
                Ok(())
            }
            other => other,
        },
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let name = |entry: Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(directory).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_process_was_removing_goes() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let others = [".place..gone", ".place.12x.gone", ".place.12.gone.old", ".other.12.gone"];
        for name in [".place.12.gone", ".place.345.gone"].iter().chain(&others) {
            fs::create_dir_all(at(name).join("a/b")).unwrap();
            fs::write(at(name).join("a/file"), "x").unwrap();
        }
        fs::write(at(".place.7.gone"), "a file").unwrap();
        sweep_gone(&at("place"));
        let mut left: Vec<&str> = others.into_iter().chain([".place.7.gone"]).collect();
        left.sort_unstable();
        assert_eq!(names(directory.path()), left);
    }

    #[test]
    fn only_what_nobody_claims_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("place");
        remove_unclaimed(&place).unwrap();
        fs::create_dir(&place).unwrap();
        fs::write(place.join("theirs"), "x").unwrap();
        remove_unclaimed(&place).unwrap();
        assert!(place.join("theirs").exists(), "it was never claimed");
        let claim = File::create(place.join(CLAIM)).unwrap();
        assert_eq!(try_lock(&claim).unwrap(), Lock::Held);
        remove_unclaimed(&place).unwrap();
        assert!(place.join("theirs").exists(), "somebody claims it");
        drop(claim);
        remove_unclaimed(&place).unwrap();
        assert!(names(directory.path()).is_empty());
        fs::create_dir(&place).unwrap();
        remove_unclaimed(&place).unwrap();
        assert!(names(directory.path()).is_empty(), "killed before it claimed anything");
    }
}
