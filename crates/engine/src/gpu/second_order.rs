//! Gram matrices, what is made of them, and their factors.

use std::ops::Range;
use std::sync::Arc;

use super::card::Card;
use super::elementary::{bytes_of, pairs, reduce};
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::by_parts;
use super::product::{Finish, Matrix, Product};
use super::program::Program;
use super::strided::{Strided, Value, elements};
use super::units;
use crate::elementary::Reduce;
use crate::error::{Result, bail};
use crate::{LAST, Tensor};

static SQUARE: Program =
    Program { name: "square", source: include_str!("wgsl/square.wgsl"), checked: true, reads: 2, writes: 1 };
static CHOLESKY: Program = Program {
    name: "cholesky",
    source: include_str!("wgsl/cholesky.wgsl"),
    checked: true,
    reads: 1,
    writes: 2,
};

/// Rows of the blocks on the diagonal that one workgroup factors.
const BLOCK: usize = 64;
/// Columns right of such a block into which a product of a triangle may write: tiles are squares of at most so many rows.
const BESIDE: usize = 128;
/// Parts of the columns of a triangle that is inverted, and of the rows of a matrix that is turned: what a part takes is
/// held twice.
const PARTS: usize = 4;

/// How a square matrix is made of another one, in WGSL of a row `i`, a column `j` and an element `x`.
struct Square<'s> {
    row: &'s str,
    column: &'s str,
    value: &'s str,
    number: f32,
}

impl Square<'_> {
    fn run(&self, card: &Arc<Card>, x: Slice<'_>, list: Option<&Memory>, size: usize) -> Result<Memory> {
        let out = card.room(size * size)?;
        let rows = Rows { own: 0..size, line: size };
        self.run_rows(card, (x, rows), list, size, (Slice::all(&out, size * size), 0..size))?;
        Ok(out)
    }

    /// Rows `to` of `out [size, size]`, as far as their elements come from the rows of the source that `x` holds; others
    /// are left as they are.
    fn run_rows(
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
struct Rows {
    own: Range<usize>,
    line: usize,
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

/// Adds `x^T x` to the lower triangle of `sum`, half a product; or to rows of it.
pub(super) fn gram_add(card: &Arc<Card>, sum: &mut Tensor, x: &Tensor) -> Result<()> {
    let (own, end) = sum.dims2()?;
    let size = x.dim(LAST)?;
    if own > end || end > size {
        bail!("inputs {:?} cannot be summed to rows {:?} of a triangle", x.dims(), sum.dims());
    }
    let above = end - own;
    made_alone(card, sum)?;
    let (x, to) = (Slice::of(x)?, Slice::of(sum)?);
    let tokens = x.count / size.max(1);
    if tokens == 0 {
        return Ok(());
    }
    let lines = Matrix::of(x, size);
    // Of all inputs, so that rows have the bits that they have in the whole matrix.
    let peak = units::peak(card, x, (tokens, size))?;
    let peak = peak.as_ref().map(|peak| Slice::all(peak, 1));
    let product = Product {
        finish: Finish::Add,
        triangle: Some(above),
        loose: true,
        peak,
        ..Product::new(x, x, to, [own, tokens, end])
    };
    Product { a: lines.from(above), a_along: false, b: lines, b_along: false, ..product }.run(card)
}

/// Rows of a lower triangle times `factor`, and the columns that mirror them.
pub(super) fn gram_place(card: &Arc<Card>, whole: &mut Tensor, rows: &Tensor, factor: f32) -> Result<()> {
    let (count, end) = rows.dims2()?;
    let size = whole.dim(0)?;
    made_alone(card, whole)?;
    let own = Square { row: "max(i, j)", column: "min(i, j)", value: "x * p.number", number: factor };
    let from = Rows { own: end - count..end, line: end };
    let to = Slice::of(whole)?;
    own.run_rows(card, (Slice::of(rows)?, from), None, size, (to, 0..end))
}

/// The lower triangle times `factor`, on both sides.
pub(super) fn gram_finish(card: &Arc<Card>, sum: &Tensor, factor: f32) -> Result<Tensor> {
    let own = Square { row: "max(i, j)", column: "min(i, j)", value: "x * p.number", number: factor };
    Ok(tensor(own.run(card, Slice::of(sum)?, None, sum.dim(0)?)?, sum.dims(), sum))
}

/// Each element over the factors of its row and its column.
pub(super) fn gram_scaled(card: &Arc<Card>, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let list = card.put(bytemuck::cast_slice(factors))?;
    let value = "x / (bitcast<f32>(list[p.list_at + i]) * bitcast<f32>(list[p.list_at + j]))";
    let own = Square { row: "i", column: "j", value, number: 0.0 };
    Ok(tensor(own.run(card, Slice::of(gram)?, Some(&list), factors.len())?, gram.dims(), gram))
}

/// Rows and columns in `order`, elements beside the diagonal times `kept`.
pub(super) fn permuted(card: &Arc<Card>, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
    let order: Vec<u32> = order.iter().map(|at| *at as u32).collect();
    let list = card.put(bytes_of(&order))?;
    let own = Square {
        row: "list[p.list_at + i]",
        column: "list[p.list_at + j]",
        value: "select(x * p.number, x, i == j)",
        number: kept,
    };
    Ok(tensor(own.run(card, Slice::of(gram)?, Some(&list), order.len())?, gram.dims(), gram))
}

/// `tr(D H D^T)`: float32 within a row, float64 over rows.
pub(super) fn quadratic(card: &Arc<Card>, gram: &Tensor, changes: &Tensor) -> Result<f64> {
    let (rows, size) = changes.dims2()?;
    let product = changes.matmul(gram)?;
    let products = pairs(card, &product, changes, Value::of("x * y"))?;
    let sums = reduce(card, Slice::all(&products, rows * size), [rows, size, 1], Reduce::Sum)?;
    let mut sum = 0f64;
    card.get(&sums, 0, rows, &mut |values| sum = values.iter().map(|value| f64::from(*value)).sum())?;
    Ok(sum)
}

/// `U` with `(H + added)^-1 = U^T U`: the Cholesky factor of H turned about both axes, inverted and turned back (as in
/// the CPU engine); H becomes `H + added`. `None` if that is not positive definite, and H stays as it is.
///
/// Everything happens in one matrix `[size, size]`, which becomes U; beside it and H there is an eighth of a matrix.
pub(super) fn factor(card: &Arc<Card>, hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
    let size = hessian.dim(0)?;
    let turned = Square {
        row: "p.size - 1u - i",
        column: "p.size - 1u - j",
        value: "select(select(0.0, x, j < i), x + p.number, i == j)",
        number: added,
    };
    let work = turned.run(card, Slice::of(hessian)?, None, size)?;
    let status = card.room(1)?;
    card.clear(status.buffer()?);
    cholesky(card, size, &work, &status)?;
    {
        let count = room_of_parts(size);
        let parts = [card.room(count)?, card.room(count)?];
        invert(card, size, &work, &parts)?;
        turn_back(card, size, &work, &parts, count / size.max(1))?;
    }
    let upper = tensor(work, hessian.dims(), hessian);
    // Whether a block failed, and a sum that is finite only if all is: the card is waited for once.
    let (sum, both) = (upper.sum_all()?, card.room(2)?);
    let own = Slice::of(&sum)?;
    card.copy(status.buffer()?, 0, both.buffer()?, 0, 4)?;
    card.copy(own.memory.buffer()?, 4 * own.first as u64, both.buffer()?, 4, 4)?;
    let mut failed = true;
    card.get(&both, 0, 2, &mut |both| failed = both[0] != 0.0 || !both[1].is_finite())?;
    if failed {
        return Ok(None);
    }
    made_alone(card, hessian)?;
    let diagonal = card.room(size)?;
    let within = Strided::new(Slice::of(hessian)?, 0, &[size + 1]);
    let beside = Strided::new(Slice::all(&diagonal, size), 0, &[1]);
    let more = Value { text: "x + a", a: added, b: 0.0 };
    elements(card, vec![size], [within.clone(), within.clone(), beside.clone()], more)?;
    elements(card, vec![size], [beside.clone(), beside, within], Value::of("x"))?;
    Ok(Some(upper))
}

/// Blocks of `work` from the first: the block on the diagonal, which becomes the inverse of its factor; the panel below
/// it, which becomes the factor's; and the rest less the panel's square. What lies above the diagonal becomes zero.
fn cholesky(card: &Arc<Card>, size: usize, work: &Memory, status: &Memory) -> Result<()> {
    let line = BLOCK + BESIDE;
    let (block, panel) = (card.room(BLOCK * line)?, card.room(size * BLOCK)?);
    card.clear(block.buffer()?);
    let [work, block, panel] = [(work, size * size), (&block, BLOCK * line), (&panel, size * BLOCK)]
        .map(|(x, count)| Slice::all(x, count));
    for first in (0..size).step_by(BLOCK) {
        let own = BLOCK.min(size - first);
        let (corner, reach) = (first * (size + 1), (own - 1) * size + own);
        card.launch(&Launch {
            program: &CHOLESKY,
            words: &[],
            slices: &[work.part(corner, reach), block, Slice::all(status, 1)],
            numbers: &[own, size, line].map(|number| number as u32),
            groups: [1, 1, 1],
            work: (own * own * own) as u64,
        })?;
        let below = size - first - own;
        let place = corner + own * size;
        let template = Product::new(work, block, panel, [below, own, own]);
        let lower = Matrix::of(panel, BLOCK);
        Product { a: Matrix::of(work, size).from(place), b: Matrix::of(block, line), c: lower, ..template }
            .run(card)?;
        Product {
            a: lower,
            b: lower,
            c: Matrix::of(work, size).from(place + own),
            sizes: [below, own, below],
            finish: Finish::Subtract,
            triangle: Some(0),
            ..template
        }
        .run(card)?;
        let moves =
            [(block, line, corner, [own, line.min(size - first)]), (panel, BLOCK, place, [below, own])];
        for (from, line, to, sizes) in moves {
            let source = Strided::new(from, 0, &[line, 1]);
            let target = Strided::new(work, to, &[size, 1]);
            elements(card, sizes.into(), [source.clone(), source, target], Value::of("x"))?;
        }
    }
    Ok(())
}

/// Columns of a block that are inverted at a time.
fn part_of(block: usize) -> usize {
    if block > PARTS * BLOCK { block / PARTS } else { block }
}

/// Elements that the largest part needs when blocks of a matrix of `size` rows are inverted and rows are turned.
fn room_of_parts(size: usize) -> usize {
    let level = |block: usize| {
        let whole = size / (2 * block);
        let rest = (size - whole * 2 * block).saturating_sub(block);
        (whole * block).max(rest) * part_of(block)
    };
    let levels =
        std::iter::successors(Some(BLOCK), |block| Some(2 * block)).take_while(|block| *block < size);
    levels.map(level).max().unwrap_or(0).max(size * BLOCK.min(size))
}

/// The inverse, in place, of a lower triangular matrix whose blocks on the diagonal are inverted already: of two
/// neighbours `A` and `C` on the diagonal with `B` below `A` it is `-C^-1 B A^-1` that stands in place of `B`. Blocks
/// double until there is one.
fn invert(card: &Arc<Card>, size: usize, work: &Memory, parts: &[Memory; 2]) -> Result<()> {
    let mut block = BLOCK;
    while block < size {
        let whole = size / (2 * block);
        if whole > 0 {
            let batch = (whole, 2 * block * (size + 1));
            invert_pairs(card, size, work, parts, (0, block, block), batch)?;
        }
        let start = whole * 2 * block;
        if start + block < size {
            let rest = size - start - block;
            invert_pairs(card, size, work, parts, (start, block, rest), (1, 0))?;
        }
        block *= 2;
    }
    Ok(())
}

/// Pairs of blocks of `block` and `rest` rows, the first of which begins at `start`. Columns of `B` go from the left, some
/// at a time: `A^-1` is lower triangular, so none that is done is looked at again.
fn invert_pairs(
    card: &Arc<Card>,
    size: usize,
    work: &Memory,
    [first, second]: &[Memory; 2],
    (start, block, rest): (usize, usize, usize),
    (pairs, apart): (usize, usize),
) -> Result<()> {
    let width = part_of(block);
    let part = |memory| Matrix { memory, first: 0, line: width, outer: 0, inner: rest * width };
    let place = |row: usize, column: usize| row * size + column;
    let of_work =
        |row, column| Matrix { memory: work, first: place(row, column), line: size, outer: 0, inner: apart };
    let below = start + block;
    let all = Slice::all(work, size * size);
    for column in (start..below).step_by(width) {
        let template = Product {
            b_along: false,
            batch: [1, pairs],
            ..Product::new(all, all, all, [rest, below - column, width])
        };
        Product { a: of_work(below, column), b: of_work(column, column), c: part(first), ..template }
            .run(card)?;
        Product {
            a: of_work(below, below),
            b: part(first),
            c: part(second),
            sizes: [rest, rest, width],
            ..template
        }
        .run(card)?;
        let source = Strided::new(Slice::all(second, pairs * rest * width), 0, &[rest * width, width, 1]);
        let target = Strided::new(all, place(below, column), &[apart, size, 1]);
        elements(card, vec![pairs, rest, width], [source.clone(), source, target], Value::of("-x"))?;
    }
    Ok(())
}

/// Turns a lower triangular matrix about both axes, in place: `rows` rows from above and as many from below change
/// places at a time.
fn turn_back(card: &Arc<Card>, size: usize, work: &Memory, parts: &[Memory; 2], rows: usize) -> Result<()> {
    let turned = Square {
        row: "p.size - 1u - i",
        column: "p.size - 1u - j",
        value: "select(0.0, x, j >= i)",
        number: 0.0,
    };
    let bytes = |rows: usize| 4 * (rows * size) as u64;
    let half = size.div_ceil(2);
    for start in (0..half).step_by(rows.max(1)) {
        let above = start..half.min(start + rows);
        let below = size - above.end..size - above.start;
        let sides = [above, below];
        for (part, own) in parts.iter().zip(&sides) {
            card.copy(work.buffer()?, bytes(own.start), part.buffer()?, 0, bytes(own.len()))?;
        }
        for (part, (own, to)) in parts.iter().zip(sides.iter().zip(sides.iter().rev())) {
            let from = Slice::all(part, own.len() * size);
            turned.run_rows(
                card,
                (from, Rows { own: own.clone(), line: size }),
                None,
                size,
                (Slice::all(work, size * size), to.clone()),
            )?;
        }
    }
    Ok(())
}
