//! Which run it is that writes an output, and what each engine has finished of it.
//!
//! A run is known by a line that stands for its source and all settings. What computes it is kept beside that: an engine
//! decides bits as settings do, but somebody may want to go on with what another engine has finished.

use std::collections::BTreeSet;
use std::path::Path;

use super::destination::{Destination, noted_command};
use super::write_error::WriteError;

/// Between the identity of a run and its engine, and in front of an engine that went on with it.
const COMPUTED_BY: &str = " computed by ";

/// A run, in words. A line alone stands for a run that computes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'r> {
    /// A line that stands for the source and all settings.
    pub identity: &'r str,
    /// What computes; one line, empty where nothing is computed.
    pub engine: &'r str,
}

impl<'r> From<&'r str> for Run<'r> {
    fn from(identity: &'r str) -> Self {
        Self { identity, engine: "" }
    }
}

/// Tensors that one engine has finished.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// What computed them.
    pub engine: String,
    /// Their indices in the layout.
    pub tensors: BTreeSet<usize>,
}

impl Run<'_> {
    /// The line by which a journal knows it.
    pub(super) fn line(&self) -> String {
        match self.engine {
            "" => self.identity.to_owned(),
            engine => format!("{}{COMPUTED_BY}{engine}", self.identity),
        }
    }

    /// The line in a journal from which on this engine finishes tensors.
    pub(super) fn next_line(&self) -> String {
        format!("{}{}", COMPUTED_BY.trim_start(), self.engine)
    }

    /// The engine of a journal's first line, if the line is of this run.
    pub(super) fn engine_of<'l>(&self, line: &'l str) -> Option<&'l str> {
        match line.strip_prefix(self.identity)? {
            "" => Some(""),
            rest => rest.strip_prefix(COMPUTED_BY),
        }
    }

    /// Nothing yet, by its engine.
    pub(super) fn share(&self) -> Share {
        Share { engine: self.engine.to_owned(), tensors: BTreeSet::new() }
    }

    /// Whether what a run left was computed by another engine, with which `target` agrees to go on.
    ///
    /// # Errors
    /// [`WriteError::OtherEngine`] where it does not agree.
    pub(super) fn follows(
        &self,
        left: &[Share],
        target: &Destination<'_>,
        partial: &Path,
    ) -> Result<bool, WriteError> {
        match left.last() {
            Some(last) if last.engine != self.engine && !target.restart_block => {
                Err(WriteError::OtherEngine {
                    path: partial.to_owned(),
                    begun: last.engine.clone(),
                    engine: self.engine.to_owned(),
                    command: noted_command(partial, target.command),
                })
            }
            last => Ok(last.is_some_and(|last| last.engine != self.engine)),
        }
    }
}

/// Notes that the last engine has finished tensors. What another one had made of them is not there any more.
pub(super) fn finished(shares: &mut [Share], tensors: &[usize]) {
    let Some((own, before)) = shares.split_last_mut() else { return };
    for tensor in tensors {
        for share in &mut *before {
            share.tensors.remove(tensor);
        }
        own.tensors.insert(*tensor);
    }
}

/// The engine of a line as [`Run::next_line`] writes it.
pub(super) fn next_engine(line: &str) -> Option<&str> {
    line.strip_prefix(COMPUTED_BY.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_run_and_engine() {
        let run = Run { identity: "mlx-quant x", engine: "cpu v4" };
        assert_eq!(run.engine_of(&run.line()), Some("cpu v4"));
        assert_eq!(run.engine_of("mlx-quant x computed by gpu 1"), Some("gpu 1"));
        assert_eq!(run.engine_of("mlx-quant x"), Some(""));
        for other in ["mlx-quant xy", "mlx-quant xy computed by cpu v4", "mlx-quant", ""] {
            assert_eq!(run.engine_of(other), None, "{other}");
        }
        assert_eq!(next_engine(&run.next_line()), Some("cpu v4"));
        assert_eq!(next_engine("17"), None);
        assert_eq!(Run::from("x").line(), "x");
    }
}
