//! Command lines that were parsed but cannot be followed, and the exit codes of all that ends a command.

use mlx_quant::recipes::{Setting, SettingError};

use crate::typed::typed;

/// Refused before any work.
pub(crate) const REFUSED: u8 = 2;
/// Failed while working.
const FAILED: u8 = 1;
/// Interrupted, resumable.
pub(crate) const INTERRUPTED: u8 = 130;

/// A command line that was parsed but cannot be followed.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) String);

#[cfg(not(feature = "hub"))]
impl Refusal {
    /// Something needs the hub, which this build has not; `instead` is what to do without it.
    pub(crate) fn no_hub(what: &str, instead: &str) -> Self {
        Self(format!(
            "{what}, and this build does not know the hub; hint: {instead}, or build with `--all-features` (docs/hub.md)"
        ))
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

impl From<SettingError> for Refusal {
    /// The library's words, with the name of the flag.
    fn from(error: SettingError) -> Self {
        let flag = match error.setting {
            Setting::Damping => "--damping",
            Setting::Correction => "--correction",
            Setting::Temperature => "--temperature",
            Setting::LearningRate => "--learning-rate",
            Setting::ValidationWindows => "--valid-samples",
            Setting::MinBits => "--min-bits",
            Setting::MaxBits => "--max-bits",
            Setting::Device => "--device",
            Setting::Precision => "--precision",
            _ => return Self(error.to_string()),
        };
        Self(error.named(flag))
    }
}

/// An interruption, with the command that goes on.
pub(crate) fn interrupted() -> anyhow::Error {
    anyhow::anyhow!("interrupted; hint: this goes on where it stopped: {}", typed().line)
}

/// What the process ends with after an error.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<mlx_quant::Error>() {
        Some(mlx_quant::Error::Interrupted) => INTERRUPTED,
        Some(error) if error.is_refusal() => REFUSED,
        None if error.is::<Refusal>() => REFUSED,
        _ => FAILED,
    }
}
