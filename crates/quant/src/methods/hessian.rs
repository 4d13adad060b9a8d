//! Second moments of a site's inputs, and what GPTQ makes of them.
//!
//! With inputs `X [tokens, in]` the error of a linear's output under a change `dW` of its weight is
//! `tr(dW H dW^T)`, `H = X^T X / tokens`: whatever is judged by it needs no further pass over the tokens.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, MatMut, MatRef, Par};
use mlx_quant_engine::Tensor;
use rayon::prelude::*;

use crate::reduce::Sum;

/// Parts into which products and factorisations are split. Fixed, so that results do not depend on the number of threads.
const PARTS: usize = 8;

/// `X^T X / tokens` of a site, float32, sums in the order of the windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    /// Input features.
    pub size: usize,
    /// Tokens summed over.
    pub tokens: u64,
    /// `[size, size]`, symmetric.
    pub values: Vec<f32>,
}

/// A Gram matrix in the making: of windows that are added in their order.
#[derive(Clone, Debug)]
pub struct GramSum {
    size: usize,
    tokens: u64,
    values: Vec<f32>,
}

impl GramSum {
    /// Of inputs with `size` features.
    pub fn new(size: usize) -> Self {
        Self { size, tokens: 0, values: vec![0.0; size * size] }
    }

    /// Adds inputs `[.., size]` of a window.
    ///
    /// # Errors
    /// What goes wrong on a device.
    pub fn add(&mut self, input: &Tensor) -> mlx_quant_engine::Result<()> {
        input.read(|values| self.add_rows(values))
    }

    fn add_rows(&mut self, values: &[f32]) {
        let size = self.size;
        let tokens = values.len() / size.max(1);
        self.tokens += tokens as u64;
        let x = MatRef::from_row_major_slice(values, tokens, size);
        triangular::matmul(
            MatMut::from_row_major_slice_mut(&mut self.values, size, size),
            BlockStructure::TriangularLower,
            Accum::Add,
            x.transpose(),
            BlockStructure::Rectangular,
            x,
            BlockStructure::Rectangular,
            1.0,
            Par::rayon(PARTS),
        );
    }

    /// The mean over all tokens; nothing but zeros if there were none.
    pub fn finish(self) -> Gram {
        let Self { size, tokens, mut values } = self;
        let factor = 1.0 / tokens.max(1) as f32;
        values.par_chunks_mut(size.max(1)).for_each(|row| row.iter_mut().for_each(|value| *value *= factor));
        mirror(&mut values, size);
        Gram { size, tokens, values }
    }
}

impl Sum for GramSum {
    fn add(&mut self, right: Self) {
        self.tokens += right.tokens;
        let rows =
            self.values.par_chunks_mut(self.size.max(1)).zip(right.values.par_chunks(self.size.max(1)));
        rows.for_each(|(sum, other)| sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += other));
    }
}

impl Gram {
    /// Mean square of each input feature.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.size).map(|at| self.values[at * self.size + at]).collect()
    }

    /// Part of a product of two features that is taken for real: with few tokens for many features, chance makes much of it.
    /// Shrinking off-diagonal elements is Ledoit and Wolf's remedy (2004); tokens of a text are not independent of each other, so
    /// only one in [`TOKENS_FOR_ONE`] counts. Measured at 32 windows of 512 (KL, factor 0 / 1 / 3 / 8 / 20): SmolLM2-135M dithered
    /// at 4 bits 0.122 / 0.107 / 0.099 / 0.094 / 0.097, the demo model at 3 bits 0.172 / 0.175 / 0.170 / 0.166 / 0.168.
    fn reliability(&self) -> f32 {
        (self.tokens as f64 / (self.size as f64 * TOKENS_FOR_ONE + self.tokens as f64)) as f32
    }

    /// That of the same inputs divided by `factors`, feature by feature.
    #[must_use]
    pub fn scaled(&self, factors: &[f32]) -> Self {
        let mut values = self.values.clone();
        for (row, &own) in values.chunks_exact_mut(self.size.max(1)).zip(factors) {
            for (value, &other) in row.iter_mut().zip(factors) {
                *value /= own * other;
            }
        }
        Self { values, ..*self }
    }

    /// `tr(D H D^T)` of changes `D [rows, size]`, in float64 over rows.
    pub fn loss(&self, changes: &[f32]) -> f64 {
        let rows = changes.len() / self.size.max(1);
        if rows == 0 {
            return 0.0;
        }
        let mut product = vec![0f32; changes.len()];
        let d = MatRef::from_row_major_slice(changes, rows, self.size);
        let h = MatRef::from_row_major_slice(&self.values, self.size, self.size);
        matmul(
            MatMut::from_row_major_slice_mut(&mut product, rows, self.size),
            Accum::Replace,
            d,
            h,
            1.0,
            Par::Seq,
        );
        let row = |(d, p): (&[f32], &[f32])| -> f64 { d.iter().zip(p).map(|(d, p)| (d * p) as f64).sum() };
        changes.chunks_exact(self.size).zip(product.chunks_exact(self.size)).map(row).sum()
    }
}

/// Copies the lower triangle to the upper one, a tile that fits in the cache at a time.
fn mirror(values: &mut [f32], size: usize) {
    const TILE: usize = 32;
    for top in (0..size).step_by(TILE) {
        for left in (0..=top).step_by(TILE) {
            for row in top..size.min(top + TILE) {
                for column in left..row.min(left + TILE) {
                    values[column * size + row] = values[row * size + column];
                }
            }
        }
    }
}

/// What GPTQ needs of a Hessian, in the order in which columns are rounded.
#[derive(Clone, Debug)]
pub struct Factor {
    /// Input features.
    pub size: usize,
    /// Which column is rounded at each place. Columns of a group stay together.
    pub order: Vec<usize>,
    /// `U` with `H^-1 = U^T U`, upper triangular, row-major.
    pub upper: Vec<f32>,
    /// The damped Hessian, row-major.
    pub hessian: Vec<f32>,
    /// Part of the mean diagonal that was added to the diagonal.
    pub damping: f32,
}

/// Tokens of a text that tell as much as an independent one.
const TOKENS_FOR_ONE: f64 = 8.0;

/// Tries of ever stronger damping.
const TRIES: usize = 6;

impl Factor {
    /// Of a Gram matrix, with `damping` times the mean of its diagonal added to the diagonal; ten times as much
    /// whenever that is not positive definite. `None` if it never is. A dead column (an input that is always zero) keeps the damping
    /// alone, so that its weights are rounded to nearest and take part in nothing.
    pub fn new(gram: &Gram, order: Vec<usize>, damping: f32) -> Option<Self> {
        let size = gram.size;
        let mean = gram.diagonal().iter().map(|value| *value as f64).sum::<f64>() / size.max(1) as f64;
        if !(mean.is_finite() && mean > 0.0) {
            return None;
        }
        let kept = gram.reliability();
        let mut hessian = vec![0f32; size * size];
        hessian.par_chunks_mut(size).zip(&order).for_each(|(row, &from)| {
            for (value, &column) in row.iter_mut().zip(&order) {
                let factor = if from == column { 1.0 } else { kept };
                *value = factor * gram.values[from * size + column];
            }
        });
        let mut damping = damping.max(1e-6);
        for _ in 0..TRIES {
            let added = (mean * damping as f64) as f32;
            if let Some(upper) = inverse_factor(&hessian, size, added) {
                for at in 0..size {
                    hessian[at * size + at] += added;
                }
                return Some(Self { size, order, upper, hessian, damping });
            }
            damping *= 10.0;
        }
        None
    }

    /// What an error of one unit in each column costs if later columns make up for it as well as they can:
    /// `1 / U_jj^2` (Frantar and Alistarh 2022, arXiv 2208.11580, equation 3).
    pub fn weights(&self) -> Vec<f32> {
        (0..self.size)
            .map(|at| self.upper[at * self.size + at])
            .map(|diagonal| 1.0 / (diagonal * diagonal))
            .collect()
    }
}

/// Upper triangular `U` with `(H + added)^-1 = U^T U`.
///
/// The Cholesky factor of H turned about both axes, turned back, is an upper triangular `R` with `H = R R^T`, so `U = R^-1`:
/// one factorisation and one triangular inverse instead of GPTQ's two factorisations and a full inverse.
fn inverse_factor(hessian: &[f32], size: usize, added: f32) -> Option<Vec<f32>> {
    let turned = |at: usize| size - 1 - at;
    // Column-major, which faer factors fastest; symmetric, so that rows may be read for columns.
    let mut lower = vec![0f32; size * size];
    lower.par_chunks_exact_mut(size).enumerate().for_each(|(column, out)| {
        let from = &hessian[turned(column) * size..][..size];
        out.iter_mut().zip(from.iter().rev()).for_each(|(value, from)| *value = *from);
        out[column] += added;
    });
    let par = Par::rayon(PARTS);
    let to = MatMut::from_column_major_slice_mut(&mut lower, size, size);
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(size, par, faer::prelude::default()));
    cholesky_in_place(
        to,
        faer::prelude::default(),
        par,
        MemStack::new(&mut memory),
        faer::prelude::default(),
    )
    .ok()?;
    let mut inverse = vec![0f32; size * size];
    invert_lower_triangular(
        MatMut::from_column_major_slice_mut(&mut inverse, size, size),
        MatRef::from_column_major_slice(&lower, size, size),
        par,
    );
    // lower^-1 turned about both axes: rows of U are its rows read backwards.
    lower.par_chunks_exact_mut(size).enumerate().for_each(|(row, upper)| {
        upper[..row].fill(0.0);
        for (column, value) in upper.iter_mut().enumerate().skip(row) {
            *value = inverse[turned(column) * size + turned(row)];
        }
    });
    lower.iter().all(|value| value.is_finite()).then_some(lower)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn gram(size: usize, windows: usize, tokens: usize) -> (Gram, Vec<f32>) {
        let values = numbers(windows * tokens * size, 7);
        let tensors: Vec<Tensor> = values
            .chunks_exact(tokens * size)
            .map(|window| Tensor::from_slice(window, (1, tokens, size), &mlx_quant_engine::cpu()).unwrap())
            .collect();
        let mut sum = GramSum::new(size);
        for tensor in &tensors {
            sum.add(tensor).unwrap();
        }
        (sum.finish(), values)
    }

    #[test]
    fn sums_products_of_all_tokens() {
        let (size, windows, tokens) = (200, 3, 17);
        let (gram, values) = gram(size, windows, tokens);
        assert_eq!(gram.tokens, 51);
        for (row, column) in [(0, 0), (5, 199), (199, 5), (193, 20), (100, 101)] {
            let tokens = values.chunks_exact(size);
            let expected: f64 = tokens.map(|x| (x[row] * x[column]) as f64).sum::<f64>() / 51.0;
            let found = gram.values[row * size + column] as f64;
            assert!((found - expected).abs() < 1e-5, "{row} {column}: {found} {expected}");
        }
    }

    #[test]
    fn the_sum_does_not_depend_on_threads() {
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gram(400, 4, 33).0)
        };
        assert_eq!(of(1), of(3));
    }

    #[test]
    fn the_factor_does_not_depend_on_threads() {
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| Factor::new(&gram(600, 4, 300).0, (0..600).collect(), 0.01).unwrap().upper)
        };
        let first = of(1);
        assert!(first == of(2) && first == of(5));
    }

    #[test]
    fn factors_the_inverse() {
        let size = 96;
        let (gram, _) = gram(size, 4, 100);
        let order: Vec<usize> = (0..size).rev().collect();
        let factor = Factor::new(&gram, order, 0.01).unwrap();
        // U^T U H = 1
        let at = |m: &[f32], r: usize, c: usize| m[r * size + c] as f64;
        for row in [0, 1, 50, 95] {
            let inverse: Vec<f64> = (0..size)
                .map(|c| (0..size).map(|k| at(&factor.upper, k, row) * at(&factor.upper, k, c)).sum())
                .collect();
            for column in 0..size {
                let one: f64 = (0..size).map(|k| inverse[k] * at(&factor.hessian, k, column)).sum();
                let expected = f64::from(u8::from(row == column));
                assert!((one - expected).abs() < 1e-3, "{row} {column} {one}");
            }
        }
    }

    #[test]
    fn dead_columns_and_few_tokens_are_no_failure() {
        let mut gram = gram(64, 1, 5).0;
        for at in 0..64 {
            gram.values[at * 64 + 3] = 0.0;
            gram.values[3 * 64 + at] = 0.0;
        }
        let factor = Factor::new(&gram, (0..64).collect(), 0.01).unwrap();
        assert!(factor.upper[3 * 64 + 4..4 * 64].iter().all(|value| *value == 0.0));
        gram.values.fill(0.0);
        assert!(Factor::new(&gram, (0..64).collect(), 0.01).is_none());
    }

    #[test]
    fn loss_is_the_error_of_outputs() {
        let (size, windows, tokens) = (70, 2, 30);
        let (gram, values) = gram(size, windows, tokens);
        let changes = numbers(3 * size, 9);
        let mut expected = 0.0;
        for x in values.chunks_exact(size) {
            for row in changes.chunks_exact(size) {
                expected += row.iter().zip(x).map(|(w, x)| (w * x) as f64).sum::<f64>().powi(2);
            }
        }
        let expected = expected / 60.0;
        assert!((gram.loss(&changes) - expected).abs() < 1e-4 * expected);
    }
}
