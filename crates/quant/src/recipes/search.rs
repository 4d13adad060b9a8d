//! Models made on trial, beside the output that one of them will become.
//!
//! All of it happens under a claim (`.NAME.lock`), so that nothing of another run is removed, and the best model gets
//! its name as any other does ([`Destination::place`]). The next run removes the finished models that a killed one left. With an
//! unfinished model it goes on if it would make the same.

use std::path::{Path, PathBuf};

use fs_err as fs;
use mlx_format::checkpoint::{Destination, WriteError, Writer};

use crate::Error;
use crate::kept::Claim;
use crate::observer::{Event, Observer};

/// Models that are made in search of a divergence, at most.
pub(super) const TRIES: usize = 6;

/// A model that was made and measured.
pub(super) struct Tried<T> {
    /// What its maker gave.
    pub(super) made: T,
    /// Where it lies.
    pub(super) path: PathBuf,
    /// Bytes of its weights.
    pub(super) bytes: u64,
}

/// A search for the model that an output is to become. While it lasts, no other run searches for one.
#[derive(Debug)]
pub struct Search<'t> {
    target: Destination<'t>,
    _lock: Claim,
}

impl<'t> Search<'t> {
    /// Locks the output, before any work, and removes the tries of a run that was killed.
    ///
    /// # Errors
    /// An output that exists, cannot be made, or is searched for by another process ([`WriteError::Busy`]).
    pub fn begin(target: impl Into<Destination<'t>>, observer: &dyn Observer) -> Result<Self, Error> {
        let target: Destination<'_> = target.into();
        Writer::check_target(target)?;
        let path = beside(target.path, "lock");
        let lock = Claim::try_new(&path).map_err(|error| state(&path, &error))?;
        let lock = lock.ok_or_else(|| WriteError::Busy(target.path.to_owned()))?;
        if !lock.is_certain() {
            let text = format!(
                "{} is on a disk that knows no locks; do not start a second run into the same output",
                path.display()
            );
            observer.event(Event::Note { text: &text });
        }
        // The run that held the lock before may have finished in the meantime.
        Writer::check_target(target)?;
        (0..TRIES).try_for_each(|attempt| remove(&place(target.path, attempt)))?;
        Ok(Self { target, _lock: lock })
    }
}

/// The tries of a search.
pub(super) struct Tries<'t, T> {
    best: Option<Tried<T>>,
    /// Places that were given out.
    places: Vec<PathBuf>,
    /// Dropped last.
    search: Search<'t>,
}

impl<'t, T> Tries<'t, T> {
    pub(super) fn new(search: Search<'t>) -> Self {
        Self { best: None, places: Vec::new(), search }
    }

    /// An empty place for a try.
    pub(super) fn place(&mut self, attempt: usize) -> Result<PathBuf, Error> {
        let path = place(self.search.target.path, attempt);
        remove(&path)?;
        self.places.push(path.clone());
        Ok(path)
    }

    /// Keeps a try if it is good enough and smaller than what was so far, and removes the other one.
    pub(super) fn judge(&mut self, tried: Tried<T>, enough: bool) -> Result<(), Error> {
        let smaller = self.best.as_ref().is_none_or(|best| tried.bytes < best.bytes);
        if !(enough && smaller) {
            return remove(&tried.path);
        }
        match self.best.replace(tried) {
            Some(old) => remove(&old.path),
            None => Ok(()),
        }
    }

    /// Whether one was good enough.
    pub(super) fn has_best(&self) -> bool {
        self.best.is_some()
    }

    /// Gives the best try the name.
    pub(super) fn conclude(mut self) -> Result<Option<T>, Error> {
        let Some(best) = self.best.take() else { return Ok(None) };
        self.places.retain(|place| *place != best.path);
        self.search.target.place(&best.path)?;
        Ok(Some(best.made))
    }
}

impl<T> Drop for Tries<'_, T> {
    /// A search that failed or was stopped leaves no finished models behind. An unfinished one stays: the same command
    /// goes on with it.
    fn drop(&mut self) {
        for place in &self.places {
            // Nothing can be told any more; the next run tries again.
            let _ = remove(place);
        }
    }
}

/// Where a try lies.
fn place(target: &Path, attempt: usize) -> PathBuf {
    beside(target, &format!("try-{attempt}"))
}

/// A hidden name beside the output.
fn beside(target: &Path, what: &str) -> PathBuf {
    let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    target.with_file_name(format!(".{name}.{what}"))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(state(path, &error)),
        _ => Ok(()),
    }
}

fn state(path: &Path, error: &std::io::Error) -> Error {
    Error::State { path: path.display().to_string(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::Silent;

    fn made(
        tries: &mut Tries<'_, &'static str>,
        attempt: usize,
        name: &'static str,
        bytes: u64,
        enough: bool,
    ) {
        let path = tries.place(attempt).unwrap();
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("name"), name).unwrap();
        tries.judge(Tried { made: name, path, bytes }, enough).unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let names = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = names.map(|one| one.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_smallest_that_is_enough_gets_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        // Of a run that was killed.
        std::fs::create_dir(directory.path().join(".out.try-4")).unwrap();
        std::fs::write(directory.path().join(".out.lock"), "").unwrap();
        let mut tries = Tries::new(Search::begin(&target, &Silent).unwrap());
        made(&mut tries, 0, "too small", 10, false);
        made(&mut tries, 1, "large", 30, true);
        assert!(tries.has_best());
        made(&mut tries, 2, "right", 20, true);
        made(&mut tries, 3, "larger again", 25, true);
        assert_eq!(names(directory.path()), [".out.lock", ".out.try-2"]);
        assert_eq!(tries.conclude().unwrap(), Some("right"));
        assert_eq!(names(directory.path()), ["out"]);
        assert_eq!(std::fs::read_to_string(target.join("name")).unwrap(), "right");
    }

    #[test]
    fn two_runs_never_touch_each_others_tries() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut first = Tries::new(Search::begin(&target, &Silent).unwrap());
        made(&mut first, 0, "first", 10, true);
        let second = Search::begin(&target, &Silent).unwrap_err();
        assert!(matches!(second, Error::Write(WriteError::Busy(_))) && second.is_refusal(), "{second}");
        assert_eq!(names(directory.path()), [".out.lock", ".out.try-0"]);
        assert_eq!(first.conclude().unwrap(), Some("first"));
        let late = Search::begin(&target, &Silent).unwrap_err();
        assert!(matches!(late, Error::Write(WriteError::Exists(_))), "{late}");
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut tries = Tries::new(Search::begin(&target, &Silent).unwrap());
        made(&mut tries, 0, "ours", 10, true);
        // An empty directory is what a plain rename would replace.
        std::fs::create_dir(&target).unwrap();
        assert!(matches!(tries.conclude(), Err(Error::Write(WriteError::Exists(_)))));
        assert_eq!(names(&target), Vec::<String>::new());
    }

    #[test]
    fn what_is_stopped_leaves_the_unfinished_one_alone() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut tries = Tries::new(Search::begin(&target, &Silent).unwrap());
        made(&mut tries, 0, "finished", 10, true);
        let path = tries.place(1).unwrap();
        let unfinished = Writer::partial_path(&path).unwrap();
        std::fs::create_dir(&unfinished).unwrap();
        drop(tries);
        assert_eq!(names(directory.path()), [unfinished.file_name().unwrap().to_str().unwrap()]);
    }
}
