//! Where a model is to lie, what may be in the way there, and how a finished directory gets that name.
//!
//! An existing output is replaced in one step: both directories exchange their names, so that the final name never
//! holds anything but a whole model, the old one or the new one. Then the old one goes, under a name that nobody enters.
//! Where the disk cannot exchange names, the old one waits as `.NAME.replaced` for the moment between two renames; killed
//! there, the next command that looks at the output puts it back.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::claimed::{parent, remove_under_another_name, sweep_gone};
use super::records::{JOURNAL, LAST, STATE};
use super::write_error::WriteError;

/// The file in which a run keeps the command that makes it.
const COMMAND: &str = "command";

/// Says whether a directory may be replaced, and otherwise why not.
pub type Replaceable = fn(&Path) -> Result<(), String>;

/// A command as a person would repeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Where it is typed; no line break.
    pub directory: String,
    /// What is typed, quoted for a shell; no line break.
    pub line: String,
}

/// Where a model is to lie, and what is done with what is there. A path alone stands for an output that must not exist,
/// and for an unfinished run that goes on.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'d> {
    /// The model's directory.
    pub path: &'d Path,
    /// An unfinished run begins anew, whatever it was.
    pub restart: bool,
    /// An unfinished run that another engine began goes on behind its finished blocks.
    pub restart_block: bool,
    /// An existing directory that this agrees to is replaced as soon as the new model is finished.
    pub replaces: Option<Replaceable>,
    /// How the run is repeated.
    pub command: Option<&'d Command>,
}

impl<'d> From<&'d Path> for Destination<'d> {
    fn from(path: &'d Path) -> Self {
        Self { path, restart: false, restart_block: false, replaces: None, command: None }
    }
}

impl<'d> From<&'d PathBuf> for Destination<'d> {
    fn from(path: &'d PathBuf) -> Self {
        Self::from(path.as_path())
    }
}

impl<'d> Destination<'d> {
    /// The same for another directory.
    #[must_use]
    pub fn at<'p>(&self, path: &'p Path) -> Destination<'p>
    where
        'd: 'p,
    {
        Destination { path, ..*self }
    }

    /// Refuses what is there, unless it may be replaced.
    ///
    /// # Errors
    /// [`WriteError::Exists`], [`WriteError::NotReplaceable`].
    pub(super) fn check(&self) -> Result<(), WriteError> {
        match (self.path.symlink_metadata(), self.replaces) {
            (Err(_), _) => Ok(()),
            (Ok(_), None) => Err(WriteError::Exists(self.path.to_owned())),
            (Ok(_), Some(check)) => check(self.path)
                .map_err(|reason| WriteError::NotReplaceable { path: self.path.to_owned(), reason }),
        }
    }

    /// Gives a finished directory its name, in the place of what may be replaced. [`super::Writer::finish`] does it;
    /// whoever keeps a finished model under a name of its own for a while calls it with that.
    ///
    /// # Errors
    /// As for a name that is taken, or [`WriteError::Io`].
    pub fn place(&self, finished: &Path) -> Result<(), WriteError> {
        self.place_by(finished, exchange)
    }

    fn place_by(
        &self,
        finished: &Path,
        exchange: fn(&Path, &Path) -> std::io::Result<()>,
    ) -> Result<(), WriteError> {
        self.check()?;
        if self.replaces.is_none() || self.path.symlink_metadata().is_err() {
            rename_to_new(finished, self.path)?;
            return sync(parent(self.path));
        }
        let old = if exchange(finished, self.path).is_ok() {
            finished.to_owned()
        } else {
            let aside = replaced(self.path);
            fs::rename(self.path, &aside)?;
            if let Err(error) = rename_to_new(finished, self.path) {
                rename_to_new(&aside, self.path)?;
                return Err(error);
            }
            aside
        };
        // The new name is on the disk before the old model goes.
        sync(parent(self.path))?;
        Ok(remove_under_another_name(&old, self.path)?)
    }
}

/// `.NAME.replaced`.
fn replaced(target: &Path) -> PathBuf {
    target.with_file_name(format!(".{}.replaced", target.file_name().unwrap_or_default().to_string_lossy()))
}

/// Ends what a process that was killed while it replaced `target` had begun: an old model whose place is empty gets it
/// back, and one that was replaced goes.
pub(super) fn settle(target: &Path) -> std::io::Result<()> {
    sweep_gone(target);
    let aside = replaced(target);
    if !aside.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    if target.symlink_metadata().is_ok() {
        return remove_under_another_name(&aside, target);
    }
    rename_to_new(&aside, target).map_err(|error| std::io::Error::other(error.to_string()))
}

/// Removes the model that stands in the place of an unfinished one, because the finished one has taken its name.
pub(super) fn remove_replaced(target: &Path, partial: &Path) -> std::io::Result<()> {
    let is_model = ["config.json", LAST].iter().all(|file| partial.join(file).is_file());
    if is_model && !partial.join(JOURNAL).exists() {
        return remove_under_another_name(partial, target);
    }
    Ok(())
}

/// Writes down by which command an unfinished run is repeated.
pub(super) fn note_command(partial: &Path, command: Option<&Command>) -> std::io::Result<()> {
    let Some(Command { directory, line }) = command else { return Ok(()) };
    fs::write(partial.join(format!("{STATE}{COMMAND}")), format!("{directory}\n{line}\n"))
}

/// The command that makes the unfinished run in `partial`, as one line for a shell in the directory of `here`.
pub(super) fn noted_command(partial: &Path, here: Option<&Command>) -> Option<String> {
    let text = std::fs::read_to_string(partial.join(format!("{STATE}{COMMAND}"))).ok()?;
    let (directory, line) = text.strip_suffix('\n')?.split_once('\n')?;
    if here.is_some_and(|here| here.directory == directory) {
        return Some(line.to_owned());
    }
    Some(format!("cd '{}' && {line}", directory.replace('\'', r"'\''")))
}

/// Renames a directory to a name that must not exist.
fn rename_to_new(from: &Path, to: &Path) -> Result<(), WriteError> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::EXIST) => return Err(WriteError::Exists(to.to_owned())),
            // Not every file system can refuse to replace; the target was checked a moment ago.
            Err(_) => {}
        }
    }
    Ok(fs::rename(from, to)?)
}

/// Lets two directories exchange their names.
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

fn sync(path: &Path) -> Result<(), WriteError> {
    Ok(fs::File::open(path)?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let name =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = std::fs::read_dir(directory).unwrap().map(name).collect();
        names.sort();
        names
    }

    fn directory_of(path: &Path, text: &str) {
        std::fs::create_dir(path).unwrap();
        std::fs::write(path.join("config.json"), text).unwrap();
        std::fs::write(path.join(LAST), text).unwrap();
    }

    fn text(path: &Path) -> String {
        std::fs::read_to_string(path.join("config.json")).unwrap()
    }

    const CANNOT: fn(&Path, &Path) -> std::io::Result<()> =
        |_, _| Err(std::io::ErrorKind::Unsupported.into());

    #[test]
    fn an_old_model_is_replaced_whatever_the_disk_can() {
        for exchange in [exchange, CANNOT] {
            let directory = tempfile::tempdir().unwrap();
            let (old, new) = (directory.path().join("out"), directory.path().join(".out.partial"));
            directory_of(&old, "old");
            directory_of(&new, "new");
            let whoever = Destination { replaces: Some(|_| Ok(())), ..Destination::from(&old) };
            whoever.place_by(&new, exchange).unwrap();
            assert_eq!((text(&old).as_str(), names(directory.path())), ("new", vec!["out".to_owned()]));
        }
    }

    #[test]
    fn what_may_not_be_replaced_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("out"), directory.path().join(".out.partial"));
        directory_of(&old, "old");
        directory_of(&new, "new");
        let nothing = Destination::from(&old);
        assert!(matches!(nothing.place(&new), Err(WriteError::Exists(_))));
        let never = Destination { replaces: Some(|_| Err("it is mine".to_owned())), ..nothing };
        let error = never.place(&new).unwrap_err();
        assert!(
            matches!(&error, WriteError::NotReplaceable { .. }) && error.to_string().contains("it is mine")
        );
        assert_eq!((text(&old).as_str(), text(&new).as_str()), ("old", "new"));
    }

    #[test]
    fn a_killed_replacement_loses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        // Between two renames, where names cannot be exchanged.
        directory_of(&at(".out.replaced"), "old");
        settle(&at("out")).unwrap();
        assert_eq!((text(&at("out")).as_str(), names(directory.path())), ("old", vec!["out".to_owned()]));
        // After the second one.
        directory_of(&at(".out.replaced"), "older");
        settle(&at("out")).unwrap();
        assert_eq!((text(&at("out")).as_str(), names(directory.path())), ("old", vec!["out".to_owned()]));
        // After an exchange. An unfinished run has its journal, and stays.
        directory_of(&at(".out.partial"), "older");
        std::fs::write(at(".out.partial").join(JOURNAL), "x").unwrap();
        remove_replaced(&at("out"), &at(".out.partial")).unwrap();
        assert!(at(".out.partial").exists());
        std::fs::remove_file(at(".out.partial").join(JOURNAL)).unwrap();
        remove_replaced(&at("out"), &at(".out.partial")).unwrap();
        assert_eq!(names(directory.path()), ["out"]);
    }

    #[test]
    fn commands_can_be_pasted_anywhere() {
        let directory = tempfile::tempdir().unwrap();
        let command = Command { directory: "/it's/here".to_owned(), line: "mlx-quant gptq".to_owned() };
        assert_eq!(noted_command(directory.path(), None), None);
        note_command(directory.path(), Some(&command)).unwrap();
        assert_eq!(noted_command(directory.path(), Some(&command)).unwrap(), "mlx-quant gptq");
        let other = r"cd '/it'\''s/here' && mlx-quant gptq";
        assert_eq!(noted_command(directory.path(), None).unwrap(), other);
    }
}
