//! The gated delta rule: linear attention whose state is corrected towards each new value.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::parts::row_parts;
use super::program::Program;
use crate::Tensor;
use crate::error::Result;
use crate::plain::check_delta;

static DELTA: Program =
    Program { name: "delta", source: include_str!("wgsl/delta.wgsl"), checked: true, reads: 5, writes: 1 };

/// Rows of the state that a thread has registers for.
const REGISTERS: usize = 32;
/// Columns of the state that a workgroup takes, and threads of a column.
const COLUMNS: usize = 16;

pub(super) fn gated_delta(card: &Arc<Card>, [q, k, v, decay, beta]: [&Tensor; 5]) -> Result<Tensor> {
    check_delta(q, k, v, decay, beta)?;
    let (batch, tokens, heads, keys) = k.dims4()?;
    let values = v.dim(3)?;
    if keys > REGISTERS * COLUMNS {
        return crate::plain::gated_delta(q, k, v, decay, beta);
    }
    let out = card.room(v.elem_count())?;
    let rows = tokens * heads;
    let blocks = values.div_ceil(COLUMNS);
    let slices = [Slice::of(q)?, Slice::of(k)?, Slice::of(v)?, Slice::of(decay)?, Slice::of(beta)?];
    let widths = [keys, keys, values, 1, 1, values].map(|width| width * rows);
    // Registers of a thread.
    let words = [("PART", keys.div_ceil(COLUMNS).to_string())];
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
    // Backwards through the elementary operations, computed anew.
    Ok(Tensor::made(
        v.device(),
        v.dims().to_vec(),
        out.shared(),
        "gated delta",
        &[q, k, v, decay, beta],
        |pull| {
            let all: Vec<Tensor> = pull.inputs.iter().map(Tensor::variable).collect();
            let y = crate::plain::gated_delta(&all[0], &all[1], &all[2], &all[3], &all[4])?;
            let gradients = y.gradients(pull.grad)?;
            Ok(all.iter().map(|input| gradients.get(input).cloned()).collect())
        },
    ))
}
