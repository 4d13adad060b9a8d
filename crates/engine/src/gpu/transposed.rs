//! Transposes of matrices, by tiles.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::parts::by_parts;
use super::program::Program;
use crate::error::Result;

static TRANSPOSED: Program = Program {
    name: "transposed",
    source: include_str!("wgsl/transposed.wgsl"),
    checked: true,
    reads: 1,
    writes: 1,
};

/// The transpose of `x [rows, columns]` to `out [columns, rows]`.
pub(super) fn transposed(
    card: &Arc<Card>,
    x: Slice<'_>,
    out: Slice<'_>,
    rows: usize,
    columns: usize,
) -> Result<()> {
    by_parts(card, (rows, columns, rows.max(columns)), |own, to| {
        let numbers = [rows, columns, own.start, own.end, to.start, to.end].map(|number| number as u32);
        let tiles = |length: usize| length.div_ceil(32) as u32;
        card.launch(&Launch {
            program: &TRANSPOSED,
            words: &[],
            slices: &[
                x.part(own.start * columns, own.len() * columns),
                out.part(to.start * rows, to.len() * rows),
            ],
            numbers: &numbers,
            groups: [tiles(to.len()), tiles(own.len()), 1],
            work: (own.len() * to.len()) as u64,
        })
    })
}
