//! The gated delta rule: linear attention whose state is corrected towards each new value.

use std::sync::Arc;

use super::card::Card;
use super::elementary::{join, reduce};
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::elementary::{Buffer, Reduce};
use crate::error::Result;
use crate::plain::check_delta;

static DELTA: Program = program!("delta", 5, 1);
static DELTA_BACK: Program = program!("delta_back", 5, 3);

/// Rows of the state that a thread has registers for.
const REGISTERS: usize = 32;
/// Columns of the state that a workgroup takes, and threads of a column.
const COLUMNS: usize = 16;
/// Backwards, rows of the state that a workgroup takes at a time: four of each of a column's threads.
const CHUNK: usize = 64;
/// Tokens whose states are kept while the gradient passes them.
const SEGMENT: usize = 32;
/// Numbers of states that are kept at once, about: enough for all workgroups that a card runs side by side.
const STATES: usize = 32 << 20;

/// Words of a kernel about the decays: one for each row of a state (EACH) or of a head, and of how many inputs of a key's
/// width (WIDE) and of one number a head (NARROW) gradients are summed over columns.
fn fading(decay: &Tensor) -> [(&'static str, String); 3] {
    let (each, wide, narrow) = if decay.rank() == 4 { (1, 3, 1) } else { (0, 2, 2) };
    [("EACH", each), ("WIDE", wide), ("NARROW", narrow)].map(|(name, value)| (name, value.to_string()))
}

/// Whether a workgroup's registers hold 16 columns of the state.
pub(super) fn fits(k: &Tensor) -> bool {
    k.dims().last().is_none_or(|keys| *keys <= REGISTERS * COLUMNS)
}

pub(super) fn gated_delta(card: &Arc<Card>, [q, k, v, decay, beta]: [&Tensor; 5]) -> Result<Tensor> {
    check_delta(q, k, v, decay, beta)?;
    let (batch, tokens, heads, keys) = k.dims4()?;
    let values = v.dim(3)?;
    let out = card.room(v.elem_count())?;
    let rows = tokens * heads;
    let blocks = values.div_ceil(COLUMNS);
    let slices = [Slice::of(q)?, Slice::of(k)?, Slice::of(v)?, Slice::of(decay)?, Slice::of(beta)?];
    let decays = if decay.rank() == 4 { keys } else { 1 };
    let widths = [keys, keys, values, decays, 1, values].map(|width| width * rows);
    let [each, ..] = fading(decay);
    // Registers of a thread.
    let words = [("PART", keys.div_ceil(COLUMNS).to_string()), each];
    for windows in row_parts(card, batch, keys.max(values) * rows) {
        let [q, k, v, decay, beta] = slices;
        let mut parts = [q, k, v, decay, beta, Slice::all(&out, v.count)];
        for (part, width) in parts.iter_mut().zip(widths) {
            *part = part.part(windows.start * width, windows.len() * width);
        }
        let total = windows.len() * heads * blocks;
        card.launch(&Launch {
            program: &DELTA,
            words: &words,
            slices: &parts,
            numbers: &[blocks, tokens, heads, keys, values, total].map(|number| number as u32),
            groups: card.groups_for(total),
            work: 6 * (windows.len() * rows * keys * values) as u64,
        })?;
    }
    let card = card.clone();
    let inputs = [q, k, v, decay, beta];
    Ok(Tensor::made(v.device(), v.dims().to_vec(), out.shared(), "gated delta", &inputs, move |pull| {
        backward(&card, pull.inputs, pull.grad)
    }))
}

/// Gradients of the rule with respect to all that it takes, a window at a time.
fn backward(card: &Arc<Card>, inputs: &[Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let [q, k, v, decay, beta] = [0, 1, 2, 3, 4].map(|at| &inputs[at]);
    let (batch, tokens, heads, keys) = k.dims4()?;
    let (values, rows) = (v.dim(3)?, tokens * heads);
    let blocks = values.div_ceil(COLUMNS);
    let (decays, wide, narrow) = if decay.rank() == 4 { (keys, 3, 1) } else { (1, 2, 2) };
    // Of a block of columns what is summed over all columns: for q and k, for decay and beta.
    let (of_keys, of_rows) = (wide * rows * keys, narrow * rows);
    let of_block = of_keys + COLUMNS * of_rows;
    let of_fades = rows * (decays + 1);
    let fades = join(card, &[decay, beta], &[rows * decays, rows])?;
    let for_v = card.room(batch * rows * values)?;
    let [for_keys, for_fades] = [card.room(batch * of_keys)?, card.room(batch * of_rows)?];
    let chunks = keys.div_ceil(CHUNK);
    let state = (tokens.div_ceil(SEGMENT) + SEGMENT) * chunks * CHUNK * COLUMNS;
    let room = card.binding - card.alignment as usize / 4;
    let step =
        (room / of_block.max(1)).min(STATES.min(room) / (heads * state).max(1)).clamp(1, blocks.max(1));
    let [q, k, v, grad] = [Slice::of(q)?, Slice::of(k)?, Slice::of(v)?, Slice::of(grad)?];
    let states = card.room(step * heads * state)?;
    let [each, of_width, of_number] = fading(decay);
    let words = [("CHUNKS", chunks.to_string()), each, of_width, of_number];
    for window in 0..batch {
        let parts = card.room(blocks * of_block)?;
        for first in (0..blocks).step_by(step) {
            let count = step.min(blocks - first);
            card.launch(&Launch {
                program: &DELTA_BACK,
                words: &words,
                slices: &[
                    q.part(window * rows * keys, rows * keys),
                    k.part(window * rows * keys, rows * keys),
                    v.part(window * rows * values, rows * values),
                    grad.part(window * rows * values, rows * values),
                    Slice::all(&fades, batch * of_fades).part(window * of_fades, of_fades),
                    Slice::all(&for_v, batch * rows * values).part(window * rows * values, rows * values),
                    Slice::all(&parts, blocks * of_block).part(first * of_block, count * of_block),
                    Slice::all(&states, step * heads * state),
                ],
                numbers: &[first, count, tokens, heads, keys, values, heads * count]
                    .map(|number| number as u32),
                groups: card.groups_for(heads * count),
                work: 20 * (rows * keys * count * COLUMNS) as u64,
            })?;
        }
        let sums = reduce(card, Slice::all(&parts, blocks * of_block), [1, blocks, of_block], Reduce::Sum)?;
        let lanes = Slice::all(&sums, of_block).part(of_keys, COLUMNS * of_rows);
        let small = reduce(card, lanes, [1, COLUMNS, of_rows], Reduce::Sum)?;
        // All windows' gradients of q lie in front of those of k, and of decay in front of those of beta.
        for (from, to, width, count) in [(&sums, &for_keys, keys, wide), (&small, &for_fades, 1, narrow)] {
            for at in 0..count {
                let bytes = |rows: usize| 4 * (rows * width) as u64;
                let to_row = (at * batch + window) * rows;
                card.copy(from.buffer()?, bytes(at * rows), to.buffer()?, bytes(to_row), bytes(rows))?;
            }
        }
    }
    let (for_keys, for_fades) = (for_keys.shared(), for_fades.shared());
    let part = |buffer: &Buffer, at: usize, like: &Tensor| {
        let shape = like.dims().to_vec();
        Some(Tensor::constant(shape, buffer.clone(), at * like.elem_count(), like.device()))
    };
    Ok(vec![
        part(&for_keys, 0, &inputs[0]),
        part(&for_keys, 1, &inputs[1]),
        Some(tensor(for_v, inputs[2].dims(), &inputs[2])),
        if wide == 3 { part(&for_keys, 2, decay) } else { part(&for_fades, 0, decay) },
        part(&for_fades, narrow - 1, beta),
    ])
}
