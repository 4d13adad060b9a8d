//! Gram matrices, what is made of them, and their factors.

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
use crate::Tensor;
use crate::elementary::Reduce;
use crate::error::Result;

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
        self.run_to(card, x, list, size, &out)?;
        Ok(out)
    }

    fn run_to(
        &self,
        card: &Arc<Card>,
        x: Slice<'_>,
        list: Option<&Memory>,
        size: usize,
        out: &Memory,
    ) -> Result<()> {
        let words = [
            ("ROW", self.row.to_owned()),
            ("COLUMN", self.column.to_owned()),
            ("VALUE", self.value.to_owned()),
        ];
        by_parts(card, (size, size, size), |own, to| {
            let source = x.part(own.start * size, own.len() * size);
            let count = to.len() * size;
            let numbers = [count, size, to.start, own.start, own.end].map(|number| number as u32);
            card.launch(&Launch {
                program: &SQUARE,
                words: &words,
                slices: &[
                    source,
                    list.map_or(source, |list| Slice::all(list, size)),
                    Slice::all(out, size * size).part(to.start * size, count),
                ],
                numbers: &[&numbers[..], &[self.number.to_bits()]].concat(),
                groups: card.row_of_groups(count),
                work: 8 * count as u64,
            })
        })
    }
}

/// Adds `x^T x` to the lower triangle of `sum`: half a product.
pub(super) fn gram_add(card: &Arc<Card>, sum: &mut Tensor, x: &Tensor) -> Result<()> {
    let size = sum.dim(0)?;
    if !sum.is_alone() {
        let own = Slice::of(sum)?;
        let copy = card.room(own.count)?;
        let bytes = |count: usize| count as u64 * 4;
        card.copy(own.memory.buffer()?, bytes(own.first), copy.buffer()?, 0, bytes(own.count))?;
        *sum = tensor(copy, sum.dims(), sum);
    }
    let (x, to) = (Slice::of(x)?, Slice::of(sum)?);
    let rows = x.count / size.max(1);
    let lines = Matrix::of(x, size);
    let product =
        Product { finish: Finish::Add, triangle: true, ..Product::new(x, x, to, [size, rows, size]) };
    Product { a: lines, a_along: false, b: lines, b_along: false, loose: true, ..product }.run(card)
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

/// `U` with `(H + added)^-1 = U^T U` and `H + added`: the Cholesky factor of H turned about both axes, inverted and
/// turned back (as in the CPU engine). `None` if that is not positive definite.
pub(super) fn factor(card: &Arc<Card>, hessian: &Tensor, added: f32) -> Result<Option<(Tensor, Tensor)>> {
    let size = hessian.dim(0)?;
    let x = Slice::of(hessian)?;
    let shifted = "select(x, x + p.number, i == j)";
    let damped = Square { row: "i", column: "j", value: shifted, number: added }.run(card, x, None, size)?;
    let turned = Square { row: "p.size - 1u - i", column: "p.size - 1u - j", value: shifted, number: added };
    let work = turned.run(card, x, None, size)?;
    let (lower, inverse) = (card.room(size * size)?, card.room(size * size)?);
    let status = card.room(1)?;
    card.clear(inverse.buffer()?);
    card.clear(status.buffer()?);
    cholesky(card, size, &work, &lower, &inverse, &status)?;
    let upper = card.room(size * size)?;
    invert(card, size, [&lower, &work, &upper], &inverse)?;
    drop((lower, work));
    let turned = Square {
        row: "p.size - 1u - i",
        column: "p.size - 1u - j",
        value: "select(0.0, x, j >= i)",
        number: 0.0,
    };
    turned.run_to(card, Slice::all(&inverse, size * size), None, size, &upper)?;
    let upper = tensor(upper, hessian.dims(), hessian);
    // Whether a block failed, and a sum that is finite if all is: the card is waited for once.
    let (sum, both) = (upper.abs()?.sum_all()?, card.room(2)?);
    let own = Slice::of(&sum)?;
    card.copy(status.buffer()?, 0, both.buffer()?, 0, 4)?;
    card.copy(own.memory.buffer()?, 4 * own.first as u64, both.buffer()?, 4, 4)?;
    let mut failed = true;
    card.get(&both, 0, 2, &mut |both| failed = both[0] != 0.0 || !both[1].is_finite())?;
    if failed {
        return Ok(None);
    }
    Ok(Some((upper, tensor(damped, hessian.dims(), hessian))))
}

/// Blocks of `work` from the first: the block on the diagonal, the panel below it (to `lower`), and the rest less the
/// panel's square. The inverses of blocks on the diagonal go to `inverse`.
fn cholesky(
    card: &Arc<Card>,
    size: usize,
    work: &Memory,
    lower: &Memory,
    inverse: &Memory,
    status: &Memory,
) -> Result<()> {
    let [work, lower, inverse] = [work, lower, inverse].map(|memory| Slice::all(memory, size * size));
    for first in (0..size).step_by(BLOCK) {
        let own = BLOCK.min(size - first);
        let (corner, reach) = (first * (size + 1), (own - 1) * size + own);
        card.launch(&Launch {
            program: &CHOLESKY,
            words: &[],
            slices: &[work.part(corner, reach), inverse.part(corner, reach), Slice::all(status, 1)],
            numbers: &[own as u32, size as u32],
            groups: [1, 1, 1],
            work: (own * own * own) as u64,
        })?;
        let below = size - first - own;
        if below == 0 {
            return Ok(());
        }
        let panel = corner + own * size;
        let template = Product::new(work, inverse, lower, [below, own, own]);
        let c = Matrix::of(lower, size).from(panel);
        Product {
            a: Matrix::of(work, size).from(panel),
            b: Matrix::of(inverse, size).from(corner),
            c,
            ..template
        }
        .run(card)?;
        Product {
            a: c,
            b: c,
            c: Matrix::of(work, size).from(panel + own),
            sizes: [below, own, below],
            finish: Finish::Subtract,
            triangle: true,
            ..template
        }
        .run(card)?;
    }
    Ok(())
}

/// The inverse of a lower triangular matrix whose blocks on the diagonal are inverted already: of two neighbours `A`
/// and `C` on the diagonal with `B` below `A` it is `-C^-1 B A^-1` that stands in place of `B`. Blocks double until
/// there is one.
fn invert(
    card: &Arc<Card>,
    size: usize,
    [lower, first, second]: [&Memory; 3],
    inverse: &Memory,
) -> Result<()> {
    let mut block = BLOCK;
    while block < size {
        let whole = size / (2 * block);
        if whole > 0 {
            let batch = (whole, 2 * block * (size + 1));
            invert_pairs(card, size, [lower, first, second], inverse, (0, block, block), batch)?;
        }
        let start = whole * 2 * block;
        if start + block < size {
            let rest = size - start - block;
            invert_pairs(card, size, [lower, first, second], inverse, (start, block, rest), (1, 0))?;
        }
        block *= 2;
    }
    Ok(())
}

/// Pairs of blocks of `block` and `rest` rows, the first of which begins at `start`.
fn invert_pairs(
    card: &Arc<Card>,
    size: usize,
    [lower, first, second]: [&Memory; 3],
    inverse: &Memory,
    (start, block, rest): (usize, usize, usize),
    (pairs, apart): (usize, usize),
) -> Result<()> {
    let matrix = |memory, row: usize, column: usize| Matrix {
        memory,
        first: row * size + column,
        line: size,
        outer: 0,
        inner: apart,
    };
    let below = start + block;
    let all = Slice::all(lower, size * size);
    let template =
        Product { b_along: false, batch: [1, pairs], ..Product::new(all, all, all, [rest, block, block]) };
    Product {
        a: matrix(lower, below, start),
        b: matrix(inverse, start, start),
        c: matrix(first, below, start),
        ..template
    }
    .run(card)?;
    Product {
        a: matrix(inverse, below, below),
        b: matrix(first, below, start),
        c: matrix(second, below, start),
        sizes: [rest, rest, block],
        ..template
    }
    .run(card)?;
    let strides = [apart, size, 1];
    let place = below * size + start;
    let source = Strided::new(Slice::all(second, size * size), place, &strides);
    let target = Strided::new(Slice::all(inverse, size * size), place, &strides);
    elements(card, vec![pairs, rest, block], [source.clone(), source, target], Value::of("-x"))
}
