//! Rounding to searched grids, with GPTQ's compensation and sweeps of coordinate descent: what `rounding/` does on the
//! processor, with all rows of a weight side by side.
//!
//! A weight lies transposed, `[columns, rows]`, in the order in which columns are rounded. A launch takes a group of
//! columns; what its errors do to later columns of its block, and then to those behind the block, are products. Rows
//! are independent, so a weight that is larger than a binding goes in parts of its rows.

use std::ops::Range;
use std::sync::Arc;

use mlx_format::{FloatType, Scheme};

use super::card::Card;
use super::elementary::{gathered_rows, rounded_to};
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::product::{Finish, Matrix, Product};
use super::program::{Program, program};
use super::strided::{Strided, Value, elements};
use super::transposed::transposed;
use crate::error::Result;
use crate::rounding::{CAREFUL, How, Pending, Rounded, Search, reach};
use crate::{Factor, Tensor};

static SEARCH: Program = program!("search", 2, 2, "grid");
static NEAREST: Program = program!("nearest", 2, 2, "grid");
static COMPENSATE: Program = program!("compensate", 3, 3, "grid");
static SWEEP: Program = program!("sweep", 2, 5, "grid");
static PACK: Program = program!("pack", 1, 1);

/// Elements of a part of a weight, about.
const PART: usize = 128 << 20;
/// Rows of a part are a multiple of this.
const ROWS: usize = 32;
/// Columns of a block at least: with fewer, what its errors do to later columns is more memory traffic than arithmetic.
const BLOCK: usize = 512;
/// Columns of a block of a sweep: the gradient of fewer is a product that leaves a card's processors idle.
const SWEPT: usize = 1024;
/// Candidates of the search: the grid of `mx.quantize`, and 7 positions of each edge.
const CANDIDATES: u32 = 50;

/// Some rows of a weight while they are rounded.
struct Task<'t> {
    card: &'t Arc<Card>,
    rows: usize,
    columns: usize,
    group: usize,
    bits: u32,
    float: FloatType,
    /// `[columns, rows]`, in rounding order; after rounding, what the stored numbers decode to.
    values: Memory,
    /// `[columns, rows]`, as numbers.
    codes: Memory,
    /// `[groups, rows]`.
    scales: Memory,
    /// `[groups, rows]`.
    biases: Memory,
}

impl<'t> Task<'t> {
    fn most(&self) -> u32 {
        (((1u32 << self.bits) - 1) as f32).to_bits()
    }

    fn all(&'t self, memory: &'t Memory) -> Slice<'t> {
        Slice::all(memory, self.columns * self.rows)
    }

    /// Columns `first..first + count` of something `[columns, rows]`.
    fn columns_of(&'t self, memory: &'t Memory, first: usize, count: usize) -> Slice<'t> {
        self.all(memory).part(first * self.rows, count * self.rows)
    }

    /// Scales and biases of the groups that begin at column `start`.
    fn grids(&self, start: usize, groups: usize) -> [Slice<'_>; 2] {
        let (first, all) = (start / self.group, self.columns / self.group);
        [&self.scales, &self.biases]
            .map(|memory| Slice::all(memory, all * self.rows).part(first * self.rows, groups * self.rows))
    }

    fn words(&self) -> (&'static str, String) {
        ("STORED", rounded_to(self.float).to_owned())
    }

    /// Chooses the grids of `count` columns from `start` on, whole groups.
    fn search(
        &self,
        start: usize,
        count: usize,
        weights: Slice<'_>,
        search: Search,
        blind: bool,
    ) -> Result<()> {
        let groups = count / self.group;
        // Groups are one axis of a launch.
        for first in (0..groups).step_by(self.card.groups as usize) {
            let (own, begin) = ((groups - first).min(self.card.groups as usize), start + first * self.group);
            let [scales, biases] = self.grids(begin, own);
            let unit = reach(self.bits) * if search == Search::Careful { CAREFUL } else { 1.0 } / 6.0;
            self.card.launch(&Launch {
                program: &SEARCH,
                words: &[
                    self.words(),
                    ("BLIND", u8::from(blind).to_string()),
                    ("CAREFUL", u8::from(search == Search::Careful).to_string()),
                ],
                slices: &[
                    self.columns_of(&self.values, begin, own * self.group),
                    weights.part(begin, own * self.group),
                    scales,
                    biases,
                ],
                numbers: &[
                    self.rows as u32,
                    self.group as u32,
                    if search == Search::Plain { 0 } else { CANDIDATES },
                    self.most(),
                    unit.to_bits(),
                    0,
                    f32::INFINITY.to_bits(),
                ],
                groups: [self.rows.div_ceil(4) as u32, own as u32, 1],
                work: 600 * (own * self.group * self.rows) as u64,
            })?;
        }
        Ok(())
    }

    /// All columns to the nearest codes of their grids, which are chosen first.
    fn nearest(&self, weights: Slice<'_>, search: Search, blind: bool) -> Result<()> {
        self.search(0, self.columns, weights, search, blind)?;
        let [scales, biases] = self.grids(0, self.columns / self.group);
        let count = self.columns * self.rows;
        self.card.launch(&Launch {
            program: &NEAREST,
            words: &[self.words()],
            slices: &[scales, biases, self.all(&self.values), self.all(&self.codes)],
            numbers: &[count as u32, self.rows as u32, self.group as u32, self.most(), 0],
            groups: self.card.row_of_groups(count),
            work: 16 * count as u64,
        })
    }

    /// `to -= matrix[first..first + count, columns]^T @ from`, `matrix [columns, columns]`, `from [count, rows]` and `to`
    /// these columns.
    fn subtract(
        &self,
        matrix: Slice<'_>,
        (first, count): (usize, usize),
        columns: Range<usize>,
        from: Slice<'_>,
        to: Slice<'_>,
    ) -> Result<()> {
        if columns.is_empty() {
            return Ok(());
        }
        let product = Product::new(matrix, from, to, [columns.len(), count, self.rows]);
        Product {
            a: Matrix::of(matrix, self.columns).from(first * self.columns + columns.start),
            a_along: false,
            b: Matrix::of(from, self.rows),
            b_along: false,
            finish: Finish::Subtract,
            loose: true,
            ..product
        }
        .run(self.card)
    }

    /// GPTQ, `block` columns at a time.
    fn compensate(&self, factor: &Factor, block: usize) -> Result<()> {
        let (size, group) = (self.columns, self.group);
        let upper = Slice::of(&factor.upper)?;
        // What an error of one unit costs if later columns make up for it as well as they can.
        let weights = self.diagonal(upper, "1.0 / (x * x)")?;
        let errors = self.card.room(block * self.rows)?;
        let errors = Slice::all(&errors, block * self.rows);
        for first in (0..size).step_by(block) {
            let end = (first + block).min(size);
            for start in (first..end).step_by(group) {
                self.search(start, group, Slice::all(&weights, size), Search::Full, false)?;
                let own = errors.part((start - first) * self.rows, group * self.rows);
                let [scales, biases] = self.grids(start, 1);
                let numbers = [self.rows, group, size, start].map(|number| number as u32);
                self.card.launch(&Launch {
                    program: &COMPENSATE,
                    words: &[self.words()],
                    slices: &[
                        upper.part(start * size, group * size),
                        scales,
                        biases,
                        self.columns_of(&self.values, start, group),
                        self.columns_of(&self.codes, start, group),
                        own,
                    ],
                    numbers: &[&numbers[..], &[self.most(), 0]].concat(),
                    groups: [self.rows.div_ceil(ROWS) as u32, 1, 1],
                    work: (2 * group * group * self.rows) as u64,
                })?;
                let later = self.columns_of(&self.values, start + group, end - start - group);
                self.subtract(upper, (start, group), start + group..end, own, later)?;
            }
            let own = errors.part(0, (end - first) * self.rows);
            let later = self.columns_of(&self.values, end, size - end);
            self.subtract(upper, (first, end - first), end..size, own, later)?;
        }
        Ok(())
    }

    /// Coordinate descent from what the values were at first: each group's scale and bias by least squares, then each of
    /// its codes. A block's gradient is a product when its turn comes; what its groups change goes to later ones of the
    /// block as they do, and to what is lost, which the next block's gradient is made of.
    fn descend(&self, factor: &Factor, original: Memory, sweeps: usize) -> Result<()> {
        if sweeps == 0 {
            return Ok(());
        }
        let (size, rows, group) = (self.columns, self.rows, self.group);
        let block = SWEPT.min(size).next_multiple_of(group);
        let hessian = Slice::of(&factor.hessian)?;
        let (gradient, changes) = (self.card.room(block * rows)?, self.card.room(block * rows)?);
        let [gradient, changes] = [&gradient, &changes].map(|memory| Slice::all(memory, block * rows));
        // What each value has lost so far, block by block in the place of what it was.
        let lost = self.all(&original);
        let blocks = || (0..size).step_by(block).map(|first| (first, block.min(size - first)));
        for (first, own) in blocks() {
            let values = self.columns_of(&self.values, first, own);
            self.less(lost.part(first * rows, own * rows), values, gradient)?;
        }
        for _ in 0..sweeps {
            for (first, own) in blocks() {
                // Of H (original - value): half the negative gradient of the error.
                let slope = gradient.part(0, own * rows);
                let product = Product::new(hessian, lost, slope, [own, size, rows]);
                Product {
                    a: Matrix::of(hessian, size).from(first * size),
                    b: Matrix::of(lost, rows),
                    b_along: false,
                    loose: true,
                    ..product
                }
                .run(self.card)?;
                for start in (0..own).step_by(group) {
                    let (next, changed) = (start + group, changes.part(start * rows, group * rows));
                    self.sweep(hessian, slope.part(start * rows, group * rows), first + start, changed)?;
                    let later = slope.part(next * rows, (own - next) * rows);
                    self.subtract(
                        hessian,
                        (first + start, group),
                        first + next..first + own,
                        changed,
                        later,
                    )?;
                }
                self.less(lost.part(first * rows, own * rows), changes.part(0, own * rows), gradient)?;
            }
        }
        Ok(())
    }

    /// `x -= y`, where `between` has room for `x`.
    fn less(&self, x: Slice<'_>, y: Slice<'_>, between: Slice<'_>) -> Result<()> {
        let all = [x, y, between].map(|slice| Strided::new(slice, 0, &[1]));
        elements(self.card, vec![x.count], all, Value::of("x - y"))?;
        let bytes = |numbers: usize| 4 * numbers as u64;
        let (from, to) = (between.memory.buffer()?, x.memory.buffer()?);
        self.card.copy(from, bytes(between.first), to, bytes(x.first), bytes(x.count))
    }

    /// One group of a sweep.
    fn sweep(&self, hessian: Slice<'_>, gradient: Slice<'_>, start: usize, changes: Slice<'_>) -> Result<()> {
        let (group, rows) = (self.group, 1024 / self.group);
        let [scales, biases] = self.grids(start, 1);
        let numbers = [self.rows, group, self.columns, start].map(|number| number as u32);
        self.card.launch(&Launch {
            program: &SWEEP,
            words: &[self.words(), ("ROWS", rows.to_string()), ("LANES", (256 / rows).to_string())],
            slices: &[
                hessian.part(start * self.columns, group * self.columns),
                gradient,
                scales,
                biases,
                self.columns_of(&self.values, start, group),
                self.columns_of(&self.codes, start, group),
                changes,
            ],
            numbers: &[&numbers[..], &[self.most(), 0]].concat(),
            groups: [self.rows.div_ceil(rows) as u32, 1, 1],
            work: (6 * group * group * self.rows) as u64,
        })
    }

    /// A function `text` of the diagonal of a matrix `[columns, columns]`.
    fn diagonal(&self, matrix: Slice<'_>, text: &str) -> Result<Memory> {
        let out = self.card.room(self.columns)?;
        let from = Strided::new(matrix, 0, &[self.columns + 1]);
        let to = Strided::new(Slice::all(&out, self.columns), 0, &[1]);
        elements(self.card, vec![self.columns], [from.clone(), from, to], Value::of(text))?;
        Ok(out)
    }

    fn run(&self, how: How<'_>) -> Result<()> {
        let brought = |weights: &[f32]| self.card.put(bytemuck::cast_slice(weights));
        let original = |sweeps: usize| {
            let count = if sweeps > 0 { self.columns * self.rows } else { 0 };
            let copy = self.card.room(count)?;
            self.card.copy(self.values.buffer()?, 0, copy.buffer()?, 0, 4 * count as u64)?;
            Ok(copy)
        };
        let block = |size: usize| size.max(BLOCK).min(self.columns).next_multiple_of(self.group);
        let all = |memory| Slice::all(memory, self.columns);
        match how {
            How::Plain => self.nearest(all(&brought(&vec![0.0; self.columns])?), Search::Plain, false),
            How::Blind { weights } => self.nearest(all(&brought(weights)?), Search::Full, true),
            How::Careful { weights, blind } => self.nearest(all(&brought(weights)?), Search::Careful, blind),
            How::Nearest { weights } => self.nearest(all(&brought(weights)?), Search::Full, false),
            How::Refined { factor, sweeps, .. } => {
                let original: Result<Memory> = original(sweeps);
                let weights = self.diagonal(Slice::of(&factor.hessian)?, "x")?;
                self.nearest(all(&weights), Search::Full, false)?;
                self.descend(factor, original?, sweeps)
            }
            How::Compensated { factor, block_size, sweeps } => {
                let original: Result<Memory> = original(sweeps);
                self.compensate(factor, block(block_size))?;
                self.descend(factor, original?, sweeps)
            }
        }
    }

    /// Something `[columns, rows]` as `[rows, columns]`, in the weight's own order.
    fn in_order(&self, memory: &Memory, places: Option<&[u32]>, out: Slice<'_>) -> Result<()> {
        let all = self.all(memory);
        let gathered = places.map(|places| gathered_rows(self.card, all, self.rows, places)).transpose()?;
        let all = gathered.as_ref().map_or(all, |gathered| self.all(gathered));
        transposed(self.card, all, out, self.columns, self.rows)
    }

    /// Into the places of the weight's own order: the decoded weight to `decoded`; gives everything else.
    fn give(mut self, places: Option<&[u32]>, decoded: Slice<'_>) -> Result<Part> {
        self.in_order(&self.values, places, decoded)?;
        let count = self.columns * self.rows;
        // Codes go where values were.
        let codes = std::mem::replace(&mut self.values, self.card.room(0)?);
        self.in_order(&self.codes, places, Slice::all(&codes, count))?;
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
        let group = |group: usize| match places {
            None => group,
            Some(places) => places[group * self.group] as usize / self.group,
        };
        Ok(Part { all, rows: self.rows, words, groups: (0..groups).map(group).collect() })
    }
}

/// Some rows of a rounded weight on a card.
struct Part {
    /// Packed codes, scales and biases one after the other.
    all: Memory,
    rows: usize,
    /// Numbers of four codes.
    words: usize,
    /// Where each group of a row lies.
    groups: Vec<usize>,
}

impl Part {
    fn fetch(&self, rounded: &mut Rounded) -> Result<()> {
        let Self { all, rows, words, groups } = self;
        let grids = rows * groups.len();
        all.card().get(all, 0, words + 2 * grids, &mut |numbers| {
            let (codes, numbers) = numbers.split_at(*words);
            rounded.codes.extend_from_slice(bytemuck::cast_slice(codes));
            let (scales, biases) = numbers.split_at(grids);
            for (numbers, to) in [(scales, &mut rounded.scales), (biases, &mut rounded.biases)] {
                for row in 0..*rows {
                    to.extend(groups.iter().map(|own| numbers[own * rows + row]));
                }
            }
        })
    }
}

pub(super) fn round(
    card: &Arc<Card>,
    weight: &Tensor,
    scheme: Scheme,
    float: FloatType,
    how: How<'_>,
) -> Result<(Pending, Tensor)> {
    let (rows, columns) = weight.dims2()?;
    let (all, decoded) = (Slice::of(weight)?, card.room(rows * columns)?);
    let order = match how {
        How::Refined { factor, .. } | How::Compensated { factor, .. } => Some(&factor.order),
        _ => None,
    };
    let order = order.filter(|order| order.iter().enumerate().any(|(at, column)| at != *column));
    let order: Option<Vec<u32>> = order.map(|order| order.iter().map(|column| *column as u32).collect());
    // Where each column of the weight stands in the order.
    let places = order.as_ref().map(|order| {
        let mut places = vec![0u32; columns];
        (0u32..).zip(order).for_each(|(at, column)| places[*column as usize] = at);
        places
    });
    let mut parts = Vec::new();
    let room = PART.min(card.binding - card.alignment as usize / 4) / columns.max(1);
    // The search takes 4 rows with each of its workgroups.
    let most = (room / ROWS * ROWS).clamp(ROWS, 2 * card.groups as usize / ROWS * ROWS);
    // Parts of about one size: a small last one would leave a card idle.
    let step = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(ROWS).max(ROWS);
    for first in (0..rows).step_by(step) {
        let own = step.min(rows - first);
        let count = own * columns;
        let part = all.part(first * columns, count);
        let turned = || {
            let turned = card.room(count)?;
            transposed(card, part, Slice::all(&turned, count), own, columns)?;
            Ok(turned)
        };
        let values = match &order {
            None => turned()?,
            Some(order) => gathered_rows(card, Slice::all(&turned()?, count), own, order)?,
        };
        let groups = columns / scheme.group_size() * own;
        let task = Task {
            card,
            rows: own,
            columns,
            group: scheme.group_size(),
            bits: scheme.bits(),
            float,
            values,
            codes: card.room(count)?,
            scales: card.room(groups)?,
            biases: card.room(groups)?,
        };
        task.run(how)?;
        let to = Slice::all(&decoded, rows * columns).part(first * columns, count);
        parts.push(task.give(places.as_deref(), to)?);
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
