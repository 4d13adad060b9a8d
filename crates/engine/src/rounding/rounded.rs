//! A weight in the numbers that a checkpoint stores.

use std::ops::Range;

use mlx_format::Scheme;

/// A weight in stored numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Mode, bits, group size; affine.
    pub scheme: Scheme,
    /// Input features.
    pub columns: usize,
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, numbers of the stored dtype.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, numbers of the stored dtype.
    pub biases: Vec<f32>,
}

impl Rounded {
    /// The weight that these numbers stand for, `[rows, columns]`, as the stored file decodes in float32.
    pub fn decoded(&self) -> Vec<f32> {
        let group = self.scheme.group_size();
        let mut out = vec![0f32; self.codes.len()];
        let groups = self.scales.iter().zip(&self.biases);
        for ((out, codes), (scale, bias)) in
            out.chunks_exact_mut(group).zip(self.codes.chunks_exact(group)).zip(groups)
        {
            for (value, &code) in out.iter_mut().zip(codes) {
                *value = code as f32 * scale + bias;
            }
        }
        out
    }

    /// Some of the rows.
    #[must_use]
    pub fn rows_of(&self, rows: Range<usize>) -> Self {
        let groups = self.columns / self.scheme.group_size();
        let numbers = rows.start * groups..rows.end * groups;
        Self {
            scheme: self.scheme,
            columns: self.columns,
            codes: self.codes[rows.start * self.columns..rows.end * self.columns].to_vec(),
            scales: self.scales[numbers.clone()].to_vec(),
            biases: self.biases[numbers].to_vec(),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.codes.len() / self.columns.max(1)
    }

    /// Multiplies rows by powers of two: exact, codes stay.
    pub fn scale_rows(&mut self, first: usize, factors: &[f32]) {
        let groups = self.columns / self.scheme.group_size();
        for numbers in [&mut self.scales, &mut self.biases] {
            for (row, factor) in numbers[first * groups..].chunks_exact_mut(groups).zip(factors) {
                for value in row {
                    *value *= factor;
                }
            }
        }
    }
}
