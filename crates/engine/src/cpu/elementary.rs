//! Elementary operations in one pass over memory.

use super::made::map_pairs;
use crate::Tensor;
use crate::elementary::{Combine, Map, Reduce};
use crate::error::Result;
use crate::exp::vectorised;
use crate::shape::View;

#[inline(always)]
fn mapped(x: &[f32], f: impl Fn(f32) -> f32) -> Vec<f32> {
    map_pairs(
        x,
        x,
        #[inline(always)]
        |x, _| f(x),
    )
}

pub(super) fn map(x: &[f32], function: Map) -> Vec<f32> {
    match function {
        Map::Exp => x.iter().map(|x| x.exp()).collect(),
        Map::Log => x.iter().map(|x| x.ln()).collect(),
        Map::Sqrt => mapped(x, f32::sqrt),
        Map::Tanh => x.iter().map(|x| x.tanh()).collect(),
        Map::Erf => mapped(x, |x| 2.0 * crate::exp::normal(x * std::f32::consts::SQRT_2) - 1.0),
        Map::Reciprocal => mapped(x, |x| 1.0 / x),
        Map::Absolute => mapped(x, f32::abs),
        Map::Sign => mapped(x, |x| if x == 0.0 { 0.0 } else { x.signum() }),
        Map::Affine { factor, offset } => {
            let (factor, offset) = (factor as f32, offset as f32);
            mapped(x, |x| x * factor + offset)
        }
        Map::Rounded(float) => x.iter().map(|x| float.round(*x)).collect(),
        // Comparisons that keep NaN.
        Map::Clamp { low, high } => mapped(x, |x| {
            let x = if x < low { low } else { x };
            if x > high { high } else { x }
        }),
        Map::Within { low, high } => mapped(x, |x| if x > low && x < high { 1.0 } else { 0.0 }),
    }
}

pub(super) fn combine(x: &Tensor, y: &Tensor, shape: &[usize], function: Combine) -> Result<Vec<f32>> {
    match function {
        Combine::Add => pairs(x, y, shape, |x, y| x + y),
        Combine::Subtract => pairs(x, y, shape, |x, y| x - y),
        Combine::Multiply => pairs(x, y, shape, |x, y| x * y),
        Combine::Divide => pairs(x, y, shape, |x, y| x / y),
    }
}

#[inline(always)]
fn pairs(x: &Tensor, y: &Tensor, shape: &[usize], f: impl Fn(f32, f32) -> f32) -> Result<Vec<f32>> {
    if x.dims() == shape && y.dims() == shape {
        return Ok(map_pairs(x.host()?, y.host()?, f));
    }
    let (xs, ys) = (View::broadcast(x.dims(), shape)?, View::broadcast(y.dims(), shape)?);
    let (x, y) = (x.host()?, y.host()?);
    let mut starts = Vec::with_capacity(y.len());
    ys.runs(|start, stride| starts.push((start, stride)));
    let (mut out, mut run, width) = (Vec::with_capacity(shape.iter().product()), 0, xs.width());
    vectorised(
        #[inline(always)]
        || {
            xs.runs(|start, stride| {
                let (other, other_stride) = starts[run];
                run += 1;
                let (x, y) = (&x[start..], &y[other..]);
                match (stride, other_stride) {
                    (1, 1) => out.extend(x[..width].iter().zip(&y[..width]).map(|(x, y)| f(*x, *y))),
                    (1, 0) => out.extend(x[..width].iter().map(|x| f(*x, y[0]))),
                    (0, 1) => out.extend(y[..width].iter().map(|y| f(x[0], *y))),
                    _ => out.extend((0..width).map(|at| f(x[at * stride], y[at * other_stride]))),
                }
            });
        },
    );
    Ok(out)
}

pub(super) fn arrange(x: &[f32], view: &View) -> Vec<f32> {
    let width = view.width();
    let mut out = Vec::with_capacity(view.shape.iter().product());
    view.runs(|start, stride| match stride {
        1 => out.extend_from_slice(&x[start..start + width]),
        _ => out.extend((0..width).map(|at| x[start + at * stride])),
    });
    out
}

pub(super) fn scatter(x: &[f32], view: &View, count: usize) -> Vec<f32> {
    let width = view.width();
    let mut out = vec![0.0; count];
    let mut rows = x.chunks_exact(width.max(1));
    view.runs(|start, stride| {
        let Some(row) = rows.next() else { return };
        if stride == 1 {
            out[start..start + width].iter_mut().zip(row).for_each(|(to, value)| *to += value);
        } else {
            row.iter().enumerate().for_each(|(at, value)| out[start + at * stride] += value);
        }
    });
    out
}

pub(super) fn join(parts: &[&[f32]], widths: &[usize]) -> Vec<f32> {
    let rows = parts.iter().zip(widths).map(|(part, width)| part.len() / (*width).max(1)).max().unwrap_or(0);
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
    for row in 0..rows {
        for (part, width) in parts.iter().zip(widths) {
            out.extend_from_slice(&part[row * width..(row + 1) * width]);
        }
    }
    out
}

pub(super) fn reduce(x: &[f32], [outer, count, inner]: [usize; 3], how: Reduce) -> Vec<f32> {
    if inner == 1 && count > 0 {
        let row = |row: &[f32]| match how {
            Reduce::Sum => vectorised(|| crate::exp::sum_of(row, |x| x)),
            Reduce::Largest => crate::exp::largest(row),
        };
        return x.chunks_exact(count).map(row).collect();
    }
    let start = if how == Reduce::Sum { 0.0 } else { f32::NEG_INFINITY };
    let mut out = vec![start; outer * inner];
    if inner == 0 || count == 0 {
        return out;
    }
    for (to, from) in out.chunks_exact_mut(inner).zip(x.chunks_exact(count * inner)) {
        for row in from.chunks_exact(inner) {
            for (to, value) in to.iter_mut().zip(row) {
                *to = match how {
                    Reduce::Sum => *to + value,
                    Reduce::Largest => to.max(*value),
                };
            }
        }
    }
    out
}

pub(super) fn rows(x: &[f32], width: usize, ids: &[u32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(ids.len() * width);
    for id in ids {
        out.extend_from_slice(&x[*id as usize * width..][..width]);
    }
    out
}

pub(super) fn add_rows(x: &[f32], width: usize, ids: &[u32], count: usize) -> Vec<f32> {
    let mut out = vec![0.0; count * width];
    for (id, row) in ids.iter().zip(x.chunks_exact(width.max(1))) {
        out[*id as usize * width..][..width].iter_mut().zip(row).for_each(|(to, value)| *to += value);
    }
    out
}
