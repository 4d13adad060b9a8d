//! Rounding a weight to codes, scales and biases: to nearest on a searched grid, or with GPTQ's compensation.
//!
//! Rows of a weight are independent of each other, so a task takes 64 of them through all columns. They lie transposed,
//! a column's 64 values side by side, so that every step is the same arithmetic in every lane.
//!
//! GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds column by column and lets later columns make up for each error.
//! Beyond mlx-lm's: scale and bias of a group are searched on the values as they are when the group's turn comes and
//! are rounded to the stored dtype *before* its codes are chosen, so that later columns also make up for that; and
//! sweeps of coordinate descent over groups (scale and bias by least squares) and codes follow, every step of which
//! lowers the error under the full Hessian.

mod grid;
mod task;

use mlx_format::{FloatType, Scheme};
use rayon::prelude::*;

use self::task::Task;
use crate::error::Result;
use crate::gram::Factor;

/// Rows that are rounded together.
pub const ROWS: usize = 64;

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

/// How codes, scales and biases are chosen.
#[derive(Clone, Copy, Debug)]
pub enum How<'h> {
    /// Each group's extremes as in `mx.quantize`, nearest codes to the stored numbers.
    Plain,
    /// Searched grid without data, nearest codes: large weights weigh more, `mean square + square`, because they tend
    /// to meet loud inputs; clipping them is what hurts.
    Blind {
        /// `[columns]`, not negative.
        weights: &'h [f32],
    },
    /// Searched grid, nearest codes; a weight for each column.
    Nearest {
        /// `[columns]`, not negative.
        weights: &'h [f32],
    },
    /// Searched grid, nearest codes, then sweeps of coordinate descent over scales, biases and codes.
    Refined {
        /// Of the site's Hessian.
        factor: &'h Factor,
        /// Columns between updates of all columns after them.
        block_size: usize,
        /// Sweeps.
        sweeps: usize,
    },
    /// Searched grid, later columns make up for errors of earlier ones.
    Compensated {
        /// Of the site's Hessian.
        factor: &'h Factor,
        /// Columns between updates of all columns after them.
        block_size: usize,
        /// Sweeps of coordinate descent afterwards.
        sweeps: usize,
    },
}

/// A [`Factor`] in this process's memory.
#[derive(Clone, Copy)]
struct Held<'h> {
    order: &'h [usize],
    upper: &'h [f32],
    hessian: &'h [f32],
}

impl Held<'_> {
    /// What an error of one unit in each column costs if later columns make up for it as well as they can:
    /// `1 / U_jj^2` (Frantar and Alistarh 2022, arXiv 2208.11580, equation 3).
    fn weights(&self) -> Vec<f32> {
        let size = self.order.len();
        (0..size).map(|at| self.upper[at * size + at]).map(|diagonal| 1.0 / (diagonal * diagonal)).collect()
    }
}

/// [`How`], with its factor in this process's memory.
#[derive(Clone, Copy)]
enum Way<'h> {
    Plain,
    Blind { weights: &'h [f32] },
    Nearest { weights: &'h [f32] },
    Refined { factor: Held<'h>, block_size: usize, sweeps: usize },
    Compensated { factor: Held<'h>, block_size: usize, sweeps: usize },
}

impl<'h> How<'h> {
    /// # Errors
    /// A factor in the memory of another engine.
    fn at_hand(self) -> Result<Way<'h>> {
        let held = |factor: &'h Factor| {
            Ok(Held { order: &factor.order, upper: factor.upper.host()?, hessian: factor.hessian.host()? })
        };
        Ok(match self {
            Self::Plain => Way::Plain,
            Self::Blind { weights } => Way::Blind { weights },
            Self::Nearest { weights } => Way::Nearest { weights },
            Self::Refined { factor, block_size, sweeps } => {
                Way::Refined { factor: held(factor)?, block_size, sweeps }
            }
            Self::Compensated { factor, block_size, sweeps } => {
                Way::Compensated { factor: held(factor)?, block_size, sweeps }
            }
        })
    }
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

/// Rounds a weight `[rows, columns]` on the processor, on the current rayon pool; the same result for any number of
/// threads.
///
/// # Errors
/// A factor that is not in this process's memory.
///
/// # Panics
/// If the scheme is not affine or the lengths do not fit together.
pub fn round(
    values: &[f32],
    columns: usize,
    scheme: Scheme,
    float: FloatType,
    how: How<'_>,
) -> Result<Rounded> {
    let way = how.at_hand()?;
    assert!(scheme.has_biases() && scheme.divides(columns), "{columns} columns at {scheme}");
    let groups = columns / scheme.group_size();
    let rows = values.len() / columns;
    let mut rounded = Rounded {
        scheme,
        columns,
        codes: vec![0; rows * columns],
        scales: vec![0.0; rows * groups],
        biases: vec![0.0; rows * groups],
    };
    let codes = rounded.codes.par_chunks_mut(ROWS * columns);
    let scales = rounded.scales.par_chunks_mut(ROWS * groups);
    let biases = rounded.biases.par_chunks_mut(ROWS * groups);
    values.par_chunks(ROWS * columns).zip(codes).zip(scales.zip(biases)).for_each(
        |((values, codes), (scales, biases))| {
            let mut task = Task::new(values, columns, scheme, float, way);
            task.run(way);
            task.give(way, codes, scales, biases);
        },
    );
    Ok(rounded)
}

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test shows its figures")]
mod tests {
    use super::*;
    use crate::gram::{Gram, GramSum};
    use crate::{Tensor, cpu};

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // Roughly normal, so that edges are rare.
        (0..count).map(|_| next() + next() + next() + next()).collect()
    }

    /// Correlated inputs with some loud features.
    fn gram(size: usize, tokens: usize) -> Gram {
        let (mix, noise) = (numbers(8 * size, 3), numbers(tokens * (size + 8), 5));
        let mut x = Vec::new();
        for token in noise.chunks_exact(size + 8) {
            for at in 0..size {
                let shared: f32 = (0..8).map(|k| token[size + k] * mix[k * size + at]).sum();
                x.push((token[at] + 2.0 * shared) * if at % 37 == 5 { 6.0 } else { 1.0 });
            }
        }
        let mut sum = GramSum::new(size, &cpu()).unwrap();
        sum.add(&Tensor::from_vec(x, (1, tokens, size), &cpu()).unwrap()).unwrap();
        sum.finish().unwrap()
    }

    fn plain(values: &[f32], columns: usize, scheme: Scheme, float: FloatType) -> Vec<f32> {
        use mlx_format::{PackedMut, PackedRef};
        let mut bytes = vec![0u8; values.len() * 4];
        FloatType::F32.narrow(values, &mut bytes);
        let rows = values.len() / columns;
        let scale_bytes = rows * scheme.scale_bytes(columns, FloatType::F32);
        let (mut weight, mut scales, mut biases) =
            (vec![0; rows * scheme.words(columns) * 4], vec![0; scale_bytes], vec![0; scale_bytes]);
        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
        mlx_format::quantize(scheme, FloatType::F32, columns, &bytes, out, false).unwrap();
        for numbers in [&mut scales, &mut biases] {
            let mut wide = vec![0f32; numbers.len() / 4];
            FloatType::F32.widen(numbers, &mut wide);
            for value in &mut wide {
                *value = float.round(*value);
            }
            FloatType::F32.narrow(&wide, numbers);
        }
        let packed = PackedRef { weight: &weight, scales: &scales, biases: &biases };
        mlx_format::dequantize(scheme, FloatType::F32, columns, packed, &mut bytes);
        let mut out = vec![0f32; values.len()];
        FloatType::F32.widen(&bytes, &mut out);
        out
    }

    fn difference(a: &[f32], b: &[f32], columns: usize) -> Tensor {
        let values: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        Tensor::from_vec(values, (a.len() / columns, columns), &cpu()).unwrap()
    }

    /// Every step lowers the error, at every width, group size and dtype of the format.
    #[test]
    fn each_refinement_lowers_the_error() {
        let (rows, columns) = (70, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let factor = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap().unwrap();
        let weights = gram.diagonal().unwrap();
        for bits in [2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
                    let scheme = Scheme::affine(bits, group).unwrap();
                    let loss = |decoded: &[f32]| gram.loss(&difference(&values, decoded, columns)).unwrap();
                    let by = |how| loss(&round(&values, columns, scheme, float, how).unwrap().decoded());
                    let compensated = |sweeps| How::Compensated { factor: &factor, block_size: 128, sweeps };
                    let losses = [
                        loss(&plain(&values, columns, scheme, float)),
                        by(How::Nearest { weights: &weights }),
                        by(compensated(0)),
                        by(compensated(1)),
                        by(compensated(3)),
                    ];
                    println!("{bits} bits, groups of {group}, {}: {losses:.5?}", float.name());
                    assert!(losses.is_sorted_by(|a, b| a > b), "{bits} {group} {float:?} {losses:?}");
                }
            }
        }
    }

    #[test]
    fn order_block_size_and_threads() {
        let (rows, columns) = (130, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let scheme = Scheme::affine(3, 64).unwrap();
        let forward = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap().unwrap();
        let groups = [2usize, 0, 3, 1];
        let order: Vec<usize> =
            groups.iter().flat_map(|group| (0..64).rev().map(move |at| group * 64 + at)).collect();
        let turned = Factor::new(&gram, order, 0.01).unwrap().unwrap();
        let by = |factor, block_size, threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let how = How::Compensated { factor, block_size, sweeps: 1 };
            pool.install(|| round(&values, columns, scheme, FloatType::Bf16, how).unwrap())
        };
        let first = by(&forward, 128, 1);
        assert_eq!(first, by(&forward, 128, 3), "threads decide nothing");
        let loss = |rounded: &Rounded| gram.loss(&difference(&values, &rounded.decoded(), columns)).unwrap();
        let plain = loss(
            &round(
                &values,
                columns,
                scheme,
                FloatType::Bf16,
                How::Nearest { weights: &gram.diagonal().unwrap() },
            )
            .unwrap(),
        );
        for rounded in [by(&forward, 100, 1), by(&forward, 4096, 1), by(&turned, 128, 1)] {
            assert!((loss(&rounded) / loss(&first) - 1.0).abs() < 0.03 && loss(&rounded) < plain);
        }
    }

    #[test]
    fn groups_without_range_and_zeros() {
        let columns = 64;
        let mut values = vec![0.25f32; 3 * columns];
        values[columns..2 * columns].fill(0.0);
        values[2 * columns..].fill(-3.0);
        let scheme = Scheme::affine(4, 64).unwrap();
        for float in [FloatType::F16, FloatType::Bf16] {
            let rounded =
                round(&values, columns, scheme, float, How::Nearest { weights: &[1.0; 64] }).unwrap();
            assert_eq!(rounded.decoded(), values, "{float:?}");
        }
    }
}
