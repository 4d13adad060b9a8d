//! Rounding to searched grids, with GPTQ's compensation and sweeps of coordinate descent: what `rounding/` does on the
//! processor, with all rows of a weight side by side.
//!
//! A weight lies transposed, `[columns, rows]`, in the order in which columns are rounded. A launch takes a group of
//! columns; what its errors do to later columns of its block, and then to those behind the block, are products. Rows
//! are independent, so a weight that is larger than a binding goes in parts of its rows, and weights of several experts
//! lie side by side as rows of one, each with its own factor. `rounded` brings weights here and takes them away.

use std::ops::Range;
use std::sync::Arc;

use mlx_format::FloatType;

use super::card::Card;
use super::elementary::rounded_to;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::product::{Finish, Matrix, Product};
use super::program::{Program, program};
use super::strided::{Strided, Value, elements};
use crate::error::{Error, Result};
use crate::rounding::{CAREFUL, How, Search, reach};

static SEARCH: Program = program!("search", 2, 2, "grid");
static NEAREST: Program = program!("nearest", 2, 2, "grid");
static COMPENSATE: Program = program!("compensate", 3, 3, "grid");
static SWEEP: Program = program!("sweep", 2, 5, "grid");

/// Rows of a task, and of a member, are a multiple of this.
pub(super) const ROWS: usize = 32;
/// Columns of a block at least: with fewer, what its errors do to later columns is more memory traffic than arithmetic.
const BLOCK: usize = 512;
/// Columns of a block of a sweep: the gradient of fewer is a product that leaves a card's processors idle.
const SWEPT: usize = 1024;
/// Candidates of the search: the grid of `mx.quantize`, and 7 positions of each edge.
const CANDIDATES: u32 = 50;

/// Upper factors and Hessians `[columns, columns]` of the members of a task, so many elements from one to the next.
#[derive(Clone, Copy)]
pub(super) struct Squares<'s> {
    pub(super) upper: Slice<'s>,
    pub(super) hessian: Slice<'s>,
    pub(super) apart: usize,
}

/// Some rows of a weight, or weights of several members side by side, while they are rounded.
pub(super) struct Task<'t> {
    pub(super) card: &'t Arc<Card>,
    /// Of all members.
    pub(super) rows: usize,
    /// Of one.
    pub(super) own: usize,
    pub(super) columns: usize,
    pub(super) group: usize,
    pub(super) bits: u32,
    pub(super) float: FloatType,
    /// `[columns, rows]`, in rounding order; after rounding, what the stored numbers decode to.
    pub(super) values: Memory,
    /// `[columns, rows]`, as numbers.
    pub(super) codes: Memory,
    /// `[groups, rows]`.
    pub(super) scales: Memory,
    /// `[groups, rows]`.
    pub(super) biases: Memory,
}

impl<'t> Task<'t> {
    fn most(&self) -> u32 {
        (((1u32 << self.bits) - 1) as f32).to_bits()
    }

    fn members(&self) -> usize {
        self.rows / self.own.max(1)
    }

    /// Rows `start..start + count` of each member's matrix.
    fn lines(&self, matrix: Slice<'t>, apart: usize, start: usize, count: usize) -> Slice<'t> {
        matrix.part(start * self.columns, (self.members() - 1) * apart + count * self.columns)
    }

    pub(super) fn all(&'t self, memory: &'t Memory) -> Slice<'t> {
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

    /// Chooses the grids of `count` columns from `start` on, whole groups; `weights` are `[columns]` of each member.
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
                    weights.part(begin, weights.count - self.columns + own * self.group),
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
                    self.own as u32,
                    self.columns as u32,
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

    /// `to -= matrix[first..first + count, columns]^T @ from` of each member, `matrix [columns, columns]`, `from [count,
    /// rows]` and `to` these columns.
    fn subtract(
        &self,
        (matrix, apart): (Slice<'_>, usize),
        (first, count): (usize, usize),
        columns: Range<usize>,
        from: Slice<'_>,
        to: Slice<'_>,
    ) -> Result<()> {
        if columns.is_empty() {
            return Ok(());
        }
        let matrix = Matrix { outer: apart, ..Matrix::of(matrix, self.columns) };
        Product {
            a: matrix.from(first * self.columns + columns.start),
            a_along: false,
            finish: Finish::Subtract,
            sizes: [columns.len(), count, self.own],
            ..self.product(matrix, from, to)
        }
        .run(self.card)
    }

    /// A product of each member's matrix and its rows of `from` to its rows of `to`.
    fn product<'m>(&self, matrix: Matrix<'m>, from: Slice<'m>, to: Slice<'m>) -> Product<'m> {
        let [from_rows, to_rows] = [from, to].map(|x| Matrix { outer: self.own, ..Matrix::of(x, self.rows) });
        Product {
            a: matrix,
            b: from_rows,
            b_along: false,
            c: to_rows,
            batch: [self.members(), 1],
            loose: true,
            ..Product::new(from, from, to, [0; 3])
        }
    }

    /// GPTQ, `block` columns at a time.
    fn compensate(&self, squares: &Squares<'_>, block: usize) -> Result<()> {
        let (size, group) = (self.columns, self.group);
        let Squares { upper, apart, .. } = *squares;
        // What an error of one unit costs if later columns make up for it as well as they can.
        let weights = self.diagonal(upper, apart, "1.0 / (x * x)")?;
        let errors = self.card.room(block * self.rows)?;
        let errors = Slice::all(&errors, block * self.rows);
        for first in (0..size).step_by(block) {
            let end = (first + block).min(size);
            for start in (first..end).step_by(group) {
                self.search(start, group, self.of_members(&weights), Search::Full, false)?;
                let own = errors.part((start - first) * self.rows, group * self.rows);
                let [scales, biases] = self.grids(start, 1);
                let numbers = [self.rows, group, size, start, self.own, apart].map(|number| number as u32);
                self.card.launch(&Launch {
                    program: &COMPENSATE,
                    words: &[self.words()],
                    slices: &[
                        self.lines(upper, apart, start, group),
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
                self.subtract((upper, apart), (start, group), start + group..end, own, later)?;
            }
            let own = errors.part(0, (end - first) * self.rows);
            let later = self.columns_of(&self.values, end, size - end);
            self.subtract((upper, apart), (first, end - first), end..size, own, later)?;
        }
        Ok(())
    }

    /// Coordinate descent from what the values were at first: each group's scale and bias by least squares, then each of
    /// its codes. A block's gradient is a product when its turn comes; what its groups change goes to later ones of the
    /// block as they do, and to what is lost, which the next block's gradient is made of.
    fn descend(&self, squares: &Squares<'_>, original: Memory, sweeps: usize) -> Result<()> {
        if sweeps == 0 {
            return Ok(());
        }
        let (size, rows, group) = (self.columns, self.rows, self.group);
        let block = SWEPT.min(size).next_multiple_of(group);
        let Squares { hessian, apart, .. } = *squares;
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
                let matrix = Matrix { outer: apart, ..Matrix::of(hessian, size) }.from(first * size);
                Product { sizes: [own, size, self.own], ..self.product(matrix, lost, slope) }
                    .run(self.card)?;
                for start in (0..own).step_by(group) {
                    let (next, changed) = (start + group, changes.part(start * rows, group * rows));
                    self.sweep(
                        (hessian, apart),
                        slope.part(start * rows, group * rows),
                        first + start,
                        changed,
                    )?;
                    let later = slope.part(next * rows, (own - next) * rows);
                    self.subtract(
                        (hessian, apart),
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
    fn sweep(
        &self,
        (hessian, apart): (Slice<'_>, usize),
        gradient: Slice<'_>,
        start: usize,
        changes: Slice<'_>,
    ) -> Result<()> {
        let (group, rows) = (self.group, 1024 / self.group);
        let [scales, biases] = self.grids(start, 1);
        let numbers = [self.rows, group, self.columns, start, self.own, apart].map(|number| number as u32);
        self.card.launch(&Launch {
            program: &SWEEP,
            words: &[self.words(), ("ROWS", rows.to_string()), ("LANES", (256 / rows).to_string())],
            slices: &[
                self.lines(hessian, apart, start, group),
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

    /// A function `text` of the diagonal of each member's matrix `[columns, columns]`.
    fn diagonal(&self, matrix: Slice<'_>, apart: usize, text: &str) -> Result<Memory> {
        let (members, columns) = (self.members(), self.columns);
        let out = self.card.room(members * columns)?;
        let from = Strided::new(matrix, 0, &[apart, columns + 1]);
        let to = Strided::new(Slice::all(&out, members * columns), 0, &[columns, 1]);
        elements(self.card, vec![members, columns], [from.clone(), from, to], Value::of(text))?;
        Ok(out)
    }

    /// A number for each column of each member.
    fn of_members(&self, memory: &'t Memory) -> Slice<'t> {
        Slice::all(memory, self.members() * self.columns)
    }

    /// Rounds the values; several members have a factor each, in `squares`.
    pub(super) fn run(&self, how: How<'_>, squares: Option<&Squares<'_>>) -> Result<()> {
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
            How::Refined { sweeps, .. } => {
                let squares = squares.ok_or_else(|| Error::msg("a weight to be refined has no factor"))?;
                let original: Result<Memory> = original(sweeps);
                let weights = self.diagonal(squares.hessian, squares.apart, "x")?;
                self.nearest(self.of_members(&weights), Search::Full, false)?;
                self.descend(squares, original?, sweeps)
            }
            How::Compensated { block_size, sweeps, .. } => {
                let squares =
                    squares.ok_or_else(|| Error::msg("a weight to be compensated has no factor"))?;
                let original: Result<Memory> = original(sweeps);
                self.compensate(squares, block(block_size))?;
                self.descend(squares, original?, sweeps)
            }
        }
    }
}
