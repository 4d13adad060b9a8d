//! Products of matrices: the one kernel that most of the time is spent in, in parts that fit bindings.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::program::{Program, program};
use super::tiles::Tiles;
use crate::error::{Result, bail};

/// Unchecked: in workgroup memory places are a thread's number and constants, below the lines' lengths (16 * Q < 16 * Q
/// + 1); in buffers they are looked at before each access.
static PRODUCT: Program = Program { checked: false, ..program!("product", 3, 1, "operands") };

/// Unchecked as that is.
static WIDE: Program = Program { checked: false, ..program!("wide", 3, 1, "operands") };

/// Tiles from which on the card is busy with wide ones.
const BUSY: usize = 128;

/// A matrix or a batch of them in some memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'m> {
    pub(super) memory: &'m Memory,
    /// The first element.
    pub(super) first: usize,
    /// Elements between lines.
    pub(super) line: usize,
    /// Elements between neighbours of the batch's axes.
    pub(super) outer: usize,
    pub(super) inner: usize,
}

impl<'m> Matrix<'m> {
    /// One matrix of lines of `line` elements.
    pub(super) fn of(slice: Slice<'m>, line: usize) -> Self {
        Self { memory: slice.memory, first: slice.first, line, outer: 0, inner: 0 }
    }

    /// From another element on.
    pub(super) fn from(self, element: usize) -> Self {
        Self { first: self.first + element, ..self }
    }
}

/// What becomes of the sums.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish<'m> {
    Replace,
    /// With a number added for each column.
    Bias(Slice<'m>),
    Add,
    Subtract,
}

/// One product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'m> {
    pub(super) a: Matrix<'m>,
    /// Whether neighbours of the axis k lie side by side: `[m, k]`, not `[k, m]`.
    pub(super) a_along: bool,
    pub(super) b: Matrix<'m>,
    /// `[n, k]`, not `[k, n]`.
    pub(super) b_along: bool,
    pub(super) c: Matrix<'m>,
    /// m, k, n.
    pub(super) sizes: [usize; 3],
    /// Outer and inner.
    pub(super) batch: [usize; 2],
    /// Neighbours of the inner axis that have one `b`.
    pub(super) share: usize,
    pub(super) finish: Finish<'m>,
    /// Only the diagonal and what lies below it is asked for.
    pub(super) triangle: bool,
}

impl<'m> Product<'m> {
    /// `a [m, k] @ b [n, k]^T`, whole matrices.
    pub(super) fn new(a: Slice<'m>, b: Slice<'m>, c: Slice<'m>, [m, k, n]: [usize; 3]) -> Self {
        Self {
            a: Matrix::of(a, k),
            a_along: true,
            b: Matrix::of(b, k),
            b_along: true,
            c: Matrix::of(c, n),
            sizes: [m, k, n],
            batch: [1, 1],
            share: 1,
            finish: Finish::Replace,
            triangle: false,
        }
    }

    fn work(&self) -> u64 {
        2 * (self.sizes.iter().product::<usize>() * self.batch[0] * self.batch[1]) as u64
    }

    fn reach(&self, x: &Matrix<'_>, lines: usize, length: usize, share: usize) -> usize {
        let [outer, inner] = self.batch;
        (outer - 1) * x.outer + (inner - 1) / share * x.inner + (lines - 1) * x.line + length
    }

    /// Elements that each operand reaches over.
    fn reaches(&self) -> [usize; 3] {
        let [m, k, n] = self.sizes;
        let lines = |along: bool, own: usize| if along { (own, k) } else { (k, own) };
        let ((a_lines, a_length), (b_lines, b_length)) = (lines(self.a_along, m), lines(self.b_along, n));
        [
            self.reach(&self.a, a_lines, a_length, 1),
            self.reach(&self.b, b_lines, b_length, self.share),
            self.reach(&self.c, m, n, 1),
        ]
    }

    /// Parts, if an operand does not fit a binding.
    fn parts(&self, card: &Card) -> Result<Option<Vec<Self>>> {
        let room = card.binding - card.alignment as usize / 4;
        let [a, b, c] = self.reaches().map(|reach| reach > room);
        let [outer, inner] = self.batch;
        // A half of the rows or of the batch at a time changes no sum.
        let long = self.work() > card.work && (outer * inner > self.share || self.sizes[0] > 1024);
        if !(a || b || c || long || outer * inner > card.groups as usize) {
            return Ok(None);
        }
        let [mut first, mut second] = [*self; 2];
        let [m, k, n] = self.sizes;
        if outer > 1 {
            (first.batch[0], second.batch[0]) = (outer / 2, outer - outer / 2);
            for (x, by) in [(&mut second.a, self.a), (&mut second.b, self.b), (&mut second.c, self.c)] {
                *x = x.from(outer / 2 * by.outer);
            }
        } else if inner > self.share {
            let half = (inner / 2 / self.share).max(1) * self.share;
            (first.batch[1], second.batch[1]) = (half, inner - half);
            second.a = self.a.from(half * self.a.inner);
            second.b = self.b.from(half / self.share * self.b.inner);
            second.c = self.c.from(half * self.c.inner);
        } else if self.triangle && (c || long || a && self.a_along) && m > 1 {
            return Ok(Some(self.of_triangle()));
        } else if (c || long || a && self.a_along) && m > 1 {
            let half = m / 2;
            (first.sizes[0], second.sizes[0]) = (half, m - half);
            second.a = self.a.from(half * if self.a_along { self.a.line } else { 1 });
            second.c = self.c.from(half * self.c.line);
        } else if b && self.b_along && n > 1 && !self.triangle {
            let half = n / 2;
            (first.sizes[2], second.sizes[2]) = (half, n - half);
            second.b = self.b.from(half * self.b.line);
            second.c = self.c.from(half);
            if let Finish::Bias(bias) = self.finish {
                second.finish = Finish::Bias(bias.part(half, n - half));
            }
        } else if (a || b) && k > 1 {
            let half = k / 2;
            (first.sizes[1], second.sizes[1]) = (half, k - half);
            second.a = self.a.from(half * if self.a_along { 1 } else { self.a.line });
            second.b = self.b.from(half * if self.b_along { 1 } else { self.b.line });
            if matches!(self.finish, Finish::Replace | Finish::Bias(_)) {
                second.finish = Finish::Add;
            }
        } else {
            bail!(
                "a product [{m}, {k}] x [{k}, {n}] is more than {} sees at once; hint: compute this model with cpu",
                card.adapter.name
            );
        }
        Ok(Some(vec![first, second]))
    }

    /// A triangle as two triangles and the rectangle that lies left of the second one.
    fn of_triangle(&self) -> Vec<Self> {
        let [m, k, _] = self.sizes;
        let half = m / 2;
        let lines = |x: &Matrix<'m>, along: bool| x.from(half * if along { x.line } else { 1 });
        let (a, b) = (lines(&self.a, self.a_along), lines(&self.b, self.b_along));
        let c = self.c.from(half * self.c.line);
        vec![
            Self { sizes: [half, k, half], ..*self },
            Self { a, c, sizes: [m - half, k, half], triangle: false, ..*self },
            Self { a, b, c: c.from(half), sizes: [m - half, k, m - half], ..*self },
        ]
    }

    /// Whether all lines are whole vec4s.
    fn in_fours(&self) -> bool {
        let [m, k, n] = self.sizes;
        let whole = |x: &Matrix<'_>, length: usize| {
            [x.first, x.line, x.outer, x.inner, length].iter().all(|number| number.is_multiple_of(4))
        };
        whole(&self.a, if self.a_along { k } else { m })
            && whole(&self.b, if self.b_along { k } else { n })
            && whole(&self.c, n)
    }

    /// Computes it.
    pub(super) fn run(&self, card: &Arc<Card>) -> Result<()> {
        let [m, k, n] = self.sizes;
        let [outer, inner] = self.batch;
        if m * n * outer * inner == 0 {
            return Ok(());
        }
        if let Some(parts) = self.parts(card)? {
            return parts.iter().try_for_each(|part| part.run(card));
        }
        let tiles = |q: usize, r: usize| (m.div_ceil(64 * q), n.div_ceil(64 * r));
        let busy = |(rows, columns): (usize, usize)| rows * columns * outer * inner >= BUSY;
        let wide = |size: usize| if card.wide_tiles && size > 64 { 2 } else { 1 };
        let (q, r) = if busy(tiles(wide(m), wide(n))) { (wide(m), wide(n)) } else { (1, 1) };
        // In turn where tiles are wide both ways.
        let turns = card.tiles != Tiles::Plain && (q, r) == (2, 2);
        let r = if turns && card.tiles == Tiles::Long && n > 128 && busy(tiles(2, 4)) { 4 } else { r };
        let (rows, columns) = tiles(q, r);
        if rows > card.groups as usize || columns > card.groups as usize {
            bail!("a product of {m} rows and {n} columns has more tiles than {} starts", card.adapter.name);
        }
        let finish = match self.finish {
            Finish::Replace => "sum",
            Finish::Bias(_) => "sum + bias",
            Finish::Add => "old + sum",
            Finish::Subtract => "old - sum",
        };
        let flag = |holds: bool| u8::from(holds).to_string();
        let (a_line, b_line) = (16 * q + 1, 16 * r + 1);
        let words = [
            ("VEC", flag(self.in_fours())),
            ("A_ALONG", flag(self.a_along)),
            ("B_ALONG", flag(self.b_along)),
            ("TRIANGLE", flag(self.triangle)),
            ("BIAS", flag(matches!(self.finish, Finish::Bias(_)))),
            ("OLD", flag(matches!(self.finish, Finish::Add | Finish::Subtract))),
            ("FINISH", finish.to_owned()),
            ("QM", q.to_string()),
            ("QN", r.to_string()),
            ("A_LINE", a_line.to_string()),
            ("B_LINE", b_line.to_string()),
            ("A_ROOM", (16 * a_line).to_string()),
            ("B_ROOM", (16 * b_line).to_string()),
            ("AM", (q / 2).to_string()),
            ("BN", (r / 2).to_string()),
        ];
        let [a, b, c] = self.reaches();
        let slice = |x: &Matrix<'m>, count| Slice { memory: x.memory, first: x.first, count };
        let b_slice = slice(&self.b, b);
        let bias = if let Finish::Bias(bias) = self.finish { bias } else { b_slice };
        let numbers = [
            m,
            n,
            k,
            self.a.line,
            self.b.line,
            self.c.line,
            inner,
            self.share,
            self.a.outer,
            self.a.inner,
            self.b.outer,
            self.b.inner,
            self.c.outer,
            self.c.inner,
        ];
        let program = if turns { &WIDE } else { &PRODUCT };
        card.launch(&Launch {
            program,
            words: &words,
            slices: &[slice(&self.a, a), b_slice, bias, slice(&self.c, c)],
            numbers: &numbers.map(|number| number as u32),
            groups: [columns as u32, rows as u32, (outer * inner) as u32],
            work: self.work(),
        })
    }
}
