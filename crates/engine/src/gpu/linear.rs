//! Linear layers and their gradients: three products, none of which needs a transposed copy.

use std::sync::Arc;

use super::card::Card;
use super::launch::Slice;
use super::memory::Memory;
use super::product::{Finish, Matrix, Product};
use crate::Tensor;
use crate::error::Result;
use crate::plain::{check_linear, linear_shape, sum_of_rows};

/// A tensor in this memory.
pub(super) fn tensor(memory: Memory, shape: &[usize], like: &Tensor) -> Tensor {
    Tensor::constant(shape.to_vec(), memory.shared(), 0, like.device())
}

/// The shape of the result, and m, k and n.
pub(super) fn sizes(x: &Tensor, weight: &Tensor) -> Result<(Vec<usize>, [usize; 3])> {
    let (n, k) = weight.dims2()?;
    let shape = linear_shape(x.dims(), n);
    let m = shape[..shape.len() - 1].iter().product();
    Ok((shape, [m, k, n]))
}

/// `x [m, k] @ weight [n, k]^T (+ bias [n])`.
pub(super) fn forward(
    card: &Arc<Card>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [m, k, n]: [usize; 3],
) -> Result<Memory> {
    let out = card.room(m * n)?;
    let mut product = Product::new(Slice::of(x)?, Slice::of(weight)?, Slice::all(&out, m * n), [m, k, n]);
    product.loose = true;
    if let Some(bias) = bias {
        product.finish = Finish::Bias(Slice::of(bias)?);
    }
    product.run(card)?;
    Ok(out)
}

/// `grad [m, n] @ weight [n, k]`, of the shape of `x`.
pub(super) fn for_input(card: &Arc<Card>, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let m = grad.elem_count() / n.max(1);
    let out = card.room(x.elem_count())?;
    if n == 0 {
        card.clear(out.buffer()?);
        return Ok(tensor(out, x.dims(), x));
    }
    let to = Slice::all(&out, m * k);
    let product = Product::new(Slice::of(grad)?, Slice::of(weight)?, to, [m, n, k]);
    Product { b: Matrix::of(Slice::of(weight)?, k), b_along: false, loose: true, ..product }.run(card)?;
    Ok(tensor(out, x.dims(), x))
}

/// `grad [m, n]^T @ x [m, k]`, of the shape of the weight.
pub(super) fn for_weight(
    card: &Arc<Card>,
    x: &Tensor,
    grad: &Tensor,
    [m, k, n]: [usize; 3],
) -> Result<Tensor> {
    let out = card.room(n * k)?;
    let (a, b) = (Slice::of(grad)?, Slice::of(x)?);
    let product = Product::new(a, b, Slice::all(&out, n * k), [n, m, k]);
    let (a, b) = (Matrix::of(a, n), Matrix::of(b, k));
    Product { a, b, a_along: false, b_along: false, loose: true, ..product }.run(card)?;
    Ok(tensor(out, &[n, k], x))
}

pub(super) fn linear(card: &Arc<Card>, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check_linear(x, weight, bias)?;
    let (shape, sizes) = sizes(x, weight)?;
    let out = forward(card, x, weight, bias, sizes)?;
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let card = card.clone();
    Ok(Tensor::made(x.device(), shape, out.shared(), "linear", &inputs, move |pull| {
        let (x, weight) = (&pull.inputs[0], &pull.inputs[1]);
        let mut all = vec![None; pull.inputs.len()];
        if pull.wanted[0] {
            all[0] = Some(for_input(&card, x, weight, pull.grad)?);
        }
        if pull.wanted[1] {
            all[1] = Some(for_weight(&card, x, pull.grad, sizes)?);
        }
        if pull.wanted.get(2) == Some(&true) {
            all[2] = Some(sum_of_rows(pull.grad)?);
        }
        Ok(all)
    }))
}
