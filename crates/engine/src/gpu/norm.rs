//! Norms over the last axis.

use std::sync::Arc;

use super::card::Card;
use super::elementary::reduce;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::elementary::Reduce;
use crate::error::{Result, bail};
use crate::plain::{check_norm, sum_of_rows};

static NORM: Program = program!("norm", 3, 2, "lanes");

/// What a norm is of.
#[derive(Clone, Copy)]
struct Norm {
    centred: bool,
    eps: f64,
}

impl Norm {
    /// Launches the kernel over all rows. `other` is a bias, or with `back` the gradient. Of the two memories the
    /// second has, with `each`, what the weight's gradient is the sum of.
    fn launch(
        self,
        card: &Arc<Card>,
        x: &Tensor,
        weight: Option<&Tensor>,
        other: Option<&Tensor>,
        back: bool,
        each: bool,
    ) -> Result<(Memory, Memory)> {
        let Some(&d) = x.dims().last() else { bail!("norm of a scalar") };
        let count = x.elem_count();
        let (out, products) = (card.room(count)?, card.room(if each { count } else { 1 })?);
        let lanes: usize = if d <= 256 { 64 } else { 256 };
        let parameter = weight.or(if back { None } else { other });
        let parameters = parameter.map_or(1, |parameter| parameter.elem_count() / d.max(1)).max(1);
        let flag = |holds: bool| u8::from(holds).to_string();
        let words = [
            ("LANES", lanes.to_string()),
            ("CENTRED", flag(self.centred)),
            ("BACK", flag(back)),
            ("EACH", flag(each)),
            ("WEIGHT", flag(weight.is_some())),
            ("BIAS", flag(!back && other.is_some())),
        ];
        let x_slice = Slice::of(x)?;
        let weight_slice = weight.map_or(Ok(x_slice.part(0, d.min(count))), Slice::of)?;
        let other_slice = other.map_or(Ok(weight_slice), Slice::of)?;
        for rows in row_parts(card, count / d.max(1), d) {
            let (first, length) = (rows.start * d, rows.len() * d);
            let numbers = [rows.len(), rows.start, d, parameters].map(|number| number as u32);
            card.launch(&Launch {
                program: &NORM,
                words: &words,
                slices: &[
                    x_slice.part(first, length),
                    weight_slice,
                    if back { other_slice.part(first, length) } else { other_slice },
                    Slice::all(&out, count).part(first, length),
                    if each {
                        Slice::all(&products, count).part(first, length)
                    } else {
                        Slice::all(&products, 1)
                    },
                ],
                numbers: &[&numbers[..], &[(self.eps as f32).to_bits()]].concat(),
                groups: card.groups_for(rows.len()),
                work: 16 * length as u64,
            })?;
        }
        Ok((out, products))
    }
}

pub(super) fn rms_norm(card: &Arc<Card>, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check_norm(x, weight, "weight of rms_norm")?;
    norm(card, x, weight, None, Norm { centred: false, eps })
}

pub(super) fn layer_norm(
    card: &Arc<Card>,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    check_norm(x, weight, "weight of layer_norm")?;
    check_norm(x, bias, "bias of layer_norm")?;
    let own = Norm { centred: true, eps };
    match bias {
        // A bias of another shape than the weight's counts rows in its own way.
        Some(bias) if weight.is_none_or(|weight| weight.dims() != bias.dims()) => {
            norm(card, x, weight, None, own)?.broadcast_add(bias)
        }
        bias => norm(card, x, weight, bias, own),
    }
}

fn norm(
    card: &Arc<Card>,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    own: Norm,
) -> Result<Tensor> {
    let (out, _) = own.launch(card, x, weight, bias, false, false)?;
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(weight).chain(bias).collect();
    let card = card.clone();
    Ok(Tensor::made(x.device(), x.dims().to_vec(), out.shared(), "norm", &inputs, move |pull| {
        let (x, weight) = (&pull.inputs[0], pull.inputs.get(1));
        let each = pull.wanted.get(1) == Some(&true);
        let (for_x, products) = own.launch(&card, x, weight, Some(pull.grad), true, each)?;
        let mut all = vec![Some(tensor(for_x, x.dims(), x))];
        if let Some(weight) = weight {
            let products = Slice::all(&products, x.elem_count());
            all.push(if each { Some(over_rows(&card, products, weight)?) } else { None });
        }
        if let Some(bias) = pull.inputs.get(2) {
            let width = bias.elem_count();
            let sum = if pull.wanted[2] {
                Some(sum_of_rows(&pull.grad.reshape((crate::REST, width))?)?.reshape(bias.dims())?)
            } else {
                None
            };
            all.push(sum);
        }
        Ok(all)
    }))
}

/// The sum over all rows of a parameter's size, of its shape.
fn over_rows(card: &Arc<Card>, products: Slice<'_>, parameter: &Tensor) -> Result<Tensor> {
    let width = parameter.elem_count();
    let sum = reduce(card, products, [1, products.count / width.max(1), width], Reduce::Sum)?;
    Ok(tensor(sum, parameter.dims(), parameter))
}
