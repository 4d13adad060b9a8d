//! What a comparison keeps between its methods and between runs: results and shared work, under a key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fs_err as fs;
use mlx_format::checkpoint::CLAIM;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{CompareSettings, Contestant, Entry};
use crate::data::hexadecimal;
use crate::device::identity;
use crate::dynamic::{Sensitivities, known_sensitivities};
use crate::kept::{self, Claim, Keyed};
use crate::observer::Observer;
use crate::{Error, Model};

/// Raised when the form of entries changes.
const RESULTS: u32 = 2;
const KEY: &str = "comparison.json";
const PARTS: &str = "parts.json";
/// The part that is all of them.
const WHOLE: &str = "comparison";
/// What can be done about a comparison that cannot go on.
const ANEW: &str = " (--restart forgets it and begins anew)";
const SENSITIVITIES: &str = "sensitivities.json";

/// What the results in a directory were made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    version: String,
    kernels: String,
    model: String,
    settings: String,
}

/// What a part of the work took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) seconds: f64,
    pub(super) peak_memory: Option<u64>,
    /// Whether it was interrupted: its seconds are those of the last part then.
    pub(super) resumed: bool,
    pub(super) done: bool,
}

impl Part {
    pub(super) const fn of(seconds: f64, peak_memory: Option<u64>) -> Self {
        Self { seconds, peak_memory, resumed: false, done: true }
    }
}

/// Below the output directory.
#[derive(Debug)]
pub(super) struct Store {
    output: PathBuf,
    work: PathBuf,
    /// Models and entries are one process's to make and to remove.
    claim: Claim,
}

fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::Comparison { path: path.display().to_string(), reason: reason.into() }
}

/// `gptq-4bit`.
fn file_name(contestant: &Contestant) -> String {
    let group = match contestant.scheme.group_size() {
        64 => String::new(),
        other => format!("-g{other}"),
    };
    format!("{}-{}bit{group}", contestant.recipe, contestant.scheme.bits())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    kept::write(path, text.as_bytes()).map_err(|error| Error::state(path, &error))
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|error| refused(path, error.to_string()))?;
    let hint = |error: serde_json::Error| refused(path, format!("it is damaged: {error}"));
    serde_json::from_str(&text).map(Some).map_err(hint)
}

impl Store {
    /// Makes the directories, or checks that what is in them belongs to the same comparison, and keeps other processes out of them.
    ///
    /// # Errors
    /// [`Error::Comparison`], or [`Error::Busy`] while another process compares there.
    pub(super) fn open(output: &Path, model: &Model, settings: &CompareSettings) -> Result<Self, Error> {
        let work = output.join("work");
        let key = Key {
            version: format!("{}, results {RESULTS}", env!("CARGO_PKG_VERSION")),
            kernels: identity(&model.device),
            model: model.hash()?,
            settings: hash(settings),
        };
        let keyed = Keyed { directory: &work, file: KEY, version: key.version.as_str().into() };
        // Of another version there is a key too, and that it is a comparison is all that is asked then.
        let begins_anew = settings.restart && work.join(KEY).is_file();
        if !begins_anew {
            let found = keyed.read::<Key>().map_err(|reason| refused(output, format!("{reason}{ANEW}")))?;
            if found.is_none() && holds_others(output) {
                return Err(refused(output, "it exists and holds something else"));
            }
        }
        let claim = Claim::within(&work).map_err(|error| refused(output, error.to_string()))?;
        let claim = claim.ok_or_else(|| Error::busy(output))?;
        if begins_anew {
            forget(output, &work)?;
        }
        std::fs::create_dir_all(output.join("models")).map_err(|error| refused(output, error.to_string()))?;
        let found = keyed.make(&key).map_err(|reason| refused(output, reason))?;
        if found != key {
            let what = if found.kernels != key.kernels {
                "by another engine or instruction set"
            } else if found.model != key.model {
                "of another model"
            } else {
                "with other settings"
            };
            return Err(refused(output, format!("it holds a comparison {what}{ANEW}")));
        }
        Ok(Self { output: output.to_owned(), work, claim })
    }

    /// Whether other processes are kept out.
    pub(super) fn is_claimed(&self) -> bool {
        self.claim.is_certain()
    }

    /// Where shared work lies.
    pub(super) fn work(&self) -> &Path {
        &self.work
    }

    pub(super) fn model_path(&self, contestant: &Contestant) -> PathBuf {
        self.output.join("models").join(file_name(contestant))
    }

    pub(super) fn sensitivities(&self) -> PathBuf {
        self.work.join(SENSITIVITIES)
    }

    /// Those of an earlier run, if it finished measuring; nothing is computed here.
    pub(super) fn known_sensitivities(
        &self,
        model: &Model,
        settings: &CompareSettings,
    ) -> Option<Sensitivities> {
        known_sensitivities(model, &settings.calibration, settings.seed, &self.sensitivities())
    }

    fn entry_path(&self, contestant: &Contestant) -> PathBuf {
        self.work.join(format!("{}.json", file_name(contestant)))
    }

    /// The result of a method, if it is there.
    pub(super) fn entry(&self, contestant: &Contestant) -> Result<Option<Entry>, Error> {
        let entry: Option<Entry> = read(&self.entry_path(contestant))?;
        Ok(entry.map(|entry| Entry { name: contestant.name.clone(), ..entry }))
    }

    pub(super) fn keep(&self, contestant: &Contestant, entry: &Entry) -> Result<(), Error> {
        write(&self.entry_path(contestant), &text(entry)?)
    }

    /// Does a part of the work that methods share, and gives what it took: now, or when it was first done.
    pub(super) fn once<T>(
        &self,
        name: &str,
        observer: &dyn Observer,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<(T, Part), Error> {
        let path = self.work.join(PARTS);
        let mut all: BTreeMap<String, Part> = read(&path)?.unwrap_or_default();
        let known = all.get(name).copied();
        if known.is_none() {
            all.insert(name.to_owned(), Part { done: false, ..Part::of(0.0, None) });
            write(&path, &text(&all)?)?;
        }
        observer.peak_memory();
        let start = Instant::now();
        let done = work()?;
        let own = Part::of(start.elapsed().as_secs_f64(), observer.peak_memory());
        let part = match known {
            Some(known) if known.done => return Ok((done, known)),
            Some(_) => Part { resumed: true, ..own },
            None => own,
        };
        all.insert(name.to_owned(), part);
        write(&path, &text(&all)?)?;
        Ok((done, part))
    }

    /// Wall time of all runs that came to an end, together; one that only looked is not counted.
    pub(super) fn add_seconds(&self, seconds: f64, worked: bool) -> Result<f64, Error> {
        let path = self.work.join(PARTS);
        let mut all: BTreeMap<String, Part> = read(&path)?.unwrap_or_default();
        let before = all.get(WHOLE).map_or(0.0, |part| part.seconds);
        if !worked && before > 0.0 {
            return Ok(before);
        }
        all.insert(WHOLE.to_owned(), Part::of(before + seconds, None));
        write(&path, &text(&all)?)?;
        Ok(before + seconds)
    }

    /// Removes what only the work needed: hidden states and Gram matrices.
    pub(super) fn conclude(&self) -> Result<(), Error> {
        for directory in ["teacher", "statistics"].map(|name| self.work.join(name)) {
            if directory.exists() {
                fs::remove_dir_all(&directory).map_err(|error| Error::state(&directory, &error))?;
            }
        }
        let entries = fs::read_dir(&self.work).map_err(|error| Error::state(&self.work, &error))?;
        for entry in entries.filter_map(Result::ok) {
            if entry.path().extension().is_some_and(|ending| ending == "hidden") {
                fs::remove_file(entry.path()).map_err(|error| Error::state(&entry.path(), &error))?;
            }
        }
        Ok(())
    }
}

/// Removes results, shared work and models of a comparison that the caller claims; its key last, by which it is known.
fn forget(output: &Path, work: &Path) -> Result<(), Error> {
    let key = work.join(KEY);
    let within = fs::read_dir(work).map_err(|error| Error::state(work, &error))?;
    let own = within.filter_map(Result::ok).map(|entry| entry.path());
    let own = own.filter(|path| *path != key && path.file_name().is_some_and(|name| name != CLAIM));
    for path in std::iter::once(output.join("models")).chain(own).chain([key.clone()]) {
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::state(&path, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a directory has anything but the beginning of a comparison in it.
fn holds_others(output: &Path) -> bool {
    let Ok(entries) = fs::read_dir(output) else { return false };
    entries.filter_map(Result::ok).any(|entry| match entry.file_name().to_str() {
        Some("work") => false,
        // As a killed process may have left it before there was a key.
        Some("models") => fs::read_dir(entry.path()).is_ok_and(|mut models| models.next().is_some()),
        _ => true,
    })
}

fn text(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map_err(|error| Error::state(Path::new(KEY), &error))
}

/// Of everything that decides a result but the method itself: more methods can join later.
fn hash(settings: &CompareSettings) -> String {
    let mut hash = Sha256::new();
    for windows in [&settings.calibration, &settings.lessons.0, &settings.lessons.1, &settings.held_out] {
        hash.update(windows.tokens_hash());
        hash.update(windows.sequence_length.to_le_bytes());
    }
    let dwq = crate::DwqSettings {
        target_dir: None,
        teacher_states: None,
        save_seconds: 0,
        ..settings.dwq.clone()
    };
    let shared = settings.shared_statistics;
    hash.update(format!("{:?} {dwq:?} {:?} {} {shared}", settings.method, settings.learn, settings.seed));
    hexadecimal(&hash.finalize())
}
