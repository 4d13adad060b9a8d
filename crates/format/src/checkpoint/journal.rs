//! The journal of an output that is being written: which run it is, what it has finished, and the lock on both.
//!
//! The first line stands for the run and its engine, each further one is the index of a finished tensor, or another engine
//! that went on from there. A power failure may cut the file off or
//! fill its end with zeros: what stands before the damage still holds, because a tensor is on the disk before its line is written.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::claimed::{parent, remove_unclaimed, sweep_gone};
use super::destination::{remove_replaced, settle};
use super::lock::{Lock, is_at, try_lock};
use super::records::{JOURNAL, LAST, STATE};
use super::run::{Run, Share, finished, next_engine};
use super::write_error::WriteError;

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: fs::File,
    lock: Lock,
}

impl Journal {
    /// Opens or makes the journal in a directory and locks it.
    ///
    /// # Errors
    /// [`WriteError::Busy`] where another process holds it, or has renamed the directory away meanwhile.
    pub(super) fn open(directory: &Path) -> Result<Self, WriteError> {
        let path = directory.join(JOURNAL);
        let busy = || WriteError::Busy(directory.to_owned());
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file =
            file.map_err(
                |error| {
                    if error.kind() == ErrorKind::NotFound { busy() } else { WriteError::from(error) }
                },
            )?;
        let lock = try_lock(file.file())?;
        if lock == Lock::Busy || !is_at(file.file(), &path) {
            return Err(busy());
        }
        Ok(Self { file, lock })
    }

    /// Whether other runs are kept out: not where the disk knows no locks.
    pub(super) fn is_locked(&self) -> bool {
        self.lock == Lock::Held
    }

    /// What an earlier run has finished, of `count` tensors, by each engine in turn; `None` if there was none. `partial` is
    /// named in errors.
    ///
    /// # Errors
    /// [`WriteError::OtherRun`].
    pub(super) fn read(
        &mut self,
        run: Run<'_>,
        count: usize,
        partial: &Path,
    ) -> Result<Option<Vec<Share>>, WriteError> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        // A crash before the first line was complete, and so before anything else was made.
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
        let first = std::str::from_utf8(&bytes[..end]).ok();
        let Some(engine) = first.and_then(|line| run.engine_of(line)) else {
            let whole = first.is_some_and(|text| !text.is_empty() && !text.contains(char::is_control));
            let other = || WriteError::OtherRun { path: partial.to_owned(), command: None };
            return if whole { Err(other()) } else { Ok(None) };
        };
        let mut shares = vec![Share { engine: engine.to_owned(), tensors: BTreeSet::new() }];
        let mut kept = end + 1;
        for bytes in bytes[kept..].split_inclusive(|byte| *byte == b'\n') {
            let line = bytes.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
            let Some(line) = line else { break };
            match (line.parse::<usize>(), next_engine(line)) {
                (Ok(index), _) if index < count => finished(&mut shares, &[index]),
                (Ok(_), _) => {}
                (_, Some(engine)) if !engine.contains(char::is_control) => {
                    shares.push(Share { engine: engine.to_owned(), tensors: BTreeSet::new() });
                }
                _ => break,
            }
            kept += bytes.len();
        }
        self.file.set_len(kept as u64)?;
        self.file.seek(SeekFrom::End(0))?;
        Ok(Some(shares))
    }

    /// Begins anew, with nothing finished.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn begin(&mut self, run: Run<'_>) -> Result<(), WriteError> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(format!("{}\n", run.line()).as_bytes())?;
        Ok(self.file.sync_data()?)
    }

    /// Goes on with what another engine has finished.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn go_on(&mut self, run: Run<'_>) -> Result<(), WriteError> {
        self.file.write_all(format!("{}\n", run.next_line()).as_bytes())?;
        Ok(self.file.sync_data()?)
    }

    /// Adds finished tensors.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn add(&mut self, indices: &[usize]) -> std::io::Result<()> {
        let mut lines = String::new();
        for index in indices {
            let _ = writeln!(lines, "{index}");
        }
        self.file.write_all(lines.as_bytes())
    }
}

/// Removes from a finished model what a run that was killed between the last rename and its end left in it: the journal, and files
/// with activations, often gigabytes; and the model that it had replaced. Does nothing to anything else: not while a process is at work on it, and not to a model
/// that is not finished. Gives whether something was removed.
///
/// # Errors
/// What the system says.
pub fn tidy(model: &Path) -> std::io::Result<bool> {
    let path = model.join(JOURNAL);
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = name.starts_with('.') && name.ends_with(".partial");
    if unfinished || ![JOURNAL, LAST, "config.json"].iter().all(|file| model.join(file).is_file()) {
        return Ok(false);
    }
    let journal = fs::OpenOptions::new().write(true).open(&path)?;
    if try_lock(journal.file())? != Lock::Held || !is_at(journal.file(), &path) {
        return Ok(false);
    }
    // Killed while it replaced another model, that one stands where this one was made.
    remove_replaced(model, &model.with_file_name(format!(".{name}.partial")))?;
    sweep_gone(model);
    clean(model)?;
    Ok(true)
}

/// The directory beside `model` in which a streamed source lies while it is converted: `.NAME.source`.
pub fn source_path(model: &Path) -> PathBuf {
    model.with_file_name(format!(".{}.source", model.file_name().unwrap_or_default().to_string_lossy()))
}

/// Ends the replacing of a model. Removes what a run keeps beside its output until the model is made (`.NAME.kept-*`, a lock `.NAME.lock` and a streamed source
/// `.NAME.source` that nobody holds), where the model is made.
pub(super) fn tidy_beside(model: &Path) -> std::io::Result<()> {
    let Some(name) = model.file_name() else { return Ok(()) };
    settle(model)?;
    if !model.join("config.json").is_file() {
        return Ok(());
    }
    remove_unclaimed(&source_path(model))?;
    let ours = format!(".{}.kept-", name.to_string_lossy());
    let lock = format!(".{}.lock", name.to_string_lossy());
    for entry in fs::read_dir(parent(model))? {
        let entry = entry?;
        let found = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type()?.is_file() {
            continue;
        }
        // Whoever opens the lock before it goes notices that it is at its path no more.
        let free = |path: &Path| {
            let file = fs::OpenOptions::new().write(true).open(path)?;
            let held = try_lock(file.file())? == Lock::Held && is_at(file.file(), path);
            Ok::<_, std::io::Error>(held.then_some(file))
        };
        if found.starts_with(&ours) {
            fs::remove_file(entry.path())?;
        } else if found == lock
            && let Some(_held) = free(&entry.path())?
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes the journal, last, and files of states.
pub(super) fn clean(model: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(model)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(STATE)) {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_file(model.join(JOURNAL))?;
    fs::File::open(model)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_for_a_model_goes_when_it_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in [".out.kept-figures.json", ".other.kept-figures.json", "out.kept-x"] {
            std::fs::write(at(name), "x").unwrap();
        }
        tidy_beside(&at("out")).unwrap();
        assert!(at(".out.kept-figures.json").exists(), "it is still under way");
        std::fs::create_dir(at("out")).unwrap();
        std::fs::write(at("out/config.json"), "{}").unwrap();
        tidy_beside(&at("out")).unwrap();
        assert!(!at(".out.kept-figures.json").exists());
        let held = std::fs::File::create(at(".out.lock")).unwrap();
        assert_eq!(try_lock(&held).unwrap(), Lock::Held);
        tidy_beside(&at("out")).unwrap();
        assert!(at(".out.lock").exists(), "somebody holds it");
        drop(held);
        tidy_beside(&at("out")).unwrap();
        assert!(!at(".out.lock").exists());
        assert!(at(".other.kept-figures.json").exists() && at("out.kept-x").exists());
        std::fs::create_dir(at(".out.source")).unwrap();
        std::fs::write(at(".out.source/lock"), "").unwrap();
        std::fs::create_dir(at("..out.source.12.gone")).unwrap();
        tidy_beside(&at("out")).unwrap();
        assert!(!at(".out.source").exists() && !at("..out.source.12.gone").exists());
    }

    /// What is done by a journal with these bytes.
    fn read(bytes: &[u8]) -> Result<Option<Vec<usize>>, WriteError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(JOURNAL);
        std::fs::write(&path, bytes).unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        let run = Run::from("mlx-quant x");
        let shares = journal.read(run, 20, directory.path())?;
        let Some(shares) = shares else { return Ok(None) };
        // What is added stands behind what held.
        journal.add(&[19]).unwrap();
        drop(journal);
        let mut again = Journal::open(directory.path()).unwrap();
        let mut all = shares.clone();
        all.last_mut().unwrap().tensors.insert(19);
        assert_eq!(again.read(run, 20, directory.path()).unwrap(), Some(all));
        Ok(Some(shares.into_iter().flat_map(|share| share.tensors).collect()))
    }

    #[test]
    fn each_engine_has_its_share() {
        let directory = tempfile::tempdir().unwrap();
        let [cpu, gpu] = ["cpu", "gpu x, vulkan"].map(|engine| Run { identity: "mlx-quant x", engine });
        let mut journal = Journal::open(directory.path()).unwrap();
        journal.begin(cpu).unwrap();
        journal.add(&[1, 2]).unwrap();
        journal.go_on(gpu).unwrap();
        // Once more, because what left the block before was lost.
        journal.add(&[2, 3]).unwrap();
        drop(journal);
        let share = |run: Run<'_>, tensors: &[usize]| Share {
            engine: run.engine.to_owned(),
            tensors: tensors.iter().copied().collect(),
        };
        let read = |run| Journal::open(directory.path()).unwrap().read(run, 20, directory.path());
        let both = vec![share(cpu, &[1]), share(gpu, &[2, 3])];
        assert_eq!(read(cpu).unwrap().as_ref(), Some(&both));
        assert_eq!(read(gpu).unwrap().as_ref(), Some(&both));
        assert!(matches!(read(Run { identity: "mlx-quant y", ..cpu }), Err(WriteError::OtherRun { .. })));
        // A line that was cut off is no engine.
        let path = directory.path().join(JOURNAL);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - "ulkan\n2\n3\n".len()]).unwrap();
        assert_eq!(read(cpu).unwrap(), Some(vec![share(cpu, &[1, 2])]));
    }

    #[test]
    fn damage_costs_what_stands_behind_it() {
        assert_eq!(read(b"mlx-quant x\n1\n2\n").unwrap(), Some(vec![1, 2]));
        assert_eq!(read(b"mlx-quant x\n1\n2").unwrap(), Some(vec![1]));
        assert_eq!(read(b"mlx-quant x\n1\n\0\0\0\n7\n").unwrap(), Some(vec![1]));
        assert_eq!(read(b"mlx-quant x\n1\n\xff\xfe\n7\n").unwrap(), Some(vec![1]));
        assert_eq!(read(b"mlx-quant x\n1\n99\n7\n").unwrap(), Some(vec![1, 7]));
        // No first line that could be a run.
        assert_eq!(read(b"").unwrap(), None);
        assert_eq!(read(b"\0\0\0\0").unwrap(), None);
        assert_eq!(read(b"\0\0\0\0\n1\n").unwrap(), None);
        assert_eq!(read(b"mlx-quant \xff\n1\n").unwrap(), None);
        assert!(matches!(read(b"mlx-quant y\n1\n"), Err(WriteError::OtherRun { .. })));
    }

    #[test]
    fn a_finished_model_is_tidied_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, files: &[&str]| {
            let model = directory.path().join(name);
            std::fs::create_dir(&model).unwrap();
            for file in files {
                std::fs::write(model.join(file), "x").unwrap();
            }
            model
        };
        let all = ["config.json", LAST, JOURNAL, ".state-0-0.safetensors", "model.safetensors"];
        let model = make("out", &all);
        // A process that is about to tidy up itself.
        let held = Journal::open(&model).unwrap();
        assert!(!tidy(&model).unwrap());
        drop(held);
        assert!(tidy(&model).unwrap());
        let mut left: Vec<_> =
            std::fs::read_dir(&model).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [LAST, "config.json", "model.safetensors"]);
        assert!(!tidy(&model).unwrap());
        for (name, files) in [(".out.partial", &all[..]), ("moved", &all[2..])] {
            let model = make(name, files);
            assert!(!tidy(&model).unwrap());
            assert_eq!(std::fs::read_dir(&model).unwrap().count(), files.len());
        }
    }
}
