//! Why an output could not be written.

use std::path::PathBuf;

/// Writing failed; messages name the path.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output exists.
    #[error(
        "{0} already exists; hint: choose another --mlx-path, or replace it with --overwrite once the new model is finished"
    )]
    Exists(PathBuf),
    /// The output exists, and is not to be replaced.
    #[error("{path} is not replaced: {reason}; hint: choose another --mlx-path, or move it away yourself")]
    NotReplaceable {
        /// The output.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// The output path has no file name or no parent directory.
    #[error("{0} cannot be an output directory; hint: give a path whose parent directory exists")]
    BadPath(PathBuf),
    /// An unfinished run with other settings or another source.
    #[error(
        "{path} holds an unfinished run with other settings or another source; hint: begin anew with --restart, or repeat that run to go on with it{}",
        command.as_ref().map_or_else(String::new, |command| format!(": {command}"))
    )]
    OtherRun {
        /// Partial directory.
        path: PathBuf,
        /// The command that made it, where that is known.
        command: Option<String>,
    },
    /// The same run, begun by another engine.
    #[error(
        "{path} holds this run as it was begun by {begun}, and now {engine} would compute; hint: go on behind its finished blocks with --restart-block, begin anew with --restart, or repeat that run{}",
        command.as_ref().map_or_else(String::new, |command| format!(": {command}"))
    )]
    OtherEngine {
        /// Partial directory.
        path: PathBuf,
        /// What computed so far.
        begun: String,
        /// What would compute now.
        engine: String,
        /// The command that began it, where that is known.
        command: Option<String>,
    },
    /// A partial directory that no run of ours made.
    #[error("{0} is in the way: it holds files but no unfinished run; hint: move or delete it")]
    Foreign(PathBuf),
    /// Another process holds the partial directory.
    #[error("{0} is being written by another process; hint: wait for it, or choose another --mlx-path")]
    Busy(PathBuf),
    /// The partial directory cannot be made.
    #[error(
        "cannot write beside the output, {path}: {reason}; hint: choose an --mlx-path in a directory you may write"
    )]
    Unwritable {
        /// Partial directory.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// No space.
    #[error(
        "the disk of {path} is full: {needed} bytes are needed in all; hint: free some space and repeat the command{resumable}"
    )]
    DiskFull {
        /// Partial directory.
        path: PathBuf,
        /// Size of the whole output.
        needed: u64,
        /// Whether the unfinished run was kept.
        resumable: &'static str,
    },
    /// Any other operating system error; its message names the path.
    #[error("{0}; hint: repeat the command to go on where it stopped")]
    Io(String),
}

impl From<std::io::Error> for WriteError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

/// Whether the system says that there is no space left.
pub(super) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
