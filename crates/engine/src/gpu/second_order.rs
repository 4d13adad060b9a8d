//! Gram matrices and what is made of them.

use std::sync::Arc;

use mlx_format::{FloatType, Scheme};

use super::card::Card;
use super::elementary::{bytes_of, pairs, reduce};
use super::launch::Slice;
use super::linear::tensor;
use super::product::{Finish, Matrix, Product};
use super::profile::Operation;
use super::square::{Rows, Square, made_alone};
use super::strided::Value;
use super::{Gpu, factor, rounded, units};
use crate::elementary::Reduce;
use crate::engine::Engine;
use crate::error::{Result, bail};
use crate::plain::{check_matrices, check_parts, check_round};
use crate::rounding::{How, Pending};
use crate::second_order::SecondOrder;
use crate::{LAST, Tensor};

/// Adds `x^T x` to the lower triangle of `sum`, half a product; or to rows of it.
pub(super) fn gram_add(card: &Arc<Card>, sum: &mut Tensor, x: &Tensor) -> Result<()> {
    let (own, end) = sum.dims2()?;
    let size = x.dim(LAST)?;
    if own > end || end > size {
        bail!("inputs {:?} cannot be summed to rows {:?} of a triangle", x.dims(), sum.dims());
    }
    let above = end - own;
    made_alone(card, sum)?;
    let (x, to) = (Slice::of(x)?, Slice::of(sum)?);
    let tokens = x.count / size.max(1);
    if tokens == 0 {
        return Ok(());
    }
    let lines = Matrix::of(x, size);
    // Of all inputs, so that rows have the bits that they have in the whole matrix.
    let peak = units::peak(card, x, (tokens, size))?;
    let peak = peak.as_ref().map(|peak| Slice::all(peak, 1));
    let product = Product {
        finish: Finish::Add,
        triangle: Some(above),
        loose: true,
        peak,
        ..Product::new(x, x, to, [own, tokens, end])
    };
    Product { a: lines.from(above), a_along: false, b: lines, b_along: false, ..product }.run(card)
}

/// Rows of a lower triangle times `factor`, and the columns that mirror them.
pub(super) fn gram_place(card: &Arc<Card>, whole: &mut Tensor, rows: &Tensor, factor: f32) -> Result<()> {
    let (count, end) = rows.dims2()?;
    let size = whole.dim(0)?;
    made_alone(card, whole)?;
    let own = Square { row: "max(i, j)", column: "min(i, j)", value: "x * p.number", number: factor };
    let from = Rows { own: end - count..end, line: end };
    let to = Slice::of(whole)?;
    own.run_rows(card, (Slice::of(rows)?, from), None, size, (to, 0..end))
}

/// The lower triangle times `factor`, on both sides.
pub(super) fn gram_finish(card: &Arc<Card>, sum: &Tensor, factor: f32) -> Result<Tensor> {
    let own = Square { row: "max(i, j)", column: "min(i, j)", value: "x * p.number", number: factor };
    Ok(tensor(own.run(card, Slice::of(sum)?, None, sum.dim(0)?)?, sum.dims(), sum))
}

/// Each element over the factors of its row and its column.
pub(super) fn gram_scaled(card: &Arc<Card>, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let list = card.put(bytemuck::cast_slice(factors))?;
    let value = "x / (bitcast<f32>(list[p.list_at + i]) * bitcast<f32>(list[p.list_at + j]))";
    let own = Square { row: "i", column: "j", value, number: 0.0 };
    Ok(tensor(own.run(card, Slice::of(gram)?, Some(&list), factors.len())?, gram.dims(), gram))
}

/// Rows and columns in `order`, elements beside the diagonal times `kept`.
pub(super) fn permuted(card: &Arc<Card>, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
    let order: Vec<u32> = order.iter().map(|at| *at as u32).collect();
    let list = card.put(bytes_of(&order))?;
    let own = Square {
        row: "list[p.list_at + i]",
        column: "list[p.list_at + j]",
        value: "select(x * p.number, x, i == j)",
        number: kept,
    };
    Ok(tensor(own.run(card, Slice::of(gram)?, Some(&list), order.len())?, gram.dims(), gram))
}

/// `tr(D H D^T)`: float32 within a row, float64 over rows.
pub(super) fn quadratic(card: &Arc<Card>, gram: &Tensor, changes: &Tensor) -> Result<f64> {
    let (rows, size) = changes.dims2()?;
    let product = changes.matmul(gram)?;
    let products = pairs(card, &product, changes, Value::of("x * y"))?;
    let sums = reduce(card, Slice::all(&products, rows * size), [rows, size, 1], Reduce::Sum)?;
    let mut sum = 0f64;
    card.get(&sums, 0, rows, &mut |values| sum = values.iter().map(|value| f64::from(*value)).sum())?;
    Ok(sum)
}

impl SecondOrder for Gpu {
    fn gram_add(&self, sum: &mut Tensor, x: &Tensor) -> Result<()> {
        let _operation = Operation::new("Gram");
        gram_add(&self.card, sum, x)
    }

    fn gram_place(&self, whole: &mut Tensor, rows: &Tensor, factor: f32) -> Result<()> {
        let _operation = Operation::new("Gram");
        gram_place(&self.card, whole, rows, factor)
    }

    fn gram_finish(&self, sum: Tensor, factor: f32) -> Result<Tensor> {
        let _operation = Operation::new("Gram");
        gram_finish(&self.card, &sum, factor)
    }

    fn gram_scaled(&self, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
        let _operation = Operation::new("Gram");
        gram_scaled(&self.card, gram, factors)
    }

    fn quadratic(&self, gram: &Tensor, changes: &Tensor) -> Result<f64> {
        let _operation = Operation::new("quadratic");
        quadratic(&self.card, gram, changes)
    }

    fn permuted(&self, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
        let _operation = Operation::new("factor");
        permuted(&self.card, gram, order, kept)
    }

    fn factor(&self, hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
        let _operation = Operation::new("factor");
        factor::factor(&self.card, hessian, added)
    }

    fn factors(&self, hessians: &mut Tensor, added: &[f32]) -> Result<Vec<Option<Tensor>>> {
        let _operation = Operation::new("factor");
        check_matrices(hessians, added.len())?;
        factor::factors(&self.card, hessians, added)
    }

    fn round(
        &self,
        weight: &Tensor,
        scheme: Scheme,
        float: FloatType,
        how: How<'_>,
    ) -> Result<(Pending, Tensor)> {
        let _operation = Operation::new("rounding");
        check_round(weight, scheme)?;
        if !scheme.has_biases() {
            self.leave("rounding to mxfp4, mxfp8 and nvfp4", "cards have kernels for the affine mode");
            return crate::plain::round(weight, scheme, float, how);
        }
        rounded::round_parts(&self.card, weight, scheme, float, &[how])
    }

    fn round_parts(
        &self,
        weight: &Tensor,
        scheme: Scheme,
        float: FloatType,
        hows: &[How<'_>],
    ) -> Result<(Pending, Tensor)> {
        let _operation = Operation::new("rounding");
        check_round(weight, scheme)?;
        check_parts(weight, hows.len())?;
        if !scheme.has_biases() {
            return crate::plain::round_parts(weight, scheme, float, hows);
        }
        rounded::round_parts(&self.card, weight, scheme, float, hows)
    }
}
