//! Directories above an output.

use std::path::{Path, PathBuf};

use crate::refusal::Refusal;

/// The directories above an output that a command made for it. They go with this if nothing was put into them: a command that is
/// refused leaves nothing.
pub(crate) struct Parents(Vec<PathBuf>);

impl Parents {
    /// Makes what is missing above `target`; nothing where a plan is only shown.
    pub(crate) fn of(target: &Path, only_plan: bool) -> Result<Self, Refusal> {
        let mut made = Self(Vec::new());
        if only_plan {
            return Ok(made);
        }
        let above = target.ancestors().skip(1).take_while(|above| !above.as_os_str().is_empty());
        let missing: Vec<&Path> = above.take_while(|above| above.symlink_metadata().is_err()).collect();
        for directory in missing.into_iter().rev() {
            match std::fs::create_dir(directory) {
                Ok(()) => made.0.push(directory.to_owned()),
                // Another process was quicker.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let directory = directory.display();
                    return Err(Refusal(format!(
                        "{directory} cannot be made: {error}; hint: choose an output where you may write"
                    )));
                }
            }
        }
        Ok(made)
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            // The system refuses where something is in it.
            if std::fs::remove_dir(directory).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use super::*;

    #[test]
    fn what_stays_empty_goes() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a/b/out");
        drop(Parents::of(&target, true).unwrap());
        assert!(!directory.path().join("a").exists());
        let made = Parents::of(&target, false).unwrap();
        assert!(directory.path().join("a/b").is_dir());
        drop(made);
        assert!(!directory.path().join("a").exists());
        let made = Parents::of(&target, false).unwrap();
        std::fs::create_dir(&target).unwrap();
        drop(made);
        assert!(target.is_dir());
        // What was there before is not touched.
        std::fs::remove_dir(&target).unwrap();
        drop(Parents::of(&target, false).unwrap());
        assert!(directory.path().join("a/b").is_dir());
    }

    #[test]
    fn a_file_above_is_told() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "x").unwrap();
        let refused = Parents::of(&directory.path().join("file/below/out"), false).err().unwrap();
        assert!(refused.0.contains("below cannot be made") && refused.0.contains("; hint: "), "{refused}");
    }
}
