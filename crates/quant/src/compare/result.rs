//! Results of a comparison as plain data.

use mlx_format::Scheme;
use serde::{Deserialize, Serialize};

use super::{CompareSettings, Keep, Rankings};
use crate::Error;
use crate::Model;
use crate::data::{Pick, SourceInfo, Windows};
use crate::dwq::Distilled;
use crate::dynamic::Layer;
use crate::evaluate::{Against, Evaluation};
use crate::observer::Event;
use crate::plan::{Job, Plan};

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
    /// Stored bits per weight, as mlx-lm counts them.
    pub bits_per_weight: f64,
    /// Of all safetensors files.
    pub bytes: u64,
    /// Wall time of quantizing and writing, what it shares with other methods included.
    pub seconds: f64,
    /// Whether it was interrupted; its seconds are those of the last part then.
    pub resumed: bool,
    /// Largest resident memory while it was made, bytes.
    pub peak_memory: Option<u64>,
    /// Of dynamic, before anything was written.
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

/// What one layer costs at the scheme of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSensitivity {
    /// Module path.
    pub path: String,
    /// Nats a token by which the model would diverge if this layer alone were stored so; `None` if the scheme does not fit it.
    pub kl: Option<f64>,
}

/// Methods side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Of this program.
    pub version: String,
    /// Directory or name of the model.
    pub model: String,
    /// From config.json.
    pub model_type: String,
    /// Weights, as mlx-lm counts them.
    pub parameters: u64,
    /// Bytes of the model that was quantized.
    pub model_bytes: u64,
    /// Its perplexity on the held-out text.
    pub reference_perplexity: f64,
    /// Instruction set that computed it.
    pub kernels: String,
    /// Calibration text.
    pub calibration: Text,
    /// Text on which everything was measured.
    pub held_out: Text,
    /// Windows that dwq trained on, and steps.
    pub training: (usize, usize),
    /// In the order in which they ran.
    pub entries: Vec<Entry>,
    /// Their order.
    pub rankings: Rankings,
    /// What layers cost, if it was measured.
    pub sensitivities: Vec<LayerSensitivity>,
    /// Bits per weight and KL that dynamic is predicted to have at other sizes.
    pub predicted: Vec<(f64, f64)>,
    /// Wall time of all runs that made something and came to an end.
    pub seconds: f64,
}

/// Text that was used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Text {
    /// Tokens a window.
    pub sequence_length: usize,
    /// Windows.
    pub windows: usize,
    /// How they were picked.
    pub pick: Pick,
    /// SHA-256 over all tokens.
    pub data_hash: String,
    /// Files.
    pub sources: Vec<SourceInfo>,
}

impl Text {
    fn of(windows: &Windows) -> Self {
        Self {
            sequence_length: windows.sequence_length,
            windows: windows.picked.len(),
            pick: windows.pick,
            data_hash: windows.data_hash.clone(),
            sources: windows.sources.clone(),
        }
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

impl LayerSensitivity {
    pub(super) fn of(layer: &Layer, scheme: Scheme) -> Self {
        let cost = layer
            .costs
            .iter()
            .find(|cost| (cost.bits, cost.group_size) == (scheme.bits(), scheme.group_size()));
        Self { path: layer.path.clone(), kl: cost.map(|cost| cost.kl) }
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

impl Comparison {
    pub(super) fn new(model: &Model, settings: &CompareSettings, entries: Vec<Entry>) -> Result<Self, Error> {
        let inspection = crate::inspect::inspect(model)?;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: model.name(),
            model_type: model.config.model_type().unwrap_or_default().to_owned(),
            parameters: inspection.parameters,
            model_bytes: inspection.file_bytes,
            reference_perplexity: entries.first().map_or(0.0, |entry| entry.against().reference_perplexity),
            kernels: mlx_format::simd_name().to_owned(),
            calibration: Text::of(&settings.calibration),
            held_out: Text::of(&settings.held_out),
            training: (settings.lessons.0.picked.len(), settings.dwq.iterations),
            rankings: Rankings::of(&entries),
            entries,
            sensitivities: Vec::new(),
            predicted: Vec::new(),
            seconds: 0.0,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

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
            predicted_kl: None,
            evaluation,
            layers: Vec::new(),
            distilled: None,
            keep: Keep::Best,
            model: None,
        }
    }
}
