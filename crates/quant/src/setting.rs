//! Settings that cannot be, by the names that they have in the library.
//!
//! A front end calls a setting by its own name (`--valid-samples`, `valid_samples=`): [`SettingError::named`] says the
//! same with that.

use std::borrow::Cow;
use std::fmt;

/// A setting that is checked before any work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Setting {
    /// [`crate::methods::MethodSettings::damping`].
    Damping,
    /// [`crate::methods::MethodSettings::correction`].
    Correction,
    /// [`crate::dwq::DwqSettings::temperature`].
    Temperature,
    /// [`crate::dwq::DwqSettings::learning_rate`].
    LearningRate,
    /// Windows on which the steps of a training are judged.
    ValidationWindows,
    /// [`crate::dynamic::DynamicSettings::min_bits`].
    MinBits,
    /// [`crate::dynamic::DynamicSettings::max_bits`].
    MaxBits,
    /// [`crate::recipes::DeviceChoice`].
    Device,
    /// [`crate::recipes::Precision`].
    Precision,
}

impl Setting {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Damping => "damping",
            Self::Correction => "correction",
            Self::Temperature => "temperature",
            Self::LearningRate => "learning rate",
            Self::ValidationWindows => "validation windows",
            Self::MinBits => "fewest bits",
            Self::MaxBits => "most bits",
            Self::Device => "device",
            Self::Precision => "precision",
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A setting with a value that it cannot have; found before any work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.named(self.setting.name()))]
pub struct SettingError {
    /// Which one.
    pub setting: Setting,
    /// What it was given.
    pub value: String,
    /// What is wrong with that, as the rest of a sentence: "is out of range".
    pub problem: String,
    /// What to give instead.
    pub hint: Cow<'static, str>,
}

impl SettingError {
    /// A value outside of what a setting takes.
    pub(crate) fn out_of_range(setting: Setting, value: impl fmt::Display, hint: &'static str) -> Self {
        Self { setting, value: value.to_string(), problem: "is out of range".to_owned(), hint: hint.into() }
    }

    /// The message, with the name that a front end has for the setting.
    pub fn named(&self, name: &str) -> String {
        format!("{name} {} {}; hint: {}", self.value, self.problem, self.hint)
    }
}
