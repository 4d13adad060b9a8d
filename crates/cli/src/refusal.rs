//! Command lines that were parsed but cannot be followed.

use mlx_quant::recipes::{Setting, SettingError};

/// A command line that was parsed but cannot be followed.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) String);

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
            Setting::Temperature => "--temperature",
            Setting::LearningRate => "--learning-rate",
            Setting::ValidationWindows => "--valid-samples",
            Setting::MinBits => "--min-bits",
            Setting::MaxBits => "--max-bits",
            Setting::Device => "--device",
            _ => return Self(error.to_string()),
        };
        Self(error.named(flag))
    }
}
