//! A plan as plain data, for `--dry-run` and `--json`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{DrafterPlan, Job, Plan, Towers};

/// One layer or tensor of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// Module path or tensor name.
    pub name: String,
    /// Shape of the weight, unpacked.
    pub shape: Vec<usize>,
    /// `4 bits, group size 64`, `mxfp4`, or the dtype of what is not quantized.
    pub scheme: String,
    /// Bytes in the output, scales and biases included.
    pub bytes: u64,
}

/// A planned drafter as plain data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DrafterReport {
    /// Its own `model_type`, by which mlx-vlm knows it.
    pub model_type: String,
    /// Tensors in its file.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: u64,
    /// Stored bits per weight.
    pub bits_per_weight: f64,
    /// Bytes of all its safetensors files.
    pub output_bytes: u64,
}

/// What a plan will do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// `model_type` of the source.
    pub model_type: String,
    /// Family whose description is used.
    pub family: &'static str,
    /// Whether the model type is described (else: by tensor names).
    pub described: bool,
    /// Number of weights.
    pub parameters: u64,
    /// Stored bits per weight.
    pub bits_per_weight: f64,
    /// The parts that see and hear, where there are any; they are in all sums.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub towers: Option<Towers>,
    /// The model of multi-token-prediction heads that is written beside it, where that is asked for; it is in no sum.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drafter: Option<DrafterReport>,
    /// Bytes read.
    pub input_bytes: u64,
    /// Bytes of all safetensors files written.
    pub output_bytes: u64,
    /// Output files and their bytes.
    pub files: Vec<(String, u64)>,
    /// Number of layers by scheme.
    pub schemes: BTreeMap<String, usize>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Every layer and tensor.
    pub layers: Vec<LayerReport>,
}

impl Plan {
    /// The plan as data.
    pub fn report(&self) -> PlanReport {
        let mut layers = Vec::new();
        let mut schemes = BTreeMap::new();
        for (index, item) in self.items.iter().enumerate() {
            let end = self.items.get(index + 1).map_or(self.layout.specs().len(), |next| next.first_output);
            let specs = &self.layout.specs()[item.first_output..end];
            let (shape, scheme) = match &item.job {
                Job::Quantize { view, scheme, .. } => (view.shape(), scheme.to_string()),
                Job::Copy { .. } | Job::Dequantize { .. } | Job::Repeat { .. } => {
                    (specs[0].shape.clone(), specs[0].dtype.to_string())
                }
            };
            let bytes = specs.iter().map(mlx_format::checkpoint::TensorSpec::bytes).sum();
            *schemes.entry(scheme.clone()).or_default() += 1;
            layers.push(LayerReport { name: item.name.clone(), shape, scheme, bytes });
        }
        PlanReport {
            model_type: self.config.model_type().unwrap_or_default().to_owned(),
            family: self.architecture.family,
            described: self.architecture.described,
            parameters: self.parameters,
            bits_per_weight: self.bits_per_weight(),
            towers: Some(self.towers).filter(|towers| towers.tensors > 0),
            drafter: self.drafter.as_ref().map(|drafter| drafter.report()),
            input_bytes: self.input_bytes(),
            output_bytes: self.layout.file_bytes(),
            files: self.layout.shards().map(|(name, bytes)| (name.to_owned(), bytes)).collect(),
            schemes,
            notes: self.notes.clone(),
            layers,
        }
    }
}

impl DrafterPlan {
    /// As data.
    pub fn report(&self) -> DrafterReport {
        let Self { plan, .. } = self;
        DrafterReport {
            model_type: plan.config.model_type().unwrap_or_default().to_owned(),
            tensors: plan.layout.specs().len(),
            parameters: plan.parameters,
            bits_per_weight: plan.bits_per_weight(),
            output_bytes: plan.layout.file_bytes(),
        }
    }
}
