//! Weights as they are stored, for those who train them.

use std::ops::Range;

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::Device;
use rayon::prelude::*;

use super::{Stored, TASK_ELEMENTS, Weights, WeightsError};
use crate::{Parameters, View};

/// Rows of a packed module as they are stored: `code * scale + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedRows {
    /// Mode (affine), bits, group size.
    pub scheme: Scheme,
    /// dtype of scales and biases.
    pub float: FloatType,
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`.
    pub biases: Vec<f32>,
}

impl Weights<'_> {
    /// dtype of a tensor that the file holds under this name and as it is read; `None` for a packed or changed one.
    pub fn stored_float(&self, name: &str) -> Option<FloatType> {
        match &self.entries.get(name)?.stored {
            Stored::Dense { view, float } if view.change.is_none() => {
                self.checkpoint.tensors().contains_key(name).then_some(*float)
            }
            _ => None,
        }
    }

    /// Scales and biases of an affine packed matrix alone, [`PackedRows`] without codes; `None` if it is stored otherwise.
    pub fn packed_grids(&self, path: &str) -> Option<PackedRows> {
        let entry = self.entries.get(&format!("{path}.weight"))?;
        let Stored::Packed { scales, biases: Some(biases), scheme, float, .. } = &entry.stored else {
            return None;
        };
        let widened = |view: &View| {
            let bytes = view.rows_of(self.checkpoint, 0..view.rows());
            let mut values = vec![0f32; bytes.len() / float.size()];
            float.widen(&bytes, &mut values);
            values
        };
        let (scales, biases) = (widened(scales), widened(biases));
        Some(PackedRows { scheme: *scheme, float: *float, codes: Vec::new(), scales, biases })
    }

    /// Rows of an affine packed matrix `path.weight`, all axes but the last taken as one; `None` if it is stored otherwise.
    ///
    /// # Panics
    /// If the rows lie outside the matrix.
    pub fn packed_rows(&self, path: &str, rows: Range<usize>) -> Option<PackedRows> {
        let entry = self.entries.get(&format!("{path}.weight"))?;
        let Stored::Packed { weight, scales, biases: Some(biases), scheme, float, .. } = &entry.stored else {
            return None;
        };
        let columns = entry.shape.last().copied().unwrap_or(1).max(1);
        let row_bytes = scheme.words(columns) * 4;
        let mut codes = vec![0u8; rows.len() * columns];
        let per_task = (TASK_ELEMENTS / columns).max(1);
        codes.par_chunks_mut(per_task * columns).enumerate().for_each(|(index, out)| {
            let start = rows.start + index * per_task;
            let words = weight.rows_of(self.checkpoint, start..start + out.len() / columns);
            debug_assert_eq!(words.len(), out.len() / columns * row_bytes);
            mlx_format::unpack(*scheme, &words, out);
        });
        let widened = |view: &View| {
            let bytes = view.rows_of(self.checkpoint, rows.clone());
            let mut values = vec![0f32; bytes.len() / float.size()];
            float.widen(&bytes, &mut values);
            values
        };
        let (scales, biases) = (widened(scales), widened(biases));
        Some(PackedRows { scheme: *scheme, float: *float, codes, scales, biases })
    }

    /// [`Weights::load`] of those tensors alone whose names `wanted` likes.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn load_some(
        &self,
        prefix: &str,
        device: &Device,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Parameters, WeightsError> {
        let mut parameters = Parameters::default();
        for (name, entry) in self.with_prefix(prefix).filter(|(name, _)| wanted(name)) {
            let columns = entry.shape.last().copied().unwrap_or(1).max(1);
            let rows = entry.shape.iter().product::<usize>() / columns;
            parameters.insert(name.clone(), self.decode(name, entry, 0..rows, device)?);
        }
        self.checkpoint.release();
        Ok(parameters)
    }
}
