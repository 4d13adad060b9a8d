//! Factors of Hessians: Cholesky by blocks, the inverse of a triangle, for several matrices of one size in one launch.

use std::sync::Arc;

use super::card::Card;
use super::elementary::reduce;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::product::{Finish, Matrix, Product};
use super::program::Program;
use super::square::{Rows, Square, made_alone};
use super::strided::{Strided, Value, elements};
use crate::Tensor;
use crate::elementary::Reduce;
use crate::error::Result;

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

/// Matrices of one size, one behind the other.
#[derive(Clone, Copy)]
struct Stack<'m> {
    card: &'m Arc<Card>,
    memory: &'m Memory,
    count: usize,
    size: usize,
}

impl<'m> Stack<'m> {
    /// Elements of a matrix.
    fn square(&self) -> usize {
        self.size * self.size
    }

    fn all(&self) -> Slice<'m> {
        Slice::all(self.memory, self.count * self.square())
    }

    fn one(&self, at: usize) -> Slice<'m> {
        self.all().part(at * self.square(), self.square())
    }

    /// Operands of products, from some element of each matrix on.
    fn matrix(&self, first: usize) -> Matrix<'m> {
        Matrix { memory: self.memory, first, line: self.size, outer: self.square(), inner: 0 }
    }
}

/// `U` with `(H + added)^-1 = U^T U`; H becomes `H + added`. `None` if that is not positive definite, and H stays as it is.
pub(super) fn factor(card: &Arc<Card>, hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
    made_alone(card, hessian)?;
    let size = hessian.dim(0)?;
    Ok(of_stack(card, Slice::of(hessian)?, size, hessian, &[added])?.pop().flatten())
}

/// [`factor`] of matrices `[count, size, size]`, as many at a time as a kernel sees.
pub(super) fn factors(card: &Arc<Card>, hessians: &mut Tensor, added: &[f32]) -> Result<Vec<Option<Tensor>>> {
    made_alone(card, hessians)?;
    let (_, size, _) = hessians.dims3()?;
    let room = card.binding - card.alignment as usize / 4;
    let most = (room / (size * size).max(1)).clamp(1, card.groups as usize);
    let all = Slice::of(hessians)?;
    let mut uppers = Vec::new();
    for (at, added) in added.chunks(most).enumerate() {
        let own = all.part(at * most * size * size, added.len() * size * size);
        uppers.extend(of_stack(card, own, size, hessians, added)?);
    }
    Ok(uppers)
}

/// The Cholesky factor of each H turned about both axes, inverted and turned back (as in the CPU engine). A single one
/// happens in one matrix `[size, size]`, which becomes U; beside it and H there is an eighth of a matrix. Of several, each
/// has a second matrix to be turned into.
fn of_stack(
    card: &Arc<Card>,
    hessians: Slice<'_>,
    size: usize,
    like: &Tensor,
    added: &[f32],
) -> Result<Vec<Option<Tensor>>> {
    let (count, square) = (added.len(), size * size);
    let work = card.room(count * square)?;
    let stack = |memory| Stack { card, memory, count, size };
    for (at, added) in added.iter().enumerate() {
        let turned = Square {
            row: "p.size - 1u - i",
            column: "p.size - 1u - j",
            value: "select(select(0.0, x, j < i), x + p.number, i == j)",
            number: *added,
        };
        let from = (hessians.part(at * square, square), Rows { own: 0..size, line: size });
        turned.run_rows(card, from, None, size, (stack(&work).one(at), 0..size))?;
    }
    let status = card.room(count)?;
    card.clear(status.buffer()?);
    cholesky(stack(&work), &status)?;
    let room = room_of_parts(size);
    let parts = [card.room(count * room)?, card.room(count * room)?];
    invert(stack(&work), &parts)?;
    let upper = if count == 1 {
        turn_back(stack(&work), &parts, room / size.max(1))?;
        work
    } else {
        drop(parts);
        let upper = card.room(count * square)?;
        let from = stack(&work);
        for at in 0..count {
            let rows = Rows { own: 0..size, line: size };
            TURNED.run_rows(card, (from.one(at), rows), None, size, (stack(&upper).one(at), 0..size))?;
        }
        drop(work);
        upper
    };
    // Whether a block failed, and sums that are finite only if all is: the card is waited for once.
    let sums = reduce(card, Slice::all(&upper, count * square), [count, square, 1], Reduce::Sum)?;
    let both = card.room(2 * count)?;
    let bytes = |numbers: usize| 4 * numbers as u64;
    card.copy(status.buffer()?, 0, both.buffer()?, 0, bytes(count))?;
    card.copy(sums.buffer()?, 0, both.buffer()?, bytes(count), bytes(count))?;
    let mut fine = Vec::new();
    card.get(&both, 0, 2 * count, &mut |both| {
        let (status, sums) = both.split_at(count);
        fine = status.iter().zip(sums).map(|(status, sum)| *status == 0.0 && sum.is_finite()).collect();
    })?;
    let more: Vec<f32> =
        fine.iter().zip(added).map(|(fine, added)| if *fine { *added } else { 0.0 }).collect();
    if fine.contains(&true) {
        add_to_diagonals(card, hessians, size, &more)?;
    }
    let shared = upper.shared();
    let upper = |(at, fine): (usize, bool)| {
        fine.then(|| Tensor::constant(vec![size, size], shared.clone(), at * square, like.device()))
    };
    Ok(fine.into_iter().enumerate().map(upper).collect())
}

/// Adds a number to the diagonal of each matrix.
fn add_to_diagonals(card: &Arc<Card>, matrices: Slice<'_>, size: usize, added: &[f32]) -> Result<()> {
    let count = added.len();
    let list = card.put(bytemuck::cast_slice(added))?;
    let diagonal = card.room(count * size)?;
    let within = Strided::new(matrices, 0, &[size * size, size + 1]);
    let more = Strided::new(Slice::all(&list, count), 0, &[1, 0]);
    let beside = Strided::new(Slice::all(&diagonal, count * size), 0, &[size, 1]);
    let sizes = vec![count, size];
    elements(card, sizes.clone(), [within.clone(), more, beside.clone()], Value::of("x + y"))?;
    elements(card, sizes, [beside.clone(), beside, within], Value::of("x"))
}

/// Blocks of `work` from the first: the block on the diagonal, which becomes the inverse of its factor; the panel below
/// it, which becomes the factor's; and the rest less the panel's square. What lies above the diagonal becomes zero.
fn cholesky(stack: Stack<'_>, status: &Memory) -> Result<()> {
    let (Stack { card, count, size, .. }, line) = (stack, BLOCK + BESIDE);
    let (of_block, of_panel) = (BLOCK * line, size * BLOCK);
    let (block, panel) = (card.room(count * of_block)?, card.room(count * of_panel)?);
    card.clear(block.buffer()?);
    let (work, block, panel) =
        (stack.all(), Slice::all(&block, count * of_block), Slice::all(&panel, count * of_panel));
    let before = count - 1;
    for first in (0..size).step_by(BLOCK) {
        let own = BLOCK.min(size - first);
        let (corner, reach) = (first * (size + 1), (own - 1) * size + own);
        card.launch(&Launch {
            program: &CHOLESKY,
            words: &[],
            slices: &[work.part(corner, before * stack.square() + reach), block, Slice::all(status, count)],
            numbers: &[own, size, line, stack.square(), of_block].map(|number| number as u32),
            groups: [count as u32, 1, 1],
            work: (count * own * own * own) as u64,
        })?;
        let below = size - first - own;
        let place = corner + own * size;
        let template = Product { batch: [count, 1], ..Product::new(work, block, panel, [below, own, own]) };
        let lower = Matrix { outer: of_panel, ..Matrix::of(panel, BLOCK) };
        let inverse = Matrix { outer: of_block, ..Matrix::of(block, line) };
        Product { a: stack.matrix(place), b: inverse, c: lower, ..template }.run(card)?;
        Product {
            a: lower,
            b: lower,
            c: stack.matrix(place + own),
            sizes: [below, own, below],
            finish: Finish::Subtract,
            triangle: Some(0),
            ..template
        }
        .run(card)?;
        let moves = [
            (block, (of_block, line), corner, [own, line.min(size - first)]),
            (panel, (of_panel, BLOCK), place, [below, own]),
        ];
        for (from, (apart, line), to, [rows, columns]) in moves {
            let source = Strided::new(from, 0, &[apart, line, 1]);
            let target = Strided::new(work, to, &[stack.square(), size, 1]);
            let sizes = vec![count, rows, columns];
            elements(card, sizes, [source.clone(), source, target], Value::of("x"))?;
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
fn invert(stack: Stack<'_>, parts: &[Memory; 2]) -> Result<()> {
    let (size, mut block) = (stack.size, BLOCK);
    while block < size {
        let whole = size / (2 * block);
        if whole > 0 {
            let batch = (whole, 2 * block * (size + 1));
            invert_pairs(stack, parts, (0, block, block), batch)?;
        }
        let start = whole * 2 * block;
        if start + block < size {
            let rest = size - start - block;
            invert_pairs(stack, parts, (start, block, rest), (1, 0))?;
        }
        block *= 2;
    }
    Ok(())
}

/// Pairs of blocks of `block` and `rest` rows, the first of which begins at `start`. Columns of `B` go from the left, some
/// at a time: `A^-1` is lower triangular, so none that is done is looked at again.
fn invert_pairs(
    stack: Stack<'_>,
    [first, second]: &[Memory; 2],
    (start, block, rest): (usize, usize, usize),
    (pairs, apart): (usize, usize),
) -> Result<()> {
    let (Stack { card, count, size, .. }, width) = (stack, part_of(block));
    let of_pair = rest * width;
    let part = |memory| Matrix { memory, first: 0, line: width, outer: pairs * of_pair, inner: of_pair };
    let place = |row: usize, column: usize| row * size + column;
    let of_work = |row, column| Matrix { inner: apart, ..stack.matrix(place(row, column)) };
    let (below, all) = (start + block, stack.all());
    for column in (start..below).step_by(width) {
        let template = Product {
            b_along: false,
            batch: [count, pairs],
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
        let own = Slice::all(second, count * pairs * of_pair);
        let source = Strided::new(own, 0, &[pairs * of_pair, of_pair, width, 1]);
        let target = Strided::new(all, place(below, column), &[stack.square(), apart, size, 1]);
        let sizes = vec![count, pairs, rest, width];
        elements(card, sizes, [source.clone(), source, target], Value::of("-x"))?;
    }
    Ok(())
}

/// A lower triangular matrix turned about both axes.
const TURNED: Square<'static> = Square {
    row: "p.size - 1u - i",
    column: "p.size - 1u - j",
    value: "select(0.0, x, j >= i)",
    number: 0.0,
};

/// Turns a lower triangular matrix about both axes, in place: `rows` rows from above and as many from below change
/// places at a time.
fn turn_back(stack: Stack<'_>, parts: &[Memory; 2], rows: usize) -> Result<()> {
    let Stack { card, memory: work, size, .. } = stack;
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
            TURNED.run_rows(
                card,
                (from, Rows { own: own.clone(), line: size }),
                None,
                size,
                (stack.all(), to.clone()),
            )?;
        }
    }
    Ok(())
}
