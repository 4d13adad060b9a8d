//! The linear layer: on CPU through faer, whose float32 matmul is about twice as fast as candle's.
//!
//! faer 0.24 sends a product of one row or one column to matrix-vector loops and one of at most 16^3
//! multiplications to small kernels, which sum in other orders than its main kernel; that one sums each element
//! over the common axis in order, in parts of 512, wherever the element lies. So [`multiply_rows`] fills small
//! products up with rows of zeros and a product with one column has a loop here: then a row of the result is
//! the same bits whatever rows stand beside it.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::exp::{sum_of_pairs, vectorised};
use super::slices::{Held, values};

/// Products of at most this many multiplications take another path in faer.
const SMALL: usize = 16 * 16 * 16;

pub(super) fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let fits = match (x.dims(), weight.dims()) {
        ([.., k], [_, columns]) => k == columns,
        _ => false,
    };
    if !fits {
        bail!("linear: input {:?} and weight {:?} do not fit together", x.dims(), weight.dims());
    }
    if let Some(bias) = bias
        && bias.dims() != &weight.dims()[..1]
    {
        bail!("linear: bias {:?} does not fit weight {:?}", bias.dims(), weight.dims());
    }
    Ok(())
}

/// The shape of the result.
fn shape(x: &[usize], n: usize) -> Vec<usize> {
    let mut shape = x.to_vec();
    shape.pop();
    shape.push(n);
    shape
}

pub(super) fn plain(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let shape = shape(x.dims(), n);
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let y = x.reshape((rows, k))?.matmul(&weight.t()?)?;
    let y = if let Some(bias) = bias { y.broadcast_add(bias)? } else { y };
    y.reshape(shape)
}

pub(super) fn fused(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        None => x.apply_op2(&weight, Linear),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Linear),
    }
}

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
pub(super) fn outer(grad: &[f32], x: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
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

pub(super) struct Linear;

impl Linear {
    pub(super) fn forward(
        x: (&[f32], &Layout),
        weight: (&[f32], &Layout),
        bias: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = weight.1.shape().dims2()?;
        let shape = shape(x.1.dims(), n);
        let m: usize = shape[..shape.len() - 1].iter().product();
        if bias.is_none() && n > 1 && k > 0 && m >= least_rows(n, k) {
            let out = product(x.0, weight.0, (m, k, n));
            return Ok((CpuStorage::F32(out), shape.into()));
        }
        let mut out = match bias {
            Some(bias) => bias.repeat(m),
            None => vec![0.0; m * n],
        };
        if n == 1 && k > 0 {
            vectorised(
                #[inline(always)]
                || {
                    for (out, x) in out.iter_mut().zip(x.0.chunks_exact(k)) {
                        *out += sum_of_pairs(x, weight.0, |x, y| x * y);
                    }
                },
            );
        } else {
            multiply_rows(&mut out, x.0, MatRef::from_row_major_slice(weight.0, n, k).transpose());
        }
        Ok((CpuStorage::F32(out), shape.into()))
    }

    pub(super) fn backward(
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (x_values, weight_values, grad_values) = (Held::new(x), Held::new(weight), Held::new(&grad));
        let grad_values = grad_values.values()?;
        let m = grad_values.len() / n.max(1);
        let for_x = if x.track_op() {
            let weight = MatRef::from_row_major_slice(weight_values.values()?, n, k);
            let mut out = vec![0.0; m * k];
            multiply_rows(&mut out, grad_values, weight);
            Some(Tensor::from_vec(out, x.shape(), x.device())?)
        } else {
            None
        };
        let for_weight = if weight.track_op() {
            let out = outer(grad_values, x_values.values()?, (m, n, k));
            Some(Tensor::from_vec(out, (n, k), weight.device())?)
        } else {
            None
        };
        Ok((for_x, for_weight))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward((values(x, xl)?, xl), (values(w, wl)?, wl), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::backward(x, weight, grad)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward((values(x, xl)?, xl), (values(w, wl)?, wl), Some(values(b, bl)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (for_x, for_weight) = Self::backward(x, weight, grad)?;
        let for_bias = grad.reshape(((), bias.elem_count()))?.sum(0)?;
        Ok((for_x, for_weight, Some(for_bias)))
    }
}
