//! Elementary operations as obvious loops, sums in float64: the reference.

use std::sync::Arc;

use crate::Tensor;
use crate::elementary::{Buffer, Combine, Map, Reduce};
use crate::engine::Engine;
use crate::error::Result;
use crate::learning::Learning;
use crate::second_order::SecondOrder;
use crate::shape::View;

/// The engine of the tests: slow and obvious.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

fn buffer(values: Vec<f32>) -> Buffer {
    Buffer::Host(Arc::new(values))
}

/// `erf(x)` by its series, or by the continued fraction of `erfc` where that would cancel.
fn erf(x: f64) -> f64 {
    if x.abs() > 3.0 {
        // Lentz's method backwards: erfc(z) = exp(-z^2) / sqrt(pi) / (z + 1/2 / (z + 1 / (z + 3/2 / ...))).
        let z = x.abs();
        let fraction = (1..60).rev().fold(z, |below, step| z + f64::from(step) / 2.0 / below);
        let tail = (-z * z).exp() / std::f64::consts::PI.sqrt() / fraction;
        return (1.0 - tail).copysign(x);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

/// `function` of one number.
fn mapped(function: Map, x: f32) -> f32 {
    let wide = f64::from(x);
    match function {
        Map::Exp => wide.exp() as f32,
        Map::Log => wide.ln() as f32,
        Map::Sqrt => x.sqrt(),
        Map::Tanh => wide.tanh() as f32,
        Map::Erf => erf(wide) as f32,
        Map::Reciprocal => 1.0 / x,
        Map::Absolute => x.abs(),
        Map::Sign if x == 0.0 => 0.0,
        Map::Sign => x.signum(),
        Map::Affine { factor, offset } => (wide * factor + offset) as f32,
        Map::Clamp { low, .. } if x < low => low,
        Map::Clamp { high, .. } if x > high => high,
        Map::Clamp { .. } => x,
        Map::Rounded(float) => float.round(x),
        Map::Within { low, high } => f32::from(u8::from(x > low && x < high)),
    }
}

/// All elements of a view, in order.
fn places(view: &View) -> Vec<usize> {
    let mut places = Vec::new();
    view.runs(|start, stride| places.extend((0..view.width()).map(|at| start + at * stride)));
    places
}

impl Learning for Plain {}

impl SecondOrder for Plain {}

impl Engine for Plain {
    fn name(&self) -> String {
        "plain".to_owned()
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        Ok(buffer(values))
    }

    fn read(&self, x: &Tensor, to: &mut dyn FnMut(&[f32])) -> Result<()> {
        to(x.host()?);
        Ok(())
    }

    fn map(&self, x: &Tensor, function: Map) -> Result<Buffer> {
        Ok(buffer(x.host()?.iter().map(|x| mapped(function, *x)).collect()))
    }

    fn combine(&self, x: &Tensor, y: &Tensor, shape: &[usize], function: Combine) -> Result<Buffer> {
        let [xs, ys] = [x, y].map(|tensor| View::broadcast(tensor.dims(), shape));
        let (x, y) = (x.host()?, y.host()?);
        let pair = |(a, b): (usize, usize)| match function {
            Combine::Add => x[a] + y[b],
            Combine::Subtract => x[a] - y[b],
            Combine::Multiply => x[a] * y[b],
            Combine::Divide => x[a] / y[b],
        };
        Ok(buffer(places(&xs?).into_iter().zip(places(&ys?)).map(pair).collect()))
    }

    fn arrange(&self, x: &Tensor, view: &View) -> Result<Buffer> {
        let x = x.host()?;
        Ok(buffer(places(view).into_iter().map(|at| x[at]).collect()))
    }

    fn scatter(&self, x: &Tensor, view: &View, count: usize) -> Result<Buffer> {
        let mut sums = vec![0f64; count];
        for (at, value) in places(view).into_iter().zip(x.host()?) {
            sums[at] += f64::from(*value);
        }
        Ok(buffer(sums.into_iter().map(|sum| sum as f32).collect()))
    }

    fn join(&self, parts: &[&Tensor], widths: &[usize]) -> Result<Buffer> {
        let mut rows = 0;
        for (part, width) in parts.iter().zip(widths) {
            rows = rows.max(part.elem_count() / (*width).max(1));
        }
        let mut out = Vec::new();
        for row in 0..rows {
            for (part, width) in parts.iter().zip(widths) {
                out.extend_from_slice(&part.host()?[row * width..(row + 1) * width]);
            }
        }
        Ok(buffer(out))
    }

    fn reduce(&self, x: &Tensor, [outer, count, inner]: [usize; 3], how: Reduce) -> Result<Buffer> {
        let x = x.host()?;
        let of = |at: usize| (0..count).map(move |step| x[(at / inner * count + step) * inner + at % inner]);
        let one = |at: usize| match how {
            Reduce::Sum => of(at).map(f64::from).sum::<f64>() as f32,
            Reduce::Largest => of(at).fold(f32::NEG_INFINITY, f32::max),
        };
        Ok(buffer((0..outer * inner).map(one).collect()))
    }

    fn multiply(&self, x: &Tensor, y: &Tensor, [batch, m, k, n]: [usize; 4]) -> Result<Buffer> {
        let (x, y) = (x.host()?, y.host()?);
        let mut out = Vec::with_capacity(batch * m * n);
        for (row, column) in (0..batch * m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let second = row / m * k;
            let term = |at: usize| f64::from(x[row * k + at]) * f64::from(y[(second + at) * n + column]);
            out.push((0..k).map(term).sum::<f64>() as f32);
        }
        Ok(buffer(out))
    }

    fn rows(&self, x: &Tensor, width: usize, ids: &[u32]) -> Result<Buffer> {
        let x = x.host()?;
        Ok(buffer(ids.iter().flat_map(|id| &x[*id as usize * width..][..width]).copied().collect()))
    }

    fn add_rows(&self, x: &Tensor, width: usize, ids: &[u32], count: usize) -> Result<Buffer> {
        let mut sums = vec![0f32; count * width];
        for (id, row) in ids.iter().zip(x.host()?.chunks_exact(width.max(1))) {
            for (sum, value) in sums[*id as usize * width..].iter_mut().zip(row) {
                *sum += value;
            }
        }
        Ok(buffer(sums))
    }
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn the_error_function_is_that_of_the_tables() {
        // Abramowitz and Stegun, table 7.1, and erfc(3.5) = 7.431e-7.
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)] {
            assert!((erf(x) - y).abs() < 1e-9 && (erf(-x) + y).abs() < 1e-9, "{x}");
        }
        assert!((1.0 - erf(3.5) - 7.430_983_723e-7).abs() < 1e-13);
        assert!((erf(3.0) - 0.999_977_909_503).abs() < 1e-11);
    }
}
