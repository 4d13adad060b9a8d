//! Linear layers: plain, observed, and in codes whose grids are trained.

use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{Result, bail};
use crate::settings::{Codes, Held, Notebook};
use crate::shape::REST;
use crate::{LAST, Tensor};

/// Refuses an input, a weight and a bias that do not fit together.
pub(crate) fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
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

/// Refuses scales and centers that do not fit the codes.
pub(crate) fn check_codes(codes: &Codes, scales: &Tensor, centers: &Tensor) -> Result<()> {
    let (rows, columns) = codes.weight.dims2()?;
    if scales.dims() != [rows, columns / codes.group_size.max(1)] || centers.dims() != scales.dims() {
        bail!("packed_linear: scales {:?} for weight [{rows}, {columns}]", scales.dims());
    }
    Ok(())
}

/// Rows and groups of a row.
pub(crate) fn check_decode(scales: &Tensor, biases: &Tensor) -> Result<[usize; 2]> {
    let (rows, groups) = scales.dims2()?;
    if biases.dims() != scales.dims() {
        bail!("decode: scales {:?} and biases {:?}", scales.dims(), biases.dims());
    }
    Ok([rows, groups])
}

pub(crate) fn decode(
    held: &Held,
    (size, middle): (usize, f32),
    scales: &Tensor,
    biases: &Tensor,
) -> Result<Arc<Codes>> {
    let [rows, groups] = check_decode(scales, biases)?;
    let codes = held.host()?;
    if codes.len() != rows * groups * size {
        bail!("decode: {} codes with scales {:?} of groups of {size}", codes.len(), scales.dims());
    }
    let mut values = vec![0f32; codes.len()];
    scales.read(|scales| {
        biases.read(|biases| {
            let width = (groups * size).max(1);
            let all = values.par_chunks_mut(width).zip(codes.par_chunks(width));
            all.enumerate().for_each(|(row, (values, codes))| {
                let both = values.chunks_exact_mut(size.max(1)).zip(codes.chunks_exact(size.max(1)));
                for (group, (values, codes)) in both.enumerate() {
                    let at = row * groups + group;
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = f32::from(*code) * scales[at] + biases[at];
                    }
                }
            });
        })
    })??;
    let weight = Tensor::from_vec(values, (rows, groups * size), scales.device())?;
    Ok(Arc::new(Codes { codes: held.clone(), group_size: size, middle, weight }))
}

/// The shape of the result.
pub(crate) fn shape(x: &[usize], n: usize) -> Vec<usize> {
    let mut shape = x.to_vec();
    shape.pop();
    shape.push(n);
    shape
}

pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check(x, weight, bias)?;
    let (n, k) = weight.dims2()?;
    let shape = shape(x.dims(), n);
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let y = x.reshape((rows, k))?.matmul(&weight.t()?)?;
    let y = if let Some(bias) = bias { y.broadcast_add(bias)? } else { y };
    y.reshape(shape)
}

/// Adds squares of the features of `rows` to `sums`, in order.
fn squares(sums: &mut Vec<f64>, rows: &[f32], features: usize) {
    sums.resize(features, 0.0);
    for row in rows.chunks_exact(features.max(1)) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
}

/// Refuses rows that are not those of `x`, and weights of another number.
pub(crate) fn check_linears(x: &Tensor, rows: &[usize], weights: &[Tensor]) -> Result<()> {
    let (tokens, _) = x.dims2()?;
    if rows.len() != weights.len() || weights.is_empty() || rows.iter().sum::<usize>() != tokens {
        bail!("rows {rows:?} of inputs {:?} cannot be multiplied by {} weights", x.dims(), weights.len());
    }
    let mut first = 0;
    for (rows, weight) in rows.iter().zip(weights) {
        check(&x.narrow(0, first, *rows)?, weight, None)?;
        first += rows;
    }
    Ok(())
}

/// One after the other.
pub(crate) fn linears(x: &Tensor, rows: &[usize], weights: &[Tensor]) -> Result<Tensor> {
    check_linears(x, rows, weights)?;
    if let [weight] = weights {
        return x.device().linear(x, weight, None);
    }
    let (mut all, mut first) = (Vec::new(), 0);
    for (rows, weight) in rows.iter().zip(weights) {
        all.push(x.device().linear(&x.narrow(0, first, *rows)?, weight, None)?);
        first += rows;
    }
    Tensor::cat(&all, 0)
}

pub(crate) fn observed_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    notebook: &Notebook,
) -> Result<Tensor> {
    check(x, weight, bias)?;
    let (n, features) = weight.dims2()?;
    x.read(|values| {
        let seen = &mut notebook.open().seen;
        seen.tokens += (values.len() / features.max(1)) as u64;
        squares(&mut seen.inputs, values, features);
    })?;
    let y = linear(x, &weight.detach(), bias.map(Tensor::detach).as_ref())?;
    let notebook = notebook.clone();
    let (buffer, shape) = (y.buffer().0.clone(), y.dims().to_vec());
    Ok(Tensor::made(y.device(), shape, buffer, "observed linear", &[&y], move |pull| {
        pull.grad.read(|values| {
            let seen = &mut notebook.open().seen;
            squares(&mut seen.gradients, values, n);
        })?;
        Ok(vec![Some(pull.grad.clone())])
    }))
}

pub(crate) fn packed_linear(
    x: &Tensor,
    codes: &Arc<Codes>,
    scales: &Tensor,
    centers: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    check(x, &codes.weight, bias)?;
    check_codes(codes, scales, centers)?;
    let (rows, columns) = codes.weight.dims2()?;
    let groups = columns / codes.group_size.max(1);
    // The trained weight less itself, detached, adds nothing to the stored one but its gradient.
    let numbers: Vec<f32> = codes.codes.host()?.iter().map(|code| f32::from(*code) - codes.middle).collect();
    let numbers = Tensor::from_vec(numbers, (rows, groups, codes.group_size), x.device())?;
    let trained = numbers.broadcast_mul(&scales.unsqueeze(2)?)?.broadcast_add(&centers.unsqueeze(2)?)?;
    let trained = trained.reshape((rows, columns))?;
    let weight = (&codes.weight + (&trained - trained.detach())?)?;
    linear(x, &weight, bias.map(Tensor::detach).as_ref())
}

/// `y` summed over all axes but the last.
pub(crate) fn sum_of_rows(y: &Tensor) -> Result<Tensor> {
    let width = y.dim(LAST)?;
    y.reshape((REST, width))?.sum(0)
}
