//! What is measured of layers.

use mlx_quant_engine::Observed;
use serde::{Deserialize, Serialize};

/// What a candidate costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Bits a code.
    pub bits: u32,
    /// Weights that share a scale.
    pub group_size: usize,
    /// Nats a token by which the model would diverge if this layer alone were stored so.
    pub kl: f64,
}

/// What passed a linear (or one expert of stacked ones).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Tokens; of an expert those that were routed to it.
    pub tokens: u64,
    /// `[in]`: mean squares of inputs over these tokens.
    pub inputs: Vec<f32>,
    /// `[out]`: squares of gradients at the output, summed over these tokens, by the number of all tokens.
    pub gradients: Vec<f32>,
}

/// What its rows are worth to the model as an embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Row (token) and squares of gradients with respect to it, summed over its occurrences and features, by the number of all tokens.
    pub rows: Vec<(u32, f32)>,
    /// `[features]`: each feature's part of that; they sum to 1.
    pub features: Vec<f32>,
}

/// Sensitivity of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Module path.
    pub path: String,
    /// Of its weight, `[.., out, in]`.
    pub shape: Vec<usize>,
    /// Of a linear one, of stacked experts one each; of a table one if it is the head too.
    pub seen: Vec<Seen>,
    /// Of an embedding.
    pub table: Option<Table>,
    /// Of every candidate that fits.
    pub costs: Vec<Cost>,
}

/// What decided the figures of a measurement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Of the file.
    pub version: u32,
    /// [`crate::Model::hash`].
    pub model: String,
    /// SHA-256 of the windows' tokens.
    pub windows: String,
    /// Tokens a window.
    pub sequence_length: usize,
    /// Of the labels that were drawn.
    pub seed: u64,
    /// [`identity`](crate::device::identity) of what measured.
    #[serde(default)]
    pub engine: String,
}

/// A measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    /// What it was made from.
    pub key: Key,
    /// Tokens measured.
    pub tokens: u64,
    /// dtype of scales and biases that the costs hold for.
    pub dtype: String,
    /// In the order of the model.
    pub layers: Vec<Layer>,
}

impl Sensitivities {
    /// Weights of all layers' columns, for recipes that search without a walk: [`crate::QuantizeSettings::columns`].
    pub fn columns(&self) -> std::collections::BTreeMap<String, Vec<f32>> {
        self.layers.iter().map(|layer| (layer.path.clone(), layer.column_weights())).collect()
    }

    /// Whether candidates have their costs.
    pub(super) fn is_judged(&self) -> bool {
        self.layers.iter().any(|layer| !layer.costs.is_empty())
    }
}

impl Seen {
    pub(super) fn of(observed: &Observed, tokens: f64, shape: &[usize]) -> Self {
        let [rows, columns] = [1, 0].map(|at| shape.iter().rev().nth(at).copied().unwrap_or(0));
        let own = observed.tokens.max(1) as f64;
        let mut inputs: Vec<f32> = observed.inputs.iter().map(|sum| short(sum / own)).collect();
        // An expert that no token reached.
        inputs.resize(columns, 1.0);
        let mut gradients: Vec<f32> = observed.gradients.iter().map(|sum| short(sum / tokens)).collect();
        gradients.resize(rows, 0.0);
        Self { tokens: observed.tokens, inputs, gradients }
    }
}

impl Layer {
    /// Weights of its columns for a searched grid: `[in]`, or `[experts * in]`.
    pub fn column_weights(&self) -> Vec<f32> {
        let Some(table) = &self.table else {
            return self.seen.iter().flat_map(|seen| seen.inputs.iter().copied()).collect();
        };
        let rows = self.shape.first().copied().unwrap_or(1).max(1) as f32;
        let head: f32 = self.seen.iter().flat_map(|seen| &seen.gradients).sum::<f32>() / rows;
        let own: f32 = table.rows.iter().map(|row| row.1).sum::<f32>() / rows;
        let inputs = |at: usize| self.seen.first().map_or(0.0, |seen| seen.inputs[at]);
        table.features.iter().enumerate().map(|(at, part)| head * inputs(at) + own * part).collect()
    }
}

/// With four significant digits: what is written is what is computed with.
pub(super) fn short(value: f64) -> f32 {
    format!("{value:.3e}").parse().unwrap_or(0.0)
}
