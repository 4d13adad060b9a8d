//! Softmax over the last axis.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::error::{Result, bail};

static SOFTMAX: Program = program!("softmax", 2, 1, "lanes");

/// Softmax of `x`, or its gradient where `x` is what softmax gave.
fn launch(card: &Arc<Card>, x: &Tensor, grad: Option<&Tensor>) -> Result<Memory> {
    let Some(&d) = x.dims().last() else { bail!("softmax of a scalar") };
    let (count, words) = (x.elem_count(), [("BACK", u8::from(grad.is_some()).to_string())]);
    let out = card.room(count)?;
    let (x, grad) = (Slice::of(x)?, Slice::of(grad.unwrap_or(x))?);
    for rows in row_parts(card, count / d.max(1), d) {
        let (first, length) = (rows.start * d, rows.len() * d);
        card.launch(&Launch {
            program: &SOFTMAX,
            words: &words,
            slices: &[
                x.part(first, length),
                grad.part(first, length),
                Slice::all(&out, count).part(first, length),
            ],
            numbers: &[rows.len() as u32, d as u32, f32::NEG_INFINITY.to_bits()],
            groups: card.groups_for(rows.len()),
            work: 32 * length as u64,
        })?;
    }
    Ok(out)
}

pub(super) fn softmax(card: &Arc<Card>, x: &Tensor) -> Result<Tensor> {
    let out = launch(card, x, None)?;
    let card = card.clone();
    Ok(Tensor::made(x.device(), x.dims().to_vec(), out.shared(), "softmax", &[x], move |pull| {
        let for_x = launch(&card, pull.output, Some(pull.grad))?;
        Ok(vec![Some(tensor(for_x, pull.grad.dims(), pull.grad))])
    }))
}
