//! Products of matrices and linear layers, through faer.
//!
//! faer 0.24 has other paths for small products: one row or one column goes to matrix-vector loops, at most 16^3
//! multiplications to small kernels, and these sum in other orders than its main kernel, which sums each element over
//! the common axis in order, in parts of 512, wherever the element lies. So [`multiply_rows`] fills small products up
//! with rows of zeros, and a product with one column has a loop here. Then a row of the result is the same bits
//! whatever rows stand beside it.

use std::sync::Arc;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::made::{buffer, tensor};
use crate::Tensor;
use crate::error::Result;
use crate::exp::{sum_of_pairs, vectorised};
use crate::plain::{check_codes, check_linear as check, linear_shape as shape, sum_of_rows};
use crate::settings::{Codes, Notebook, by_group};

/// Products of at most this many multiplications take another path in faer.
const SMALL: usize = 16 * 16 * 16;

/// Rows from which on faer's main kernel does the work.
fn least_rows(n: usize, k: usize) -> usize {
    (SMALL / (n * k) + 1).max(2)
}

/// `x [m, k] @ weight [n, k]^T` into memory that nobody wrote before: zeroing it would cost a pass over it.
fn product(x: &[f32], weight: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let mut out = Vec::with_capacity(m * n);
    let weight = MatRef::from_row_major_slice(weight, n, k).transpose();
    // SAFETY: the capacity is m rows of n; the product replaces every element and reads none.
    unsafe {
        let to = MatMut::from_raw_parts_mut(out.as_mut_ptr(), m, n, n.cast_signed(), 1);
        matmul(to, Accum::Replace, MatRef::from_row_major_slice(x, m, k), weight, 1.0, Par::Seq);
        out.set_len(m * n);
    }
    out
}

/// `grad [m, n]^T @ x [m, k]`, into memory that nobody wrote before.
fn outer(grad: &[f32], x: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    if m == 0 {
        return vec![0.0; n * k];
    }
    let mut out = Vec::with_capacity(n * k);
    let grad = MatRef::from_row_major_slice(grad, m, n).transpose();
    // SAFETY: the capacity is n rows of k; the product replaces every element and reads none.
    unsafe {
        let to = MatMut::from_raw_parts_mut(out.as_mut_ptr(), n, k, k.cast_signed(), 1);
        matmul(to, Accum::Replace, grad, MatRef::from_row_major_slice(x, m, k), 1.0, Par::Seq);
        out.set_len(n * k);
    }
    out
}

/// `out [m, n] += x [m, k] @ weight`, with `weight [k, n]` as a view; each row of `out` alone.
fn multiply_rows(out: &mut [f32], x: &[f32], weight: MatRef<'_, f32>) {
    let (k, n) = (weight.nrows(), weight.ncols());
    if out.is_empty() || k == 0 {
        return;
    }
    let m = out.len() / n;
    let least = least_rows(n, k);
    if m < least {
        let mut filled_x = vec![0.0; least * k];
        filled_x[..x.len()].copy_from_slice(x);
        let mut filled_out = vec![0.0; least * n];
        filled_out[..out.len()].copy_from_slice(out);
        multiply_rows(&mut filled_out, &filled_x, weight);
        out.copy_from_slice(&filled_out[..out.len()]);
        return;
    }
    let x = MatRef::from_row_major_slice(x, m, k);
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    matmul(out, Accum::Add, x, weight, 1.0, Par::Seq);
}

/// `x [m, k] @ weight [n, k]^T (+ bias [n])`.
fn forward(x: &[f32], weight: &[f32], bias: Option<&[f32]>, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    if bias.is_none() && n > 1 && k > 0 && m >= least_rows(n, k) {
        return product(x, weight, (m, k, n));
    }
    let mut out = match bias {
        Some(bias) => bias.repeat(m),
        None => vec![0.0; m * n],
    };
    if n == 1 && k > 0 {
        vectorised(
            #[inline(always)]
            || {
                for (out, x) in out.iter_mut().zip(x.chunks_exact(k)) {
                    *out += sum_of_pairs(x, weight, |x, y| x * y);
                }
            },
        );
    } else {
        multiply_rows(&mut out, x, MatRef::from_row_major_slice(weight, n, k).transpose());
    }
    out
}

/// `grad [.., n] @ weight [n, k]`, of the shape of `x`.
fn for_input(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let mut out = vec![0.0; x.elem_count()];
    multiply_rows(&mut out, grad.host()?, MatRef::from_row_major_slice(weight.host()?, n, k));
    tensor(out, x.dims(), x)
}

fn sizes(x: &Tensor, weight: &Tensor) -> Result<(Vec<usize>, (usize, usize, usize))> {
    let (n, k) = weight.dims2()?;
    let shape = shape(x.dims(), n);
    let m = shape[..shape.len() - 1].iter().product();
    Ok((shape, (m, k, n)))
}

pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check(x, weight, bias)?;
    let (shape, (m, k, n)) = sizes(x, weight)?;
    let out = forward(x.host()?, weight.host()?, bias.map(Tensor::host).transpose()?, (m, k, n));
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    Ok(Tensor::made(x.device(), shape, buffer(out), "linear", &inputs, move |pull| {
        let (x, weight) = (&pull.inputs[0], &pull.inputs[1]);
        let mut all = vec![None; pull.inputs.len()];
        if pull.wanted[0] {
            all[0] = Some(for_input(x, weight, pull.grad)?);
        }
        if pull.wanted[1] {
            all[1] = Some(tensor(outer(pull.grad.host()?, x.host()?, (m, n, k)), &[n, k], x)?);
        }
        if pull.wanted.get(2) == Some(&true) {
            all[2] = Some(sum_of_rows(pull.grad)?);
        }
        Ok(all)
    }))
}

fn squares(sums: &mut Vec<f64>, rows: &[f32], features: usize) {
    sums.resize(features, 0.0);
    vectorised(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(features.max(1)) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += f64::from(*value) * f64::from(*value);
                }
            }
        },
    );
}

/// Adds a bias that no gradient reaches.
fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        None => Ok(y),
        Some(bias) => y.broadcast_add(&bias.detach()),
    }
}

pub(super) fn observed_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    notebook: &Notebook,
) -> Result<Tensor> {
    check(x, weight, bias)?;
    let (shape, (m, k, n)) = sizes(x, weight)?;
    {
        let seen = &mut notebook.open().seen;
        seen.tokens += m as u64;
        squares(&mut seen.inputs, x.host()?, k);
    }
    let out = forward(x.host()?, weight.host()?, None, (m, k, n));
    let (notebook, weight) = (notebook.clone(), weight.detach());
    let y = Tensor::made(x.device(), shape, buffer(out), "observed linear", &[x], move |pull| {
        {
            let seen = &mut notebook.open().seen;
            squares(&mut seen.gradients, pull.grad.host()?, n);
        }
        Ok(vec![Some(for_input(&pull.inputs[0], &weight, pull.grad)?)])
    });
    with_bias(y, bias)
}

pub(super) fn packed_linear(
    x: &Tensor,
    codes: &Arc<Codes>,
    scales: &Tensor,
    centers: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    check(x, &codes.weight, bias)?;
    check_codes(codes, scales, centers)?;
    let (shape, (m, k, n)) = sizes(x, &codes.weight)?;
    let out = forward(x.host()?, codes.weight.host()?, None, (m, k, n));
    let codes = codes.clone();
    let inputs = [x, scales, centers];
    let y = Tensor::made(x.device(), shape, buffer(out), "packed linear", &inputs, move |pull| {
        let (x, grad) = (&pull.inputs[0], pull.grad);
        let for_x = if pull.wanted[0] { Some(for_input(x, &codes.weight, grad)?) } else { None };
        let for_weight = outer(grad.host()?, x.host()?, (m, n, k));
        let (for_scales, for_centers) =
            by_group(&for_weight, codes.codes.host()?, codes.group_size, codes.middle);
        let like = |values| tensor(values, pull.inputs[1].dims(), x);
        Ok(vec![for_x, Some(like(for_scales)?), Some(like(for_centers)?)])
    });
    with_bias(y, bias)
}

/// `x [batch, m, k] @ y [batch, k, n]`.
pub(super) fn multiply(x: &[f32], y: &[f32], [batch, m, k, n]: [usize; 4]) -> Vec<f32> {
    let mut out = vec![0.0; batch * m * n];
    if out.is_empty() || k == 0 {
        return out;
    }
    let each = x.chunks_exact(m * k).zip(y.chunks_exact(k * n));
    for (to, (x, y)) in out.chunks_exact_mut(m * n).zip(each) {
        multiply_rows(to, x, MatRef::from_row_major_slice(y, k, n));
    }
    out
}
