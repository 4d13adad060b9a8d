//! Writing a model directory in place, resumably.
//!
//! Everything is built in `.<name>.partial` beside the target: shards with their headers first, tensors at
//! their offsets in any order, small files last. [`Writer::finish`] syncs and renames once, so the final name
//! only ever names a whole model. A journal in the partial directory lists finished tensors; the same run
//! started again continues behind it.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use fs_err as fs;

use super::destination::{Destination, Replaceable, note_command, noted_command, settle};
use super::directory::Directory;
use super::journal::{Journal, clean, tidy, tidy_beside};
use super::layout::Layout;
use super::lock::{Lock, try_lock};
use super::records::{JOURNAL, STATE};
use super::run::{Run, Share, finished};
use super::write_error::{WriteError, is_full};

/// A model directory being written. Tensors are addressed by their index in the [`Layout`].
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    replaces: Option<Replaceable>,
    partial: PathBuf,
    layout: Layout,
    shards: Vec<fs::File>,
    journal: Journal,
    done: BTreeSet<usize>,
    /// The same by the engine that computed it, the one of this run last.
    shares: Vec<Share>,
    /// Whether an earlier run's work is in the partial directory.
    resumed: bool,
}

impl Writer {
    /// `.<name>.partial` beside `target`.
    ///
    /// # Errors
    /// If `target` has no name or its parent is no directory.
    pub fn partial_path(target: &Path) -> Result<PathBuf, WriteError> {
        let bad = || WriteError::BadPath(target.to_owned());
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(bad)?;
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !parent.is_dir() {
            return Err(bad());
        }
        Ok(parent.join(format!(".{name}.partial")))
    }

    /// Refuses a target that exists (unless it may be replaced), cannot be made or is being made, before any work. A finished model
    /// that a killed run left with files of its own in it is relieved of them.
    ///
    /// # Errors
    /// [`WriteError::Exists`], [`WriteError::NotReplaceable`], [`WriteError::BadPath`] or [`WriteError::Busy`].
    pub fn check_target<'d>(target: impl Into<Destination<'d>>) -> Result<(), WriteError> {
        let target: Destination<'_> = target.into();
        // What cannot be tidied exists all the same.
        let _ = tidy(target.path);
        let _ = match target.replaces {
            None => tidy_beside(target.path),
            // What is kept beside the old model is for the new one.
            Some(_) => settle(target.path),
        };
        check_place(&target)?;
        let partial = Self::partial_path(target.path)?;
        match std::fs::OpenOptions::new().write(true).open(partial.join(JOURNAL)) {
            Ok(journal) if try_lock(&journal)? == Lock::Busy => Err(WriteError::Busy(partial)),
            _ => Ok(()),
        }
    }

    /// Starts, or resumes if `.<name>.partial` holds the same run and its shards are as that run left them. Space for all
    /// shards is reserved at once where the file system can.
    ///
    /// # Errors
    /// [`WriteError`]; after [`WriteError::DiskFull`] nothing is left behind unless an earlier run was there.
    pub fn open<'d>(
        target: impl Into<Destination<'d>>,
        layout: Layout,
        run: impl Into<Run<'d>>,
    ) -> Result<Self, WriteError> {
        let (target, run): (Destination<'_>, Run<'_>) = (target.into(), run.into());
        Self::check_target(target)?;
        let partial = Self::partial_path(target.path)?;
        let unwritable = |error: std::io::Error| WriteError::Unwritable {
            path: partial.clone(),
            reason: error.to_string(),
        };
        let made = loop {
            match std::fs::create_dir(&partial) {
                Ok(()) => break true,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(unwritable(error)),
            }
            // A run's first file is its journal: it is looked for after files were seen, not before.
            let holds_files = match std::fs::read_dir(&partial) {
                Ok(mut entries) => entries.next().is_some(),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(unwritable(error)),
            };
            if !holds_files || partial.join(JOURNAL).is_file() {
                break false;
            }
            // Another process may be about to replace the output.
            let held = std::fs::OpenOptions::new().write(true).open(target.path.join(JOURNAL));
            if held.is_ok_and(|journal| try_lock(&journal).is_ok_and(|lock| lock == Lock::Busy)) {
                return Err(WriteError::Busy(partial));
            }
            if partial.is_dir() {
                return Err(WriteError::Foreign(partial));
            }
            // It has got its final name meanwhile.
            check_place(&target)?;
        };
        let mut journal = Journal::open(&partial)?;
        // Another process may have finished in the meantime.
        if let Err(error) = check_place(&target) {
            if made {
                fs::remove_dir_all(&partial)?;
            }
            return Err(error);
        }
        let mut shares = match journal.read(run, layout.specs().len(), &partial) {
            _ if target.restart => None,
            Err(WriteError::OtherRun { path, .. }) => {
                let command = noted_command(&path, target.command);
                return Err(WriteError::OtherRun { path, command });
            }
            read => read?,
        };
        shares = shares.filter(|_| layout.is_intact_in(&partial));
        let resumed = shares.is_some();
        let mut shares = shares.unwrap_or_default();
        if !resumed {
            journal.begin(run)?;
            shares.push(run.share());
        } else if run.follows(&shares, &target, &partial)? {
            journal.go_on(run)?;
            shares.push(run.share());
        }
        let done = shares.iter().flat_map(|share| &share.tensors).copied().collect();
        let (replaces, path) = (target.replaces, target.path.to_owned());
        let shards = Vec::new();
        let mut writer =
            Self { target: path, replaces, partial, layout, shards, journal, done, shares, resumed };
        writer.remove_all_but_shards()?;
        if !resumed {
            note_command(&writer.partial, target.command)?;
        }
        if let Err(error) = writer.open_shards() {
            if matches!(error, WriteError::DiskFull { .. }) {
                writer.discard_if_fresh()?;
            }
            return Err(error);
        }
        Ok(writer)
    }

    /// Small files of an earlier run: they are written again, or belong to it no more.
    fn remove_all_but_shards(&self) -> Result<(), WriteError> {
        let shards: BTreeSet<&str> = self.layout.shards().map(|(file, _)| file).collect();
        for entry in fs::read_dir(&self.partial)? {
            let entry = entry?;
            let kept = entry.file_name().to_str().is_some_and(|name| {
                let state = name.starts_with(STATE) && !name.ends_with(".partial");
                name == JOURNAL || shards.contains(name) || self.resumed && state
            });
            if !kept && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn open_shards(&mut self) -> Result<(), WriteError> {
        for shard in self.layout.shard_headers() {
            let path = self.partial.join(&shard.file);
            let file = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(!self.resumed)
                .open(&path)?;
            // Unsupported (some file systems, macOS) only means that a full disk is noticed later.
            if let Err(error) = reserve(file.file(), shard.bytes) {
                let error = std::io::Error::from(error);
                if is_full(&error) {
                    return Err(self.full(if self.resumed { ", which then resumes" } else { "" }));
                }
            }
            file.set_len(shard.bytes)?;
            file.file().write_all_at(&shard.header, 0)?;
            self.shards.push(file);
        }
        sync_directory(&self.partial)
    }

    fn full(&self, resumable: &'static str) -> WriteError {
        WriteError::DiskFull { path: self.partial.clone(), needed: self.layout.file_bytes(), resumable }
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the directory is being built.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// A file for what a run needs to continue after an interruption. An earlier run's is found there; it is
    /// removed when the directory gets its final name.
    pub fn state_path(&self, name: &str) -> PathBuf {
        self.partial.join(format!("{STATE}{name}"))
    }

    /// Forgets which tensors an earlier run finished: they will be written again.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn forget(&mut self, run: Run<'_>) -> Result<(), WriteError> {
        self.done.clear();
        self.shares = vec![run.share()];
        self.journal.begin(run)
    }

    /// What each engine has finished, the one of this run last.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// Whether other runs are kept out: not where the disk knows no locks.
    pub fn is_locked(&self) -> bool {
        self.journal.is_locked()
    }

    /// Indices of the tensors that an earlier run finished.
    pub fn done(&self) -> &BTreeSet<usize> {
        &self.done
    }

    /// Writes part of a tensor, `offset` bytes from its start; from any thread.
    ///
    /// # Errors
    /// [`WriteError`]; what was written before stays resumable.
    ///
    /// # Panics
    /// If the part does not lie within the tensor.
    pub fn write_at(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let place = self.layout.placement(index);
        assert!(
            offset + bytes.len() as u64 <= place.bytes,
            "write beyond {}",
            self.layout.specs()[index].name
        );
        self.shards[place.shard].file().write_all_at(bytes, place.offset + offset).map_err(|error| {
            if is_full(&error) {
                return self.full(", which then resumes");
            }
            let file = self.partial.join(&self.layout.shard_headers()[place.shard].file);
            WriteError::Io(format!("cannot write {}: {error}", file.display()))
        })
    }

    /// Writes tensor `to` as tensor `of` stands in the files now; both are of one dtype and shape.
    ///
    /// # Errors
    /// [`WriteError`]; what was written before stays resumable.
    ///
    /// # Panics
    /// If the tensors are of different lengths.
    pub fn repeat(&self, of: usize, to: usize) -> Result<(), WriteError> {
        const PART: u64 = 4 << 20;
        let from = self.layout.placement(of);
        assert_eq!(from.bytes, self.layout.placement(to).bytes, "tensors of one length");
        let mut part = Vec::new();
        for start in (0..from.bytes).step_by(PART as usize) {
            part.resize((from.bytes - start).min(PART) as usize, 0);
            self.shards[from.shard].file().read_exact_at(&mut part, from.offset + start)?;
            self.write_at(to, start, &part)?;
        }
        Ok(())
    }

    /// Records tensors as finished, so that a later run skips them. Their data reaches the disk first, so that
    /// the record also holds after a power failure.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn record(&mut self, indices: impl IntoIterator<Item = usize>) -> Result<(), WriteError> {
        let indices: Vec<usize> = indices.into_iter().collect();
        let touched: BTreeSet<usize> =
            indices.iter().map(|index| self.layout.placement(*index).shard).collect();
        for shard in touched {
            self.shards[shard].sync_data()?;
        }
        self.done.extend(&indices);
        finished(&mut self.shares, &indices);
        self.journal
            .add(&indices)
            .map_err(|error| if is_full(&error) { self.full(", which then resumes") } else { error.into() })
    }

    /// Writes a small file (config, model card).
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write_file(&self, name: &str, content: &[u8]) -> Result<(), WriteError> {
        self.make_file(name, |file| file.write_all(content))
    }

    /// Copies a file of a source directory under its own name.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn copy_file(&self, source: &Directory, name: &str) -> Result<(), WriteError> {
        self.make_file(name, |file| source.copy(name, file))
    }

    fn make_file(
        &self,
        name: &str,
        fill: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
    ) -> Result<(), WriteError> {
        super::directory::check_name(name, "output")
            .map_err(|_| WriteError::BadPath(self.partial.join(name)))?;
        let result = fs::File::create(self.partial.join(name)).and_then(|mut file| {
            fill(&mut file)?;
            file.sync_data()
        });
        result.map_err(|error| if is_full(&error) { self.full(", which then resumes") } else { error.into() })
    }

    /// Syncs everything and renames the directory to its final name. The lock is held until it has that name.
    ///
    /// # Errors
    /// [`WriteError`]; the partial directory then stays.
    pub fn finish(self) -> Result<(), WriteError> {
        for shard in &self.shards {
            shard.sync_data()?;
        }
        sync_directory(&self.partial)?;
        // The name is on the disk before anything is gone that could make the directory again. Who is killed from here on leaves
        // files in a finished model, which the next command that meets it removes.
        Destination { replaces: self.replaces, ..Destination::from(&self.target) }.place(&self.partial)?;
        Ok(clean(&self.target)?)
    }

    /// Removes what this run made, unless an earlier run's work is in it.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn discard_if_fresh(self) -> Result<(), WriteError> {
        if self.resumed {
            return Ok(());
        }
        for entry in fs::read_dir(&self.partial)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(fs::remove_dir(&self.partial)?)
    }
}

/// Refuses what is in the way, and a path that cannot be an output.
fn check_place(target: &Destination<'_>) -> Result<(), WriteError> {
    target.check()?;
    Writer::partial_path(target.path).map(|_| ())
}

fn sync_directory(path: &Path) -> Result<(), WriteError> {
    Ok(fs::File::open(path)?.sync_all()?)
}

/// Allocates the blocks of a file.
#[cfg(target_os = "linux")]
fn reserve(file: &std::fs::File, bytes: u64) -> Result<(), rustix::io::Errno> {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)
}

#[cfg(not(target_os = "linux"))]
fn reserve(_: &std::fs::File, _: u64) -> Result<(), rustix::io::Errno> {
    Ok(())
}

#[cfg(test)]
mod tests;
