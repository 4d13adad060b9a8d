//! Gram matrices as they are defined, their factors as in the paper of GPTQ: the inverse, then its Cholesky factor.

use mlx_format::{FloatType, Scheme};

use crate::error::{Result, bail};
use crate::rounding::{self, How, Pending};
use crate::{LAST, REST, Tensor};

pub(crate) fn gram_add(sum: &mut Tensor, x: &Tensor) -> Result<()> {
    let x = x.reshape((REST, x.dim(LAST)?))?;
    let (rows, end) = sum.dims2()?;
    let own = x.narrow(1, end - rows, rows)?;
    *sum = (&*sum + own.t()?.matmul(&x.narrow(1, 0, end)?)?)?;
    Ok(())
}

pub(crate) fn gram_place(whole: &mut Tensor, rows: &Tensor, factor: f32) -> Result<()> {
    let (count, end) = rows.dims2()?;
    let (size, values) = (whole.dim(0)?, rows.to_vec()?);
    let mut all = whole.to_vec()?;
    for (line, row) in values.chunks_exact(end.max(1)).zip(end - count..) {
        for (column, value) in line.iter().take(row + 1).enumerate() {
            all[row * size + column] = value * factor;
            all[column * size + row] = value * factor;
        }
    }
    *whole = Tensor::from_vec(all, (size, size), whole.device())?;
    Ok(())
}

pub(crate) fn gram_finish(sum: &Tensor, factor: f32) -> Result<Tensor> {
    let (size, _) = sum.dims2()?;
    let values = sum.to_vec()?;
    let lower = |at: usize| {
        let (row, column) = (at / size, at % size);
        values[row.max(column) * size + row.min(column)] * factor
    };
    Tensor::from_vec((0..size * size).map(lower).collect(), (size, size), sum.device())
}

pub(crate) fn gram_scaled(gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let size = factors.len();
    let factors = Tensor::from_slice(factors, (size, 1), gram.device())?;
    gram.broadcast_div(&factors.broadcast_mul(&factors.t()?)?)
}

pub(crate) fn quadratic(gram: &Tensor, changes: &Tensor) -> Result<f64> {
    let products = (changes.matmul(gram)? * changes)?;
    products.read(|values| values.iter().map(|value| f64::from(*value)).sum())
}

pub(crate) fn permuted(gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
    let size = order.len();
    let ids: Vec<u32> = order.iter().map(|at| *at as u32).collect();
    let permuted = gram.rows(&ids)?.t()?.rows(&ids)?.t()?;
    let factor = |at: usize| if at / size == at % size { 1.0 } else { kept };
    let factors = (0..size * size).map(factor).collect();
    permuted * Tensor::from_vec(factors, (size, size), gram.device())?
}

/// Lower triangular `L` with `matrix = L L^T`; `None` if there is none.
fn cholesky(matrix: &[f64], size: usize) -> Option<Vec<f64>> {
    let mut lower = vec![0f64; size * size];
    for row in 0..size {
        for column in 0..=row {
            let known = (0..column).map(|k| lower[row * size + k] * lower[column * size + k]).sum::<f64>();
            let rest = matrix[row * size + column] - known;
            lower[row * size + column] = if row > column {
                rest / lower[column * size + column]
            } else if rest > 0.0 {
                rest.sqrt()
            } else {
                return None;
            };
        }
    }
    Some(lower)
}

/// The inverse of a positive definite matrix by Gauss and Jordan.
fn inverse(matrix: &[f64], size: usize) -> Vec<f64> {
    let (mut left, mut right) = (matrix.to_vec(), vec![0f64; size * size]);
    (0..size).for_each(|at| right[at * size + at] = 1.0);
    for pivot in 0..size {
        let divisor = left[pivot * size + pivot];
        for at in 0..size {
            left[pivot * size + at] /= divisor;
            right[pivot * size + at] /= divisor;
        }
        for row in (0..size).filter(|row| *row != pivot) {
            let times = left[row * size + pivot];
            for at in 0..size {
                left[row * size + at] -= times * left[pivot * size + at];
                right[row * size + at] -= times * right[pivot * size + at];
            }
        }
    }
    right
}

pub(crate) fn factor(hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
    let (size, _) = hessian.dims2()?;
    let mut damped = hessian.to_vec()?;
    (0..size).for_each(|at| damped[at * size + at] += added);
    let wide: Vec<f64> = damped.iter().map(|value| f64::from(*value)).collect();
    if cholesky(&wide, size).is_none() {
        return Ok(None);
    }
    let Some(lower) = cholesky(&inverse(&wide, size), size) else { return Ok(None) };
    let turned = (0..size * size).map(|at| lower[at % size * size + at / size] as f32).collect();
    let device = hessian.device().clone();
    let of = |values: Vec<f32>| Tensor::from_vec(values, (size, size), &device);
    let upper = of(turned)?;
    *hessian = of(damped)?;
    Ok(Some(upper))
}

/// [`factor`](crate::SecondOrder::factor) of one matrix after the other.
pub(crate) fn factors(hessians: &mut Tensor, added: &[f32]) -> Result<Vec<Option<Tensor>>> {
    let (count, _, _) = hessians.dims3()?;
    check_count(hessians, added.len())?;
    let device = hessians.device().clone();
    let mut all = (0..count).map(|at| hessians.get(at)).collect::<Result<Vec<_>>>()?;
    let uppers = all.iter_mut().zip(added).map(|(own, added)| device.factor(own, *added));
    let uppers = uppers.collect::<Result<Vec<_>>>()?;
    *hessians = Tensor::stack(&all.iter().collect::<Vec<_>>(), 0)?;
    Ok(uppers)
}

/// Refuses numbers for another number of matrices.
pub(crate) fn check_count(matrices: &Tensor, count: usize) -> Result<()> {
    let (own, rows, columns) = matrices.dims3()?;
    if rows != columns || own != count || own == 0 {
        bail!("matrices {:?} with {count} numbers cannot be factored", matrices.dims());
    }
    Ok(())
}

/// Refuses a weight that a scheme does not round.
pub(crate) fn check_round(weight: &Tensor, scheme: Scheme) -> Result<()> {
    let (_, columns) = weight.dims2()?;
    if !scheme.divides(columns) {
        bail!("a weight {:?} cannot be rounded at {scheme}", weight.dims());
    }
    Ok(())
}

pub(crate) fn round(
    weight: &Tensor,
    scheme: Scheme,
    float: FloatType,
    how: How<'_>,
) -> Result<(Pending, Tensor)> {
    check_round(weight, scheme)?;
    let (rows, columns) = weight.dims2()?;
    let moved = match how {
        How::Refined { factor, .. } | How::Compensated { factor, .. } if factor.upper.host().is_err() => {
            Some((factor.upper.to_vec()?, factor.hessian.to_vec()?))
        }
        _ => None,
    };
    let way = how.at_hand(moved.as_ref().map(|(upper, hessian)| (&upper[..], &hessian[..])))?;
    let rounded = weight.read(|values| rounding::run(values, columns, scheme, float, way))?;
    let decoded = Tensor::from_vec(rounded.decoded(), (rows, columns), weight.device())?;
    Ok((rounded.into(), decoded))
}

/// Refuses rows that do not go into so many equal parts; gives the rows of one.
pub(crate) fn check_parts(weight: &Tensor, parts: usize) -> Result<usize> {
    let (rows, _) = weight.dims2()?;
    if parts == 0 || !rows.is_multiple_of(parts) {
        bail!("a weight {:?} cannot be rounded in {parts} equal parts", weight.dims());
    }
    Ok(rows / parts)
}

/// [`round`](crate::SecondOrder::round) of one part after the other.
pub(crate) fn round_parts(
    weight: &Tensor,
    scheme: Scheme,
    float: FloatType,
    hows: &[How<'_>],
) -> Result<(Pending, Tensor)> {
    let rows = check_parts(weight, hows.len())?;
    let one = |(at, how): (usize, &How<'_>)| {
        weight.device().round(&weight.narrow(0, at * rows, rows)?, scheme, float, *how)
    };
    let all = hows.iter().enumerate().map(one).collect::<Result<Vec<_>>>()?;
    let (pending, decoded): (Vec<Pending>, Vec<Tensor>) = all.into_iter().unzip();
    Ok((Pending::joined(pending), Tensor::cat(&decoded.iter().collect::<Vec<_>>(), 0)?))
}
