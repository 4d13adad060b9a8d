//! Names of what a run keeps in the directory that it writes.

/// The journal.
pub(super) const JOURNAL: &str = ".mlx-quant-run";
/// Names of files that a run keeps for its own continuation begin so.
pub(super) const STATE: &str = ".state-";
/// What is written last of all.
pub(super) const LAST: &str = "README.md";
