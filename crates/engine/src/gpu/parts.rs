//! Matrices in parts of their rows that fit a binding.

use std::ops::Range;

use super::card::Card;
use crate::error::{Result, bail};

/// Launches over parts of a matrix `x` of `rows` and of a result `[out_rows, width]` that fit bindings.
pub(super) fn by_parts(
    card: &Card,
    (rows, out_rows, width): (usize, usize, usize),
    mut launch: impl FnMut(Range<usize>, Range<usize>) -> Result<()>,
) -> Result<()> {
    let step = (card.binding - card.alignment as usize / 4) / width.max(1);
    if step == 0 {
        bail!(
            "rows of {width} are more than {} sees at once; hint: compute this model with cpu",
            card.adapter.name
        );
    }
    for out in (0..out_rows).step_by(step) {
        for first in (0..rows).step_by(step) {
            launch(first..rows.min(first + step), out..out_rows.min(out + step))?;
        }
    }
    Ok(())
}

/// Rows of `width` elements in parts that fit a binding.
pub(super) fn row_parts(card: &Card, rows: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    // A row that does not fit is refused by the launch.
    let step = ((card.binding - card.alignment as usize / 4) / width.max(1)).max(1);
    let rows = if width == 0 { 0 } else { rows };
    (0..rows).step_by(step).map(move |first| first..rows.min(first + step))
}
