//! How methods are compared.

use serde::{Deserialize, Serialize};

use super::Contestant;
use crate::data::Windows;
use crate::dwq::DwqSettings;
use crate::learn::LearnSettings;
use crate::methods::MethodSettings;
use crate::session::QuantizeSettings;

/// Which of the made models stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Of each width the one with the lowest divergence.
    #[default]
    Best,
    /// All.
    All,
    /// None.
    None,
}

/// How methods are compared.
#[derive(Clone, Debug)]
pub struct CompareSettings {
    /// The methods, in the order in which they run.
    pub contestants: Vec<Contestant>,
    /// Calibration windows of all of them.
    pub calibration: Windows,
    /// Windows that dwq trains on, and windows on which it judges its steps.
    pub lessons: (Windows, Windows),
    /// Held-out windows on which everything is measured; no method has seen them.
    pub held_out: Windows,
    /// Figures of the methods.
    pub method: MethodSettings,
    /// Of dwq.
    pub dwq: DwqSettings,
    /// Of learn.
    pub learn: LearnSettings,
    /// Seed of sensitivities' labels.
    pub seed: u64,
    /// Threads, 0 for one per core; no result depends on it.
    pub threads: usize,
    /// As [`QuantizeSettings::low_memory`].
    pub low_memory: bool,
    /// All methods take one set of Gram matrices, of the full-precision model: less time, and sites do not see what was quantized
    /// before them, so that results are a little worse than those of the single commands.
    pub shared_statistics: bool,
    /// Which models stay.
    pub keep: Keep,
    /// A comparison that is in the directory already, whatever it is of, is forgotten with the models that it made.
    pub restart: bool,
}

impl CompareSettings {
    /// How a method is carried out, as by its own command.
    pub(super) fn how(&self, contestant: &Contestant) -> QuantizeSettings {
        QuantizeSettings {
            method: self.method.clone(),
            threads: self.threads,
            low_memory: self.low_memory,
            learn: self.learn.clone(),
            dwq: self.dwq.clone(),
            lessons: contestant.recipe.trains().then(|| self.lessons.clone()),
            evaluate: Some(self.held_out.clone()),
            ..QuantizeSettings::new(contestant.recipe.clone())
        }
    }
}
