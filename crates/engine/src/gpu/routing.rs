//! Which experts tokens go to: only their numbers come back.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::error::Result;
use crate::routing::Selection;

static ROUTE: Program = program!("route", 1, 2);

pub(super) fn route(card: &Arc<Card>, scores: &Tensor, selection: &Selection) -> Result<Vec<Vec<u32>>> {
    let (rows, experts) = scores.dims2()?;
    let top_k = selection.top_k.min(experts);
    if top_k == 0 {
        return Ok(vec![Vec::new(); rows]);
    }
    let size = selection.groups.map_or(1, |groups| experts / groups.count.max(1)).max(1);
    let groups = if selection.groups.is_some() { experts / size } else { 0 };
    let (keep, best_two) = selection.groups.map_or((0, false), |groups| (groups.keep, groups.best_two));
    let (judged, out) = (card.room(2 * rows * groups)?, card.room(rows * top_k)?);
    let x = Slice::of(scores)?;
    for own in row_parts(card, rows, experts.max(2 * groups)) {
        let sizes = [own.len(), experts, top_k, size, groups, keep].map(|number| number as u32);
        card.launch(&Launch {
            program: &ROUTE,
            words: &[("GROUPS", u8::from(groups > 0).to_string())],
            slices: &[
                x.part(own.start * experts, own.len() * experts),
                Slice::all(&judged, 2 * rows * groups).part(2 * own.start * groups, 2 * own.len() * groups),
                Slice::all(&out, rows * top_k).part(own.start * top_k, own.len() * top_k),
            ],
            numbers: &[&sizes[..], &[u32::from(best_two), f32::NEG_INFINITY.to_bits()]].concat(),
            groups: card.groups_for(own.len()),
            work: (4 * own.len() * experts * experts) as u64,
        })?;
    }
    let mut chosen = Vec::with_capacity(rows);
    card.get(&out, 0, rows * top_k, &mut |ids| {
        chosen.extend(ids.chunks_exact(top_k).map(|row| row.iter().map(|id| id.to_bits()).collect()));
    })?;
    Ok(chosen)
}
