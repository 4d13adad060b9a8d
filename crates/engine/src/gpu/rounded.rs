//! Weights on their way to `rounding` and back: turned, in the order of rounding, and packed.

use std::sync::Arc;

use mlx_format::{FloatType, Scheme};

use super::card::Card;
use super::elementary::gathered_rows;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::program::{Program, program};
use super::rounding::{ROWS, Squares, Task};
use super::transposed::transposed;
use crate::error::Result;
use crate::rounding::{How, Pending, Rounded};
use crate::{Factor, Tensor};

static PACK: Program = program!("pack", 1, 1);

/// Elements of a part of a weight, about.
const PART: usize = 128 << 20;

/// Matrices of one size one behind the other: as they lie, or as copies.
struct Stack<'t> {
    seen: Slice<'t>,
    copy: Option<Memory>,
}

impl<'t> Stack<'t> {
    fn of<'f: 't>(card: &Arc<Card>, tensors: impl Iterator<Item = &'f Tensor>) -> Result<Self> {
        let all = tensors.map(Slice::of).collect::<Result<Vec<_>>>()?;
        let (first, size) = (all[0], all[0].count);
        let whole = Slice { count: all.len() * size, ..first };
        let behind = |(at, own): (usize, &Slice<'_>)| {
            std::ptr::eq(own.memory, first.memory) && own.first == first.first + at * size
        };
        if all.iter().enumerate().all(behind) {
            return Ok(Self { seen: whole, copy: None });
        }
        let copy = card.room(whole.count)?;
        let bytes = |numbers: usize| 4 * numbers as u64;
        for (at, own) in all.iter().enumerate() {
            card.copy(own.memory.buffer()?, bytes(own.first), copy.buffer()?, bytes(at * size), bytes(size))?;
        }
        Ok(Self { seen: whole, copy: Some(copy) })
    }

    fn slice(&self) -> Slice<'_> {
        self.copy.as_ref().map_or(self.seen, |copy| Slice::all(copy, self.seen.count))
    }
}

/// Orders of columns, one for each member of a task, and where each column of a weight stands in them; of natural orders
/// nothing.
struct Orders {
    columns: usize,
    /// Columns in the order in which they are rounded.
    rounded: Vec<u32>,
    places: Vec<u32>,
}

impl Orders {
    fn new(factors: &[&Factor], columns: usize) -> Option<Self> {
        let natural = |factor: &&Factor| factor.order.iter().enumerate().all(|(at, column)| at == *column);
        if factors.iter().all(natural) {
            return None;
        }
        let orders: Vec<u32> =
            factors.iter().flat_map(|factor| &factor.order).map(|column| *column as u32).collect();
        let mut places = vec![0u32; orders.len()];
        for (order, places) in orders.chunks_exact(columns).zip(places.chunks_exact_mut(columns)) {
            (0u32..).zip(order).for_each(|(at, column)| places[*column as usize] = at);
        }
        Some(Self { columns, rounded: orders, places })
    }

    /// Where the groups of a member's weight lie.
    fn groups(&self, member: usize, group: usize) -> Vec<usize> {
        let places = &self.places[member * self.columns..(member + 1) * self.columns];
        places.iter().step_by(group).map(|place| *place as usize / group).collect()
    }
}

/// Some rows of a rounded weight on a card.
struct Part {
    /// Packed codes, scales and biases one after the other.
    all: Memory,
    rows: usize,
    /// Of a member.
    own: usize,
    /// Numbers of four codes.
    words: usize,
    /// Where each group of a member's rows lies.
    groups: Vec<Vec<usize>>,
}

impl Part {
    fn fetch(&self, rounded: &mut Rounded) -> Result<()> {
        let Self { all, rows, own, words, groups } = self;
        let grids = rows * groups.first().map_or(0, Vec::len);
        all.card().get(all, 0, words + 2 * grids, &mut |numbers| {
            let (codes, numbers) = numbers.split_at(*words);
            rounded.codes.extend_from_slice(bytemuck::cast_slice(codes));
            let (scales, biases) = numbers.split_at(grids);
            for (numbers, to) in [(scales, &mut rounded.scales), (biases, &mut rounded.biases)] {
                for row in 0..*rows {
                    to.extend(groups[row / own].iter().map(|group| numbers[group * rows + row]));
                }
            }
        })
    }
}

impl Task<'_> {
    /// Something `[columns, rows]` as `[rows, columns]`, in the weight's own order.
    fn in_order(&self, memory: &Memory, orders: Option<&Orders>, out: Slice<'_>) -> Result<()> {
        let all = self.all(memory);
        let gathered = orders.map(|orders| gathered_rows(self.card, all, self.width(), &orders.places));
        let gathered = gathered.transpose()?;
        let all = gathered.as_ref().map_or(all, |gathered| self.all(gathered));
        transposed(self.card, all, out, self.columns, self.rows)
    }

    /// Columns of all members, and of one.
    fn width(&self) -> (usize, usize) {
        (self.rows, self.own)
    }

    /// Into the places of the weight's own order: the decoded weight to `decoded`; gives everything else.
    fn give(mut self, orders: Option<&Orders>, decoded: Slice<'_>) -> Result<Part> {
        self.in_order(&self.values, orders, decoded)?;
        let count = self.columns * self.rows;
        // Codes go where values were.
        let codes = std::mem::replace(&mut self.values, self.card.room(0)?);
        self.in_order(&self.codes, orders, Slice::all(&codes, count))?;
        // Packed codes, scales and biases one after the other: the card is waited for once.
        let groups = self.columns / self.group;
        let (words, grids) = (count / 4, groups * self.rows);
        let all = self.card.room(words + 2 * grids)?;
        self.card.launch(&Launch {
            program: &PACK,
            words: &[],
            slices: &[Slice::all(&codes, count), Slice::all(&all, words)],
            numbers: &[words as u32],
            groups: self.card.row_of_groups(words),
            work: count as u64,
        })?;
        let bytes = |numbers: usize| 4 * numbers as u64;
        for (from, first) in [(&self.scales, words), (&self.biases, words + grids)] {
            self.card.copy(from.buffer()?, 0, all.buffer()?, bytes(first), bytes(grids))?;
        }
        let own = |member| match orders {
            None => (0..groups).collect(),
            Some(orders) => orders.groups(member, self.group),
        };
        let groups = (0..self.rows / self.own.max(1)).map(own).collect();
        Ok(Part { all, rows: self.rows, own: self.own.max(1), words, groups })
    }
}

/// The factor of a second-order way to round.
fn factor_of<'h>(how: &How<'h>) -> Option<&'h Factor> {
    match how {
        How::Refined { factor, .. } | How::Compensated { factor, .. } => Some(factor),
        _ => None,
    }
}

/// How rows are taken together.
struct Shares {
    /// Rows of a task.
    step: usize,
    /// Members of a task; one where a member's rows are more than a task takes.
    members: usize,
}

fn shares(card: &Card, (rows, columns): (usize, usize), hows: &[How<'_>]) -> Shares {
    let room = card.binding - card.alignment as usize / 4;
    let rows_of_part = PART.min(room) / columns.max(1);
    // The search takes 4 rows with each of its workgroups.
    let most = (rows_of_part / ROWS * ROWS).clamp(ROWS, 2 * card.groups as usize / ROWS * ROWS);
    let own = rows / hows.len().max(1);
    let members = (most / own.max(1)).min(room / (columns * columns).max(1)).min(hows.len());
    let alike = |how: &How<'_>| match (how, &hows[0]) {
        (
            How::Compensated { block_size, sweeps, .. },
            How::Compensated { block_size: other, sweeps: others, .. },
        )
        | (How::Refined { block_size, sweeps, .. }, How::Refined { block_size: other, sweeps: others, .. }) => {
            (block_size, sweeps) == (other, others)
        }
        _ => false,
    };
    if members > 1 && own.is_multiple_of(ROWS) && hows.iter().all(alike) {
        return Shares { step: members * own, members };
    }
    // Parts of about one size: a small last one would leave a card idle.
    let step = own.div_ceil(own.div_ceil(most).max(1)).next_multiple_of(ROWS).max(ROWS);
    Shares { step, members: 1 }
}

/// Rounds weights below each other, equally many rows for each of `hows`.
pub(super) fn round_parts(
    card: &Arc<Card>,
    weight: &Tensor,
    scheme: Scheme,
    float: FloatType,
    hows: &[How<'_>],
) -> Result<(Pending, Tensor)> {
    let (rows, columns) = weight.dims2()?;
    let (all, decoded) = (Slice::of(weight)?, card.room(rows * columns)?);
    let Shares { step, members } = shares(card, (rows, columns), hows);
    let of_member = rows / hows.len().max(1);
    let mut parts = Vec::new();
    for (at, hows) in hows.chunks(members).enumerate() {
        let factors: Vec<&Factor> = hows.iter().filter_map(factor_of).collect();
        let orders = Orders::new(&factors, columns);
        let stacks = if factors.is_empty() {
            None
        } else {
            let uppers = Stack::of(card, factors.iter().map(|factor| &factor.upper))?;
            Some((uppers, Stack::of(card, factors.iter().map(|factor| &factor.hessian))?))
        };
        let squares = stacks.as_ref().map(|(uppers, hessians)| Squares {
            upper: uppers.slice(),
            hessian: hessians.slice(),
            apart: columns * columns,
        });
        let first = at * members * of_member;
        let end = first + hows.len() * of_member;
        for first in (first..end).step_by(step) {
            let own = step.min(end - first);
            let (start, count) = (first * columns, own * columns);
            let source = Source { card, columns, scheme, float, orders: orders.as_ref() };
            let task = source.task(all.part(start, count), own, own / hows.len())?;
            task.run(hows[0], squares.as_ref())?;
            let to = Slice::all(&decoded, rows * columns).part(start, count);
            parts.push(task.give(orders.as_ref(), to)?);
        }
    }
    let pending = Pending::new(rows, move || {
        let count = rows * columns / scheme.group_size();
        let mut rounded = Rounded {
            scheme,
            columns,
            codes: Vec::with_capacity(rows * columns),
            scales: Vec::with_capacity(count),
            biases: Vec::with_capacity(count),
        };
        parts.iter().try_for_each(|part| part.fetch(&mut rounded))?;
        Ok(rounded)
    });
    Ok((pending, tensor(decoded, weight.dims(), weight)))
}

/// What a weight's rows are brought with.
struct Source<'s> {
    card: &'s Arc<Card>,
    columns: usize,
    scheme: Scheme,
    float: FloatType,
    orders: Option<&'s Orders>,
}

impl<'s> Source<'s> {
    /// Brings `rows` rows, `own` of a member.
    fn task(&self, part: Slice<'_>, rows: usize, own: usize) -> Result<Task<'s>> {
        let Self { card, columns, scheme, float, orders } = *self;
        let count = rows * columns;
        let turned = card.room(count)?;
        transposed(card, part, Slice::all(&turned, count), rows, columns)?;
        let values = match orders {
            None => turned,
            Some(orders) => gathered_rows(card, Slice::all(&turned, count), (rows, own), &orders.rounded)?,
        };
        let groups = columns / scheme.group_size() * rows;
        Ok(Task {
            card,
            rows,
            own,
            columns,
            group: scheme.group_size(),
            bits: scheme.bits(),
            float,
            values,
            codes: card.room(count)?,
            scales: card.room(groups)?,
            biases: card.room(groups)?,
        })
    }
}
