//! Rotary position embedding over whole heads or their first features.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::program::Program;
use crate::Tensor;
use crate::error::Result;
use crate::plain::check_rotary;
use crate::settings::Pairing;

static ROTARY: Program =
    Program { name: "rotary", source: include_str!("wgsl/rotary.wgsl"), checked: true, reads: 3, writes: 1 };

/// The heads of `x`, turned by the angles of their tokens, forwards (`turn` is 1) or back (-1).
fn turned(
    card: &Arc<Card>,
    x: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    pairing: Pairing,
    turn: f32,
) -> Result<Memory> {
    let (batch, tokens, heads, d) = x.dims4()?;
    let (count, width, r) = (x.elem_count(), heads * d, cos.dim(1)?);
    let out = card.room(count)?;
    let words = [("HALVES", u8::from(pairing == Pairing::Halves).to_string())];
    let (x, cos, sin) = (Slice::of(x)?, Slice::of(cos)?, Slice::of(sin)?);
    for rows in row_parts(card, batch * tokens, width) {
        let (first, length) = (rows.start * width, rows.len() * width);
        let numbers = [length, rows.start % tokens, tokens, heads, d, r].map(|number| number as u32);
        card.launch(&Launch {
            program: &ROTARY,
            words: &words,
            slices: &[x.part(first, length), cos, sin, Slice::all(&out, count).part(first, length)],
            numbers: &[&numbers[..], &[turn.to_bits()]].concat(),
            groups: card.row_of_groups(length),
            work: 8 * length as u64,
        })?;
    }
    Ok(out)
}

pub(super) fn rotary(
    card: &Arc<Card>,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    pairing: Pairing,
) -> Result<Tensor> {
    check_rotary(x, cos, sin)?;
    let out = turned(card, x, (cos, sin), pairing, 1.0)?;
    let (card, cos, sin) = (card.clone(), cos.detach(), sin.detach());
    Ok(Tensor::made(x.device(), x.dims().to_vec(), out.shared(), "rotary", &[x], move |pull| {
        let out = turned(&card, pull.grad, (&cos, &sin), pairing, -1.0)?;
        Ok(vec![Some(tensor(out, pull.grad.dims(), pull.grad))])
    }))
}
