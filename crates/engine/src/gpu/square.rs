//! Square matrices made of other ones, element by element.

use std::ops::Range;
use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::by_parts;
use super::program::Program;
use crate::Tensor;
use crate::error::Result;

static SQUARE: Program =
    Program { name: "square", source: include_str!("wgsl/square.wgsl"), checked: true, reads: 2, writes: 1 };

/// How a square matrix is made of another one, in WGSL of a row `i`, a column `j` and an element `x`.
pub(super) struct Square<'s> {
    pub(super) row: &'s str,
    pub(super) column: &'s str,
    pub(super) value: &'s str,
    pub(super) number: f32,
}

impl Square<'_> {
    pub(super) fn run(
        &self,
        card: &Arc<Card>,
        x: Slice<'_>,
        list: Option<&Memory>,
        size: usize,
    ) -> Result<Memory> {
        let out = card.room(size * size)?;
        let rows = Rows { own: 0..size, line: size };
        self.run_rows(card, (x, rows), list, size, (Slice::all(&out, size * size), 0..size))?;
        Ok(out)
    }

    /// Rows `to` of `out [size, size]`, as far as their elements come from the rows of the source that `x` holds; others
    /// are left as they are.
    pub(super) fn run_rows(
        &self,
        card: &Arc<Card>,
        (x, rows): (Slice<'_>, Rows),
        list: Option<&Memory>,
        size: usize,
        (out, to): (Slice<'_>, Range<usize>),
    ) -> Result<()> {
        let words = [
            ("ROW", self.row.to_owned()),
            ("COLUMN", self.column.to_owned()),
            ("VALUE", self.value.to_owned()),
        ];
        by_parts(card, (rows.own.len(), to.len(), size), |own, part| {
            let source = x.part(own.start * rows.line, own.len() * rows.line);
            let (count, begin) = (part.len() * size, to.start + part.start);
            let first = rows.own.start;
            let numbers = [count, size, rows.line, begin, first + own.start, first + own.end];
            card.launch(&Launch {
                program: &SQUARE,
                words: &words,
                slices: &[
                    source,
                    list.map_or(source, |list| Slice::all(list, size)),
                    out.part(begin * size, count),
                ],
                numbers: &[&numbers.map(|number| number as u32)[..], &[self.number.to_bits()]].concat(),
                groups: card.row_of_groups(count),
                work: 8 * count as u64,
            })
        })
    }
}

/// Rows of a square matrix that some memory holds, with elements between the first ones of neighbours.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub(super) own: Range<usize>,
    pub(super) line: usize,
}

/// A tensor whose numbers nobody else holds: a copy of them if somebody does.
pub(super) fn made_alone(card: &Arc<Card>, x: &mut Tensor) -> Result<()> {
    if !x.is_alone() {
        let own = Slice::of(x)?;
        let copy = card.room(own.count)?;
        let bytes = |count: usize| count as u64 * 4;
        card.copy(own.memory.buffer()?, bytes(own.first), copy.buffer()?, 0, bytes(own.count))?;
        *x = tensor(copy, x.dims(), x);
    }
    Ok(())
}
