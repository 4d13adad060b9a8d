//! What is trained: scale and center of every group, in float32, with Adam's moments, where the walk computes.
//!
//! A group decodes to `code * scale + bias`. Trained is, instead of the bias, the *center*: what the middle of the codes decodes to. A
//! change of the scale then moves codes of both halves apart and not all of them one way, so that scale and center hardly depend on
//! each other and a step of a given size means the same for both.

use std::ops::Range;
use std::sync::Arc;

use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::{Codes, Device, Held, Result as EngineResult, Tensor};
use mlx_quant_model::{PackedRows, WeightsError};

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
    pub(super) scales: Tensor,
    /// As `scales`.
    pub(super) centers: Tensor,
    /// Adam's first and second moments, of scales and of centers; as `scales`.
    pub(super) moments: [Tensor; 4],
}

/// Gradients of a grid's scales and centers, as these.
pub(super) type Slopes = [Tensor; 2];

impl Grid {
    /// Scales and biases in their place among the output.
    pub(super) fn write(&self, writer: &Writer) -> Result<(), Error> {
        let numbers = self.stored(0..self.all_rows()).map_err(WeightsError::from)?;
        for (leaf, numbers) in ["scales", "biases"].into_iter().zip(numbers) {
            put(writer, &format!("{}.{leaf}", self.path), &numbers, self.float)?;
        }
        Ok(())
    }

    /// From what is stored, on a device; `shape` is that of the weight, `[.., rows, columns]`.
    pub(super) fn new(
        path: &str,
        shape: &[usize],
        stored: PackedRows,
        device: &Device,
    ) -> EngineResult<Self> {
        let [rows, columns] = [1, 0].map(|at| shape.iter().rev().nth(at).copied().unwrap_or(1));
        let experts: usize = shape.iter().rev().skip(2).product();
        let middle = middle(stored.scheme);
        let centers = stored.scales.iter().zip(&stored.biases).map(|(scale, bias)| bias + scale * middle);
        let size = (experts * rows, columns / stored.scheme.group_size());
        let centers = Tensor::from_vec(centers.collect(), size, device)?;
        let zeros = Tensor::full(0.0, size, device)?;
        Ok(Self {
            path: path.to_owned(),
            scheme: stored.scheme,
            float: stored.float,
            experts,
            routed: experts > 1,
            rows,
            columns,
            scales: Tensor::from_vec(stored.scales, size, device)?,
            centers,
            moments: std::array::from_fn(|_| zeros.clone()),
        })
    }

    /// Codes.
    pub(super) fn codes(&self) -> u64 {
        (self.all_rows() * self.columns) as u64
    }

    /// Of all experts.
    pub(super) fn all_rows(&self) -> usize {
        self.experts * self.rows
    }

    /// Of a row.
    pub(super) fn groups(&self) -> usize {
        self.columns / self.scheme.group_size()
    }

    pub(super) fn middle(&self) -> f32 {
        middle(self.scheme)
    }

    /// No slopes yet.
    pub(super) fn flat(&self) -> EngineResult<Slopes> {
        let zeros = Tensor::full(0.0, self.scales.dims(), self.scales.device())?;
        Ok([zeros.clone(), zeros])
    }

    /// Slopes as numbers of this process; zeros where there are none.
    pub(super) fn fetched(&self, slopes: Option<&Slopes>) -> EngineResult<[Vec<f32>; 2]> {
        match slopes {
            Some([scales, centers]) => Ok([scales.to_vec()?, centers.to_vec()?]),
            None => Ok([0, 1].map(|_| vec![0.0; self.scales.elem_count()])),
        }
    }

    /// Slopes from numbers of this process.
    pub(super) fn brought(&self, [scales, centers]: [Vec<f32>; 2]) -> EngineResult<Slopes> {
        let bring = |numbers| Tensor::from_vec(numbers, self.scales.dims(), self.scales.device());
        Ok([bring(scales)?, bring(centers)?])
    }

    /// Scales and centers of rows, `[rows, groups]` each.
    pub(super) fn some(&self, rows: Range<usize>) -> EngineResult<[Tensor; 2]> {
        let own = |all: &Tensor| all.narrow(0, rows.start, rows.len());
        Ok([own(&self.scales)?, own(&self.centers)?])
    }

    /// Scales and biases of rows in the stored dtype, `[rows, groups]` each.
    pub(super) fn stored(&self, rows: Range<usize>) -> EngineResult<[Tensor; 2]> {
        let [scales, centers] = self.some(rows)?;
        scales.device().stored_grid(&scales, &centers, self.middle(), self.float)
    }

    /// Codes of some rows, with what they decode to with these scales and biases.
    pub(super) fn decoded(&self, codes: &Held, [scales, biases]: &[Tensor; 2]) -> EngineResult<Arc<Codes>> {
        scales.device().decode(codes, (self.scheme.group_size(), self.middle()), scales, biases)
    }

    /// What these rows decode to now, `[rows, columns]`; `codes` are theirs. A card is waited for once.
    pub(super) fn decoded_rows(&self, rows: &[u32], codes: &Held) -> EngineResult<Vec<f32>> {
        let (scales, centers) = (self.scales.rows(rows)?, self.centers.rows(rows)?);
        let stored = scales.device().stored_grid(&scales, &centers, self.middle(), self.float)?;
        self.decoded(codes, &stored)?.weight.to_vec()
    }

    /// Whether all of it can be stored.
    pub(super) fn is_finite(&self) -> EngineResult<bool> {
        for numbers in self.stored(0..self.all_rows())? {
            if !numbers.read(|numbers| numbers.iter().all(|number| number.is_finite()))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Bytes that the grids of so many weights take, best values and slopes included, and a fifth more for what is made of them on the
    /// way: in the memory of the engine.
    pub(super) fn bytes(elements: u64, group_size: u64) -> u64 {
        elements / group_size * 4 * 12
    }
}

/// A tensor in its place among the output, narrowed to its dtype.
pub(super) fn put(writer: &Writer, name: &str, numbers: &Tensor, float: FloatType) -> Result<(), Error> {
    let missing = || WeightsError::Tensor(mlx_quant_engine::Error::msg(format!("{name} has no place")));
    let index = writer.layout().index_of(name).ok_or_else(missing)?;
    let mut bytes = vec![0u8; numbers.elem_count() * float.size()];
    numbers.read(|numbers| float.narrow(numbers, &mut bytes)).map_err(WeightsError::from)?;
    Ok(writer.write_at(index, 0, &bytes)?)
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
            let stored =
                PackedRows { scheme, float, codes: codes.clone(), scales: numbers(5), biases: numbers(11) };
            let (scales, biases) = (stored.scales.clone(), stored.biases.clone());
            let grid = Grid::new("a", &[2, 3, 64], stored, &mlx_quant_engine::cpu()).unwrap();
            assert_eq!((grid.experts, grid.rows, grid.groups()), (2, 3, 2));
            let [found_scales, found_biases] = grid.stored(0..6).unwrap().map(|x| x.to_vec().unwrap());
            assert_eq!(found_scales, scales);
            for (found, bias) in found_biases.iter().zip(&biases) {
                assert!((found - bias).abs() <= 1e-7, "{found} {bias}");
            }
            let held = mlx_quant_engine::cpu().hold([&codes[64..128], &codes[256..320]].concat()).unwrap();
            let decoded = grid.decoded_rows(&[1, 4], &held).unwrap();
            // (The place among these, among all): in both groups of both rows.
            for (at, from) in [(0, 64), (33, 97), (64, 256), (127, 319)] {
                let group = from / 32;
                let expected = f32::from(codes[from]) * scales[group] + biases[group];
                assert!((decoded[at] - expected).abs() < 1e-5, "{at}: {} {expected}", decoded[at]);
            }
            assert!(grid.is_finite().unwrap());
        }
    }
}
