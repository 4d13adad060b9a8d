//! Results of a comparison as plain data.

use mlx_format::Scheme;
use serde::{Deserialize, Serialize};

use super::{CompareSettings, Entry, Rankings};
use crate::Error;
use crate::Model;
use crate::data::{Pick, SourceInfo, Windows};
use crate::dynamic::Layer;

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
    /// Bits per weight, and the KL that dynamic is predicted to have at that size: the sum over layers of what each
    /// costs alone with searched scales. It shows how KL falls with size; compare it with measured ones by
    /// [`Entry::predicted_kl`], which is the same sum.
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

impl LayerSensitivity {
    pub(super) fn of(layer: &Layer, scheme: Scheme) -> Self {
        let cost = layer
            .costs
            .iter()
            .find(|cost| (cost.bits, cost.group_size) == (scheme.bits(), scheme.group_size()));
        Self { path: layer.path.clone(), kl: cost.map(|cost| cost.kl) }
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
