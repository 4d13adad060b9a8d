//! What one method made, as plain data.

use serde::{Deserialize, Serialize};

use super::{CompareSettings, Keep};
use crate::device::Device;
use crate::dwq::Distilled;
use crate::evaluate::{Against, Evaluation};
use crate::observer::Event;
use crate::plan::{Job, Plan};
use crate::recipes::processor;
use crate::threads::threads_or_all;

/// How a layer is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerBits {
    /// Module path.
    pub path: String,
    /// Bits a code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group_size: usize,
    /// Codes, scales and biases.
    pub bytes: u64,
}

/// What a time belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeOn {
    /// Processor, as the system calls it; `None` where it does not say.
    pub processor: Option<String>,
    /// Threads that worked.
    pub threads: usize,
    /// Engine and instruction set.
    pub engine: String,
}

/// What a method made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Of the method, as in [`super::Contestant::name`].
    pub name: String,
    /// As the command line takes it.
    pub recipe: String,
    /// Of the scheme that decides the size.
    pub bits: u32,
    /// Of the scheme that decides the size.
    pub group_size: usize,
    /// Stored bits per weight of the language model, as mlx-lm counts them.
    pub bits_per_weight: f64,
    /// Of all safetensors files.
    pub bytes: u64,
    /// Wall time of quantizing and writing, what it shares with other methods included.
    pub seconds: f64,
    /// Whether it was interrupted; its seconds are those of the last part then.
    pub resumed: bool,
    /// Largest resident memory while it was made, bytes.
    pub peak_memory: Option<u64>,
    /// Where it was made, with how many threads.
    pub made_on: MadeOn,
    /// Of dynamic, before anything was written: the sum over layers of what each costs alone with searched scales. What
    /// is measured differs, because layers act together and because the recipe may round better than that.
    pub predicted_kl: Option<f64>,
    /// The written files on held-out text, against the model that they were made from.
    pub evaluation: Evaluation,
    /// Every quantized layer.
    pub layers: Vec<LayerBits>,
    /// Of dwq.
    pub distilled: Option<Distilled>,
    /// Which models were to stay when it was made.
    pub keep: Keep,
    /// Where the model lies, if it was kept.
    pub model: Option<String>,
}

impl MadeOn {
    /// This machine.
    pub(super) fn here(settings: &CompareSettings, device: &Device) -> Self {
        Self { processor: processor(), threads: threads_or_all(settings.threads), engine: device.name() }
    }
}

impl LayerBits {
    pub(super) fn of(plan: &Plan) -> Vec<Self> {
        let report = plan.report();
        let layers = plan.items.iter().zip(report.layers).filter_map(|(item, layer)| match &item.job {
            Job::Quantize { scheme, .. } => Some(Self {
                path: item.name.clone(),
                bits: scheme.bits(),
                group_size: scheme.group_size(),
                bytes: layer.bytes,
            }),
            _ => None,
        });
        layers.collect()
    }
}

impl Entry {
    /// Against the reference.
    pub fn against(&self) -> Against {
        self.evaluation.total.against.clone().unwrap_or_default()
    }

    /// Mean KL(reference || model), nats a token.
    pub fn kl(&self) -> f64 {
        self.evaluation.total.against.as_ref().map_or(f64::INFINITY, |against| against.kl_mean)
    }
}

impl Entry {
    /// What is told of it at once.
    pub(super) fn done(&self, known: bool) -> Event<'_> {
        Event::ContestantDone {
            name: &self.name,
            kl: self.kl(),
            kl_stderr: self.against().kl_stderr,
            bits_per_weight: self.bits_per_weight,
            bytes: self.bytes,
            seconds: self.seconds,
            peak_memory: self.peak_memory,
            known,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::Pick;

    /// A result with these means of windows.
    pub(in crate::compare) fn entry(
        name: &str,
        recipe: &str,
        bits_per_weight: f64,
        seconds: f64,
        windows: &[f64],
    ) -> Entry {
        let against = Against {
            kl_mean: windows.iter().sum::<f64>() / windows.len() as f64,
            kl_by_window: windows.to_vec(),
            ..Against::default()
        };
        let total = crate::evaluate::Measures {
            windows: windows.len(),
            against: Some(against),
            ..crate::evaluate::Measures::default()
        };
        let evaluation = Evaluation {
            subject: crate::evaluate::Subject::default(),
            total,
            by_source: Vec::new(),
            sequence_length: 8,
            data_hash: String::new(),
            pick: Pick::EvenlySpaced { windows: windows.len() },
            sources: Vec::new(),
        };
        Entry {
            name: name.to_owned(),
            recipe: recipe.to_owned(),
            bits: bits_per_weight as u32,
            group_size: 64,
            bits_per_weight,
            bytes: 1000,
            seconds,
            resumed: false,
            peak_memory: None,
            made_on: MadeOn::default(),
            predicted_kl: None,
            evaluation,
            layers: Vec::new(),
            distilled: None,
            keep: Keep::Best,
            model: None,
        }
    }
}
