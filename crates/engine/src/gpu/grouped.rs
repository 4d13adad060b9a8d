//! Linear layers of several experts in one launch, each of its own rows.

use std::sync::Arc;

use super::card::Card;
use super::elementary::bytes_of;
use super::launch::Slice;
use super::linear::tensor;
use super::product::{Grouped, Product};
use crate::Tensor;
use crate::error::Result;
use crate::settings::Precision;

/// The slice that spans some others, if these lie in one memory.
fn span<'m>(all: &[Slice<'m>]) -> Option<Slice<'m>> {
    let first = all.first()?;
    let together = all.iter().all(|own| std::ptr::eq(own.memory, first.memory));
    let begin = all.iter().map(|own| own.first).min()?;
    let end = all.iter().map(|own| own.first + own.count).max()?;
    together.then_some(Slice { memory: first.memory, first: begin, count: end - begin })
}

/// Rows of `x [tokens, k]`, so many for each of `weights [n, k]`, by these; `None` where they have to be taken one after
/// the other: gradients are to pass or matrix units take them, weights lie in several memories or have several shapes, or something is too large.
pub(super) fn linears(
    card: &Arc<Card>,
    x: &Tensor,
    rows: &[usize],
    weights: &[Tensor],
) -> Result<Option<Tensor>> {
    let alike = weights.iter().all(|weight| weight.dims() == weights[0].dims());
    // Matrix units take whole products.
    let by_units = card.precision == Precision::Fast;
    if weights.len() < 2 || !alike || by_units || x.is_tracked() || weights.iter().any(Tensor::is_tracked) {
        return Ok(None);
    }
    let (n, k) = weights[0].dims2()?;
    let input = Slice::of(x)?;
    let own = weights.iter().map(Slice::of).collect::<Result<Vec<_>>>()?;
    let Some(held) = span(&own) else { return Ok(None) };
    let total = input.count / k.max(1);
    let reaches = [input.count, held.count, total * n];
    let room = card.binding - card.alignment as usize / 4;
    let large = reaches.iter().any(|reach| *reach > room) || 2 * (total * n * k) as u64 > card.work;
    if n * k * total == 0 || large || rows.len() > card.groups as usize {
        return Ok(None);
    }
    let out = card.room(total * n)?;
    let (mut table, mut first) = (Vec::new(), 0);
    for (weight, rows) in own.iter().zip(rows) {
        let places = [*rows, first * k, weight.first - held.first, first * n];
        table.extend(places.map(|number| number as u32));
        first += rows;
    }
    let list = card.put(bytes_of(&table))?;
    let table = Slice::all(&list, table.len());
    let grouped = Grouped { table, most: rows.iter().copied().max().unwrap_or(0), reaches };
    let sizes = [total.div_ceil(rows.len()), k, n];
    let product = Product::new(input, held, Slice::all(&out, total * n), sizes);
    Product { batch: [rows.len(), 1], grouped: Some(grouped), ..product }.run(card)?;
    Ok(Some(tensor(out, &[total, n], x)))
}
