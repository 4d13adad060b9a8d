//! Gram matrices and their factors by faer, in a fixed number of parts.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::made::PARTS;

/// Adds `x^T x` of rows `x` to the lower triangle of `sum [size, size]`.
pub(super) fn gram_add(sum: &mut [f32], x: &[f32], size: usize) {
    let x = MatRef::from_row_major_slice(x, x.len() / size.max(1), size);
    triangular::matmul(
        MatMut::from_row_major_slice_mut(sum, size, size),
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

/// The lower triangle times `factor`, on both sides.
pub(super) fn gram_finish(values: &mut [f32], size: usize, factor: f32) {
    values.par_chunks_mut(size.max(1)).for_each(|row| row.iter_mut().for_each(|value| *value *= factor));
    mirror(values, size);
}

/// Each element over the factors of its row and its column.
pub(super) fn gram_scaled(values: &[f32], factors: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    values.par_chunks_mut(factors.len().max(1)).zip(factors).for_each(|(row, &own)| {
        for (value, &other) in row.iter_mut().zip(factors) {
            *value /= own * other;
        }
    });
    values
}

/// `tr(D H D^T)`, in float64 over rows.
pub(super) fn quadratic(h: &[f32], changes: &[f32], size: usize) -> f64 {
    let rows = changes.len() / size.max(1);
    if rows == 0 {
        return 0.0;
    }
    let mut product = vec![0f32; changes.len()];
    let d = MatRef::from_row_major_slice(changes, rows, size);
    let h = MatRef::from_row_major_slice(h, size, size);
    matmul(MatMut::from_row_major_slice_mut(&mut product, rows, size), Accum::Replace, d, h, 1.0, Par::Seq);
    let row = |(d, p): (&[f32], &[f32])| -> f64 { d.iter().zip(p).map(|(d, p)| (d * p) as f64).sum() };
    changes.chunks_exact(size).zip(product.chunks_exact(size)).map(row).sum()
}

/// Rows and columns in `order`, elements beside the diagonal times `kept`.
pub(super) fn permuted(values: &[f32], order: &[usize], kept: f32) -> Vec<f32> {
    let size = order.len();
    let mut out = vec![0f32; size * size];
    out.par_chunks_mut(size.max(1)).zip(order).for_each(|(row, &from)| {
        for (value, &column) in row.iter_mut().zip(order) {
            let factor = if from == column { 1.0 } else { kept };
            *value = factor * values[from * size + column];
        }
    });
    out
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

/// Upper triangular `U` with `(H + added)^-1 = U^T U`.
///
/// The Cholesky factor of H turned about both axes, turned back, is an upper triangular `R` with `H = R R^T`, so
/// `U = R^-1`: one factorisation and one triangular inverse instead of GPTQ's two factorisations and a full inverse.
pub(super) fn inverse_factor(hessian: &[f32], size: usize, added: f32) -> Option<Vec<f32>> {
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
