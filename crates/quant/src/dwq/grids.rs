//! What is trained: scale and center of every group, in float32, with Adam's moments.
//!
//! A group decodes to `code * scale + bias`. Trained is, instead of the bias, the *center*: what the middle of the codes decodes to. A
//! change of the scale then moves codes of both halves apart and not all of them one way, so that scale and center hardly depend on
//! each other and a step of a given size means the same for both.

use std::ops::Range;

use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Scheme};
use mlx_quant_model::{PackedRows, WeightsError};
use rayon::prelude::*;

use crate::Error;

/// One trained module.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    /// Module path.
    pub(super) path: String,
    pub(super) scheme: Scheme,
    /// dtype of stored scales and biases.
    pub(super) float: FloatType,
    /// 1 but for stacked weights.
    pub(super) experts: usize,
    /// Whether only some tokens pass it: those of an expert.
    pub(super) routed: bool,
    /// Of each expert.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// `[experts * rows, groups]`.
    pub(super) scales: Vec<f32>,
    /// As `scales`.
    pub(super) centers: Vec<f32>,
    /// Adam's first and second moments, of scales and of centers.
    pub(super) moments: [Vec<f32>; 4],
}

/// Gradients of a grid's scales and centers.
pub(super) type Slopes = [Vec<f32>; 2];

impl Grid {
    /// Scales and biases in their place among the output.
    pub(super) fn write(&self, writer: &Writer) -> Result<(), Error> {
        let (mut scales, mut biases) = (Vec::new(), Vec::new());
        for at in 0..self.scales.len() {
            let (scale, bias) = self.stored(at);
            scales.push(scale);
            biases.push(bias);
        }
        for (leaf, numbers) in [("scales", scales), ("biases", biases)] {
            let name = format!("{}.{leaf}", self.path);
            let index = writer.layout().index_of(&name);
            let missing =
                || WeightsError::Tensor(mlx_quant_engine::Error::msg(format!("{name} has no place")));
            let mut bytes = vec![0u8; numbers.len() * self.float.size()];
            self.float.narrow(&numbers, &mut bytes);
            writer.write_at(index.ok_or_else(missing)?, 0, &bytes)?;
        }
        Ok(())
    }

    /// From what is stored; `shape` is that of the weight, `[.., rows, columns]`.
    pub(super) fn new(path: &str, shape: &[usize], stored: &PackedRows) -> Self {
        let [rows, columns] = [1, 0].map(|at| shape.iter().rev().nth(at).copied().unwrap_or(1));
        let experts: usize = shape.iter().rev().skip(2).product();
        let middle = middle(stored.scheme);
        let centers = stored.scales.iter().zip(&stored.biases).map(|(scale, bias)| bias + scale * middle);
        Self {
            path: path.to_owned(),
            scheme: stored.scheme,
            float: stored.float,
            experts,
            routed: experts > 1,
            rows,
            columns,
            centers: centers.collect(),
            moments: std::array::from_fn(|_| vec![0.0; stored.scales.len()]),
            scales: stored.scales.clone(),
        }
    }

    /// Codes.
    pub(super) fn codes(&self) -> u64 {
        (self.experts * self.rows * self.columns) as u64
    }

    pub(super) fn groups(&self) -> usize {
        self.columns / self.scheme.group_size()
    }

    pub(super) fn middle(&self) -> f32 {
        middle(self.scheme)
    }

    /// No slopes yet.
    pub(super) fn flat(&self) -> Slopes {
        [0, 1].map(|_| vec![0.0; self.scales.len()])
    }

    /// Scale and bias of a group in the stored dtype.
    pub(super) fn stored(&self, at: usize) -> (f32, f32) {
        let scale = self.float.round(self.scales[at]);
        (scale, self.float.round(self.centers[at] - scale * self.middle()))
    }

    /// Scales and biases of rows in the stored dtype, `[rows, groups]` each.
    pub(super) fn stored_rows(&self, rows: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let own = rows.start * self.groups()..rows.end * self.groups();
        own.into_par_iter().map(|at| self.stored(at)).unzip()
    }

    /// Whether both can be stored.
    pub(super) fn is_finite(&self, at: usize) -> bool {
        let (scale, bias) = self.stored(at);
        scale.is_finite() && bias.is_finite()
    }

    /// What rows decode to with the stored numbers; `codes` are those rows'.
    pub(super) fn decoded(&self, rows: Range<usize>, codes: &[u8]) -> Vec<f32> {
        let (groups, size) = (self.groups(), self.scheme.group_size());
        let mut out = vec![0f32; codes.len()];
        let tasks = out.par_chunks_mut(self.columns).zip(codes.par_chunks(self.columns));
        tasks.enumerate().for_each(|(row, (out, codes))| {
            let first = (rows.start + row) * groups;
            let both = out.chunks_exact_mut(size).zip(codes.chunks_exact(size));
            for (group, (out, codes)) in both.enumerate() {
                let (scale, bias) = self.stored(first + group);
                for (value, code) in out.iter_mut().zip(codes) {
                    *value = f32::from(*code) * scale + bias;
                }
            }
        });
        out
    }

    /// Bytes that it takes in memory, best values and slopes included, and a fifth more for what is made of them on the way.
    pub(super) fn bytes(elements: u64, group_size: u64) -> u64 {
        elements / group_size * 4 * 12
    }
}

fn middle(scheme: Scheme) -> f32 {
    ((1u32 << scheme.bits()) - 1) as f32 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is stored is what was stored, and decodes as the file does.
    #[test]
    fn a_grid_begins_as_it_was_stored() {
        for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
            let scheme = Scheme::affine(4, 32).unwrap();
            let numbers = |seed: u32| -> Vec<f32> {
                (0..12u32).map(|at| float.round(((at * 37 + seed) % 23) as f32 / 91.0 - 0.1)).collect()
            };
            let codes: Vec<u8> = (0..12 * 32u32).map(|at| (at * 7 % 16) as u8).collect();
            let stored = PackedRows { scheme, float, codes, scales: numbers(5), biases: numbers(11) };
            let grid = Grid::new("a", &[2, 3, 64], &stored);
            assert_eq!((grid.experts, grid.rows, grid.groups()), (2, 3, 2));
            for at in 0..12 {
                let (scale, bias) = grid.stored(at);
                assert_eq!(scale, stored.scales[at]);
                assert!((bias - stored.biases[at]).abs() <= 1e-7, "{bias} {}", stored.biases[at]);
            }
            let decoded = grid.decoded(0..6, &stored.codes);
            let expected = f32::from(stored.codes[33]) * stored.scales[1] + stored.biases[1];
            assert!((decoded[33] - expected).abs() < 1e-5);
        }
    }
}
