//! Products of matrices: the one kernel that most of the time is spent in, in parts that fit bindings.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::program::{Program, program};
use super::squares;
use super::tiles::{Form, Tiles};
use super::units::{self, Operand};
use crate::error::{Result, bail};
use crate::settings::Precision;

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

/// Members of a batch that have different numbers of rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grouped<'m> {
    /// Of each member, as numbers of 32 bits: its rows, and where its a, b and c begin.
    pub(super) table: Slice<'m>,
    /// Rows of the largest.
    pub(super) most: usize,
    /// Elements that each operand reaches over.
    pub(super) reaches: [usize; 3],
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
    /// Of row `i` only columns up to `i` and so many more are asked for: the diagonal and what lies below it with 0, a
    /// stripe of a triangle with the rows above it.
    pub(super) triangle: Option<usize>,
    /// Whether a precision below float32 is enough where somebody asks for speed.
    pub(super) loose: bool,
    /// The largest size among operands that lie across k, where it is known.
    pub(super) peak: Option<Slice<'m>>,
    /// Where members have different numbers of rows, of which `sizes` has the mean. All operands fit a binding then.
    pub(super) grouped: Option<Grouped<'m>>,
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
            triangle: None,
            loose: false,
            peak: None,
            grouped: None,
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
        if let Some(grouped) = &self.grouped {
            return grouped.reaches;
        }
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
        if self.grouped.is_some() {
            return Ok(None);
        }
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
        } else if let Some(above) = self.triangle.filter(|_| (c || long || a && self.a_along) && m > 1) {
            return Ok(Some(self.of_triangle(above)));
        } else if (c || long || a && self.a_along) && m > 1 {
            let half = m / 2;
            (first.sizes[0], second.sizes[0]) = (half, m - half);
            second.a = self.a.from(half * if self.a_along { self.a.line } else { 1 });
            second.c = self.c.from(half * self.c.line);
        } else if b && self.b_along && n > 1 && self.triangle.is_none() {
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

    /// A stripe as the rectangle of `above` columns and the triangle right of it; a triangle as two triangles and the
    /// rectangle that lies left of the second one.
    fn of_triangle(&self, above: usize) -> Vec<Self> {
        let [m, k, _] = self.sizes;
        if above > 0 {
            let b = self.b.from(above * if self.b_along { self.b.line } else { 1 });
            let c = self.c.from(above);
            return vec![
                Self { sizes: [m, k, above], triangle: None, ..*self },
                Self { b, c, sizes: [m, k, m], triangle: Some(0), ..*self },
            ];
        }
        let half = m / 2;
        let lines = |x: &Matrix<'m>, along: bool| x.from(half * if along { x.line } else { 1 });
        let (a, b) = (lines(&self.a, self.a_along), lines(&self.b, self.b_along));
        let c = self.c.from(half * self.c.line);
        vec![
            Self { sizes: [half, k, half], ..*self },
            Self { a, c, sizes: [m - half, k, half], triangle: None, ..*self },
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

    /// The form of tiles in turn, if it is computed by them; rows and columns of a tile.
    fn form(&self, card: &Card) -> (Option<Form>, (usize, usize)) {
        let [m, k, n] = self.sizes;
        let batch = self.batch[0] * self.batch[1];
        let busy = |(rows, columns)| m.div_ceil(rows) * n.div_ceil(columns) * batch >= BUSY;
        if card.tiles == Tiles::Turns {
            let form = Form::of(self.a_along && self.b_along);
            let tile = form.tile();
            if form.memory() <= card.adapter.workgroup_memory as usize
                && k > 0
                && m > 64
                && n > 64
                && busy(tile)
            {
                return (Some(form), tile);
            }
        }
        let wide = |size: usize| if card.wide_tiles && size > 64 { 128 } else { 64 };
        let tile = (wide(m), wide(n));
        (None, if busy(tile) { tile } else { (64, 64) })
    }

    /// Whether matrix units compute it. Rows do not decide: a window has the bits that it has in a batch.
    fn by_units(&self, card: &Card) -> bool {
        let [_, k, n] = self.sizes;
        let large = self.triangle.is_some() || k.min(n) >= squares::LEAST;
        card.precision == Precision::Fast
            && self.loose
            && self.batch == [1, 1]
            && self.grouped.is_none()
            && self.in_fours()
            && large
    }

    /// Computes it by matrix units; words, slices and numbers are those of all kernels of products.
    fn run_by_units(
        &self,
        card: &Arc<Card>,
        words: Vec<(&'static str, String)>,
        [a, b, bias, c]: [Slice<'m>; 4],
        numbers: &[u32],
    ) -> Result<()> {
        let operand = |slice, line, along| Operand { slice, line, along, peak: self.peak };
        let (a, b) = (operand(a, self.a.line, self.a_along), operand(b, self.b.line, self.b_along));
        let sizes = (self.sizes, self.in_fours());
        units::run(card, words, sizes, (a, b), (bias, c), (numbers, self.work()))
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
        let by_units = self.by_units(card);
        let (form, tile) = if by_units { (None, squares::TILE) } else { self.form(card) };
        let largest = self.grouped.map_or(m, |grouped| grouped.most);
        let (rows, columns) = (largest.div_ceil(tile.0), n.div_ceil(tile.1));
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
        let steps = form.map_or(16, |form| form.steps);
        let whole = self.grouped.is_none()
            && m.is_multiple_of(tile.0)
            && n.is_multiple_of(tile.1)
            && k.is_multiple_of(steps);
        let mut words = vec![
            ("VEC", flag(self.in_fours())),
            ("A_ALONG", flag(self.a_along)),
            ("B_ALONG", flag(self.b_along)),
            ("TRIANGLE", flag(self.triangle.is_some())),
            ("BIAS", flag(matches!(self.finish, Finish::Bias(_)))),
            ("OLD", flag(matches!(self.finish, Finish::Add | Finish::Subtract))),
            ("FINISH", finish.to_owned()),
            ("GROUPED", flag(self.grouped.is_some())),
            ("ROWS_OF_A", if self.grouped.is_some() { "own_rows" } else { "p.m" }.to_owned()),
        ];
        let [a, b, c] = self.reaches();
        let slice = |x: &Matrix<'m>, count| Slice { memory: x.memory, first: x.first, count };
        let b_slice = slice(&self.b, b);
        let bias = match (self.grouped, self.finish) {
            (Some(grouped), _) => grouped.table,
            (None, Finish::Bias(bias)) => bias,
            _ => b_slice,
        };
        let slices = [slice(&self.a, a), b_slice, bias, slice(&self.c, c)];
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
            self.triangle.unwrap_or(0),
        ]
        .map(|number| number as u32);
        if by_units {
            return self.run_by_units(card, words, slices, &numbers);
        }
        words.push(("WHOLE", flag(self.in_fours() && whole)));
        words.extend(words_of_tiles(form, tile));
        let program = if form.is_some() { &WIDE } else { &PRODUCT };
        card.launch(&Launch {
            program,
            words: &words,
            slices: &slices,
            numbers: &numbers,
            groups: [columns as u32, rows as u32, (outer * inner) as u32],
            work: self.work(),
        })
    }
}

/// What tiles are, in the words of the kernels.
fn words_of_tiles(form: Option<Form>, tile: (usize, usize)) -> Vec<(&'static str, String)> {
    let (a_line, b_line) = (tile.0 / 4 + 1, tile.1 / 4 + 1);
    let mut words = Vec::new();
    let mut number = |name, value: usize| words.push((name, value.to_string()));
    number("A_LINE", a_line);
    number("B_LINE", b_line);
    if let Some(form) = form {
        let fetched = |side: usize| form.steps * side / 4 / form.threads();
        number("THREADS", form.threads());
        number("ROWS", tile.0);
        number("COLUMNS", tile.1);
        number("QM", form.rows);
        number("QN", form.columns);
        number("DOWN", form.down);
        number("ACROSS", form.across);
        number("WARPS", form.across / 8);
        number("STEPS", form.steps);
        number("FOURS", form.steps / 4);
        number("A_FETCHED", fetched(tile.0));
        number("B_FETCHED", fetched(tile.1));
        number("A_ROOM", 2 * form.steps * a_line);
        number("B_ROOM", 2 * form.steps * b_line);
    } else {
        number("QM", tile.0 / 64);
        number("QN", tile.1 / 64);
        number("BRANCH", 1);
        number("A_ROOM", 16 * a_line);
        number("B_ROOM", 16 * b_line);
    }
    words
}
