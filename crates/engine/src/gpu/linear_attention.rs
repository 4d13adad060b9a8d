//! Linear attention with a decay.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::error::Result;
use crate::plain::{Way, check_linear_attention, linear_attention_gradients};

static LINEAR_ATTENTION: Program = program!("linear_attention", 4, 1);

/// Rows of the state that a thread has registers for.
const REGISTERS: usize = 32;
/// Columns of the state that a workgroup takes, and threads of a column.
const COLUMNS: usize = 16;

/// Whether a workgroup's registers hold 16 columns of the state, and on the way back 16 rows of it.
pub(super) fn fits(k: &Tensor, v: &Tensor) -> bool {
    let width = |x: &Tensor| x.dims().last().copied().unwrap_or(0);
    width(k).max(width(v)) <= REGISTERS * COLUMNS
}

pub(super) fn linear_attention(card: &Arc<Card>, [q, k, v, log_decay]: [&Tensor; 4]) -> Result<Tensor> {
    check_linear_attention(q, k, v, log_decay)?;
    let decay = &log_decay.detach().exp()?;
    let out = through(card, &Way { q, k, v, decay, backwards: false })?;
    let card = card.clone();
    let inputs = [q, k, v, log_decay];
    Ok(Tensor::made(v.device(), v.dims().to_vec(), out.shared(), "linear attention", &inputs, move |pull| {
        let inputs = [0, 1, 2, 3].map(|at| &pull.inputs[at]);
        linear_attention_gradients(inputs, pull.grad, pull.wanted, |way| {
            let (batch, tokens, heads) = way.decay.dims3()?;
            Ok(tensor(through(&card, way)?, &[batch, tokens, heads, way.v.dim(3)?], way.v))
        })
    }))
}

/// One way through all tokens, in parts of windows that fit a binding.
fn through(card: &Arc<Card>, way: &Way<'_>) -> Result<Memory> {
    let (batch, tokens, heads) = way.decay.dims3()?;
    let (keys, values) = (way.k.dim(3)?, way.v.dim(3)?);
    let out = card.room(batch * tokens * heads * values)?;
    let blocks = values.div_ceil(COLUMNS);
    let inputs = [way.q, way.k, way.v, way.decay];
    // Numbers of a window.
    let widths = inputs.map(|x| x.elem_count() / batch.max(1));
    let of_out = tokens * heads * values;
    let slices = [Slice::of(way.q)?, Slice::of(way.k)?, Slice::of(way.v)?, Slice::of(way.decay)?];
    let served = [way.q, way.k, way.v].map(|x| heads / x.dims()[2].max(1));
    let back = if way.backwards { "1" } else { "0" };
    let words = [("PART", keys.div_ceil(COLUMNS).to_string()), ("BACK", back.to_owned())];
    let widest = widths.iter().copied().fold(of_out, usize::max);
    for windows in row_parts(card, batch, widest) {
        let part = |at: usize| slices[at].part(windows.start * widths[at], windows.len() * widths[at]);
        let own = Slice::all(&out, batch * of_out).part(windows.start * of_out, windows.len() * of_out);
        let total = windows.len() * heads * blocks;
        let numbers = [blocks, tokens, heads, keys, values, served[0], served[1], served[2], total];
        card.launch(&Launch {
            program: &LINEAR_ATTENTION,
            words: &words,
            slices: &[part(0), part(1), part(2), part(3), own],
            numbers: &numbers.map(|number| number as u32),
            groups: card.groups_for(total),
            work: 4 * (windows.len() * of_out * keys) as u64,
        })?;
    }
    Ok(out)
}
