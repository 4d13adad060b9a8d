//! What makes a run the same run: the line by which an unfinished one is recognised, and the engine beside it.

use std::fmt::Write as _;

use mlx_format::checkpoint::Run;
use sha2::{Digest as _, Sha256};

use super::QuantizeSettings;
use crate::convert::fingerprint;
use crate::data::{Windows, hexadecimal};
use crate::device::{ALGORITHM, engine};
use crate::dwq::DwqSettings;
use crate::plan::Plan;
use crate::{Error, Model};

/// What decides bytes.
#[derive(Debug)]
pub(super) struct RunLine {
    /// A line that stands for the source and all settings.
    pub(super) identity: String,
    /// What computes.
    engine: String,
}

impl RunLine {
    pub(super) fn run(&self) -> Run<'_> {
        Run { identity: &self.identity, engine: &self.engine }
    }
}

/// The run that these make.
pub(super) fn run_line(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
) -> Result<RunLine, Error> {
    let mut line = fingerprint(model, plan)?;
    let all = format!(
        "{} {:?} {} algorithm {ALGORITHM}",
        settings.recipe,
        settings.method,
        settings.statistics.is_some()
    );
    let _ = write!(line, " {} ", all.replace('\n', " "));
    let mut hash = Sha256::new();
    if settings.recipe.learns() {
        hash.update(format!("{:?}", settings.learn));
    }
    if settings.recipe.trains() {
        let own =
            DwqSettings { target_dir: None, teacher_states: None, save_seconds: 0, ..settings.dwq.clone() };
        hash.update(format!("{own:?} {}", settings.dwq.target_dir.is_some()));
        for windows in settings.lessons.iter().flat_map(|(training, held_out)| [training, held_out]) {
            hash.update(windows.tokens_hash());
        }
    }
    for (path, weights) in &settings.columns {
        hash.update(path);
        for weight in weights {
            hash.update(weight.to_le_bytes());
        }
    }
    hash.update(windows.tokens_hash());
    hash.update(windows.sequence_length.to_le_bytes());
    line.push_str(&hexadecimal(&hash.finalize()));
    Ok(RunLine { identity: line, engine: engine(&model.device) })
}
