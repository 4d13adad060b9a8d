//! Elementary operations.

use std::sync::Arc;

use mlx_format::FloatType;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::parts::by_parts;
use super::program::Program;
use super::strided::{Strided, Value, elements};
use super::transposed::transposed;
use crate::Tensor;
use crate::elementary::{Combine, Map, Reduce};
use crate::error::{Result, bail};
use crate::shape::View;

static REDUCE: Program =
    Program { name: "reduce", source: include_str!("wgsl/reduce.wgsl"), checked: true, reads: 1, writes: 1 };
static ROWS: Program =
    Program { name: "rows", source: include_str!("wgsl/rows.wgsl"), checked: true, reads: 2, writes: 1 };

/// Elements that a thread adds up in order where each has a column.
const PART: usize = 256;
/// Elements that a workgroup adds up where it has a row.
const LONG_PART: usize = 16_384;
/// Rows from this length on get a workgroup.
const LONG: usize = 64;

/// Whole numbers as bytes for the device.
pub(super) fn bytes_of(numbers: &[u32]) -> &[u8] {
    bytemuck::cast_slice(numbers)
}

/// The nearest number of a dtype to `x`, in WGSL.
pub(super) const fn rounded_to(float: FloatType) -> &'static str {
    match float {
        FloatType::F32 => "x",
        FloatType::Bf16 => "as_bf16(x)",
        FloatType::F16 => "as_f16(x)",
    }
}

/// `function` of `x`, in WGSL.
fn mapped(function: Map) -> Value<'static> {
    let text = match function {
        Map::Exp => "exponential(x)",
        Map::Log => "log(x)",
        Map::Sqrt => "sqrt(x)",
        Map::Tanh => "hyperbolic_tangent(x)",
        Map::Erf => "error_function(x)",
        Map::Reciprocal => "1.0 / x",
        Map::Absolute => "abs(x)",
        Map::Sign => "sign_of(x)",
        Map::Affine { factor, offset } => {
            return Value { text: "x * a + b", a: factor as f32, b: offset as f32 };
        }
        Map::Clamp { low, high } => return Value { text: "clamped(x, a, b)", a: low, b: high },
        Map::Within { low, high } => {
            return Value { text: "select(0.0, 1.0, x > a && x < b)", a: low, b: high };
        }
        Map::Rounded(float) => rounded_to(float),
    };
    Value::of(text)
}

/// `value` of each element of `x` and the same element of `y`.
pub(super) fn pairs(card: &Arc<Card>, x: &Tensor, y: &Tensor, value: Value<'_>) -> Result<Memory> {
    let count = x.elem_count();
    let out = card.room(count)?;
    let all =
        [Slice::of(x)?, Slice::of(y)?, Slice::all(&out, count)].map(|slice| Strided::new(slice, 0, &[1]));
    elements(card, vec![count], all, value)?;
    Ok(out)
}

/// One number, so many times.
pub(super) fn fill(card: &Arc<Card>, value: f32, count: usize) -> Result<Memory> {
    let out = card.room(count)?;
    if value.to_bits() == 0 {
        card.clear(out.buffer()?);
        return Ok(out);
    }
    let one = card.put(&value.to_le_bytes())?;
    let source = Strided::new(Slice::all(&one, 1), 0, &[0]);
    let target = Strided::new(Slice::all(&out, count), 0, &[1]);
    elements(card, vec![count], [source.clone(), source, target], Value::of("x"))?;
    Ok(out)
}

pub(super) fn map(card: &Arc<Card>, x: &Tensor, function: Map) -> Result<Memory> {
    pairs(card, x, x, mapped(function))
}

pub(super) fn combine(
    card: &Arc<Card>,
    x: &Tensor,
    y: &Tensor,
    shape: &[usize],
    function: Combine,
) -> Result<Memory> {
    let value = Value::of(match function {
        Combine::Add => "x + y",
        Combine::Subtract => "x - y",
        Combine::Multiply => "x * y",
        Combine::Divide => "x / y",
    });
    let out = card.room(shape.iter().product())?;
    let own = View::all(shape);
    let of = |tensor: &'_ Tensor| View::broadcast(tensor.dims(), shape);
    let all = [
        Strided::new(Slice::of(x)?, 0, &of(x)?.strides),
        Strided::new(Slice::of(y)?, 0, &of(y)?.strides),
        Strided::new(Slice::all(&out, 0), 0, &own.strides),
    ];
    elements(card, own.shape, all, value)?;
    Ok(out)
}

/// What `view` sees of `x`, one after the other.
fn gathered(card: &Arc<Card>, x: Slice<'_>, view: &View, to: Slice<'_>) -> Result<()> {
    let own = View::all(&view.shape);
    let source = Strided::new(x, view.start, &view.strides);
    elements(card, own.shape, [source.clone(), source, Strided::new(to, 0, &own.strides)], Value::of("x"))
}

/// Rows and columns of the matrix whose transpose a view is, if it is large enough for tiles.
fn turned(view: &View) -> Option<(usize, usize)> {
    let ([columns, rows], [1, line]) = (&view.shape[..], &view.strides[..]) else { return None };
    (line == columns && *rows >= 32 && *columns >= 32).then_some((*rows, *columns))
}

pub(super) fn arrange(card: &Arc<Card>, x: &Tensor, view: &View) -> Result<Memory> {
    let count = view.shape.iter().product();
    let out = card.room(count)?;
    let x = Slice::of(x)?;
    if let Some((rows, columns)) = turned(view) {
        transposed(card, x.part(view.start, count), Slice::all(&out, count), rows, columns)?;
    } else {
        gathered(card, x, view, Slice::all(&out, count))?;
    }
    Ok(out)
}

/// Whether no two elements of a view lie at one place.
fn apart(view: &View) -> bool {
    let mut axes: Vec<(usize, usize)> =
        view.strides.iter().copied().zip(view.shape.iter().copied()).filter(|(_, size)| *size > 1).collect();
    axes.sort_unstable();
    let mut reach = 0;
    axes.into_iter().all(|(stride, size)| {
        let free = stride > reach;
        reach += stride * (size - 1);
        free
    })
}

pub(super) fn scatter(card: &Arc<Card>, x: &Tensor, view: &View, count: usize) -> Result<Memory> {
    let out = card.room(count)?;
    card.clear(out.buffer()?);
    if view.shape.contains(&0) {
        return Ok(out);
    }
    // Axes that repeat an element are summed first, the last one first.
    let (mut kept, mut sum) = (view.clone(), None);
    for axis in (0..kept.shape.len()).rev().filter(|axis| view.strides[*axis] == 0) {
        let sizes =
            [kept.shape[..axis].iter().product(), kept.shape[axis], kept.shape[axis + 1..].iter().product()];
        if kept.shape[axis] > 1 {
            let from = match &sum {
                None => Slice::of(x)?,
                Some(sum) => Slice::all(sum, sizes.iter().product()),
            };
            sum = Some(reduce(card, from, sizes, Reduce::Sum)?);
        }
        kept.shape[axis] = 1;
    }
    if !apart(&kept) {
        bail!("scatter: elements of a view {view:?} lie at one place");
    }
    let own = View::all(&kept.shape);
    let source = match &sum {
        None => Slice::of(x)?,
        Some(sum) => Slice::all(sum, own.shape.iter().product()),
    };
    let source = Strided::new(source, 0, &own.strides);
    let target = Strided::new(Slice::all(&out, count), kept.start, &kept.strides);
    elements(card, own.shape, [source.clone(), source, target], Value::of("x"))?;
    Ok(out)
}

pub(super) fn join(card: &Arc<Card>, parts: &[&Tensor], widths: &[usize]) -> Result<Memory> {
    let rows = parts.iter().zip(widths).map(|(part, width)| part.elem_count() / (*width).max(1)).max();
    let (rows, width) = (rows.unwrap_or(0), widths.iter().sum::<usize>());
    let out = card.room(rows * width)?;
    let mut start = 0;
    for (part, own) in parts.iter().zip(widths) {
        let source = Strided::new(Slice::of(part)?, 0, &[*own, 1]);
        let target = Strided::new(Slice::all(&out, rows * width), start, &[width, 1]);
        elements(card, vec![rows, *own], [source.clone(), source, target], Value::of("x"))?;
        start += own;
    }
    Ok(out)
}

/// Sums or largest elements along the middle axis.
pub(super) fn reduce(
    card: &Arc<Card>,
    x: Slice<'_>,
    [outer, count, inner]: [usize; 3],
    how: Reduce,
) -> Result<Memory> {
    let lanes = inner == 1 && count >= LONG;
    let room = (card.binding - card.alignment as usize / 4) / inner.max(1);
    let part = (if lanes { LONG_PART } else { PART }).min(room);
    if part == 0 {
        bail!(
            "{inner} columns are more than {} sees at once; hint: compute this model with cpu",
            card.adapter.name
        );
    }
    let parts = count.div_ceil(part).max(1);
    let out = card.room(outer * parts * inner)?;
    let (start, joined) = match how {
        Reduce::Sum => (0f32, "sum + value"),
        Reduce::Largest => (f32::NEG_INFINITY, "select(sum, value, value > sum)"),
    };
    // Rows of the result whose elements fit a binding, and whose results do.
    let step = (room / part.min(count.max(1))).max(1);
    for first in (0..outer * parts * inner.min(1)).step_by(step) {
        let rows = step.min(outer * parts - first);
        let place = |row: usize| (row / parts * count + (row % parts * part).min(count)) * inner;
        let (begin, end) = (place(first), place(first + rows));
        let results = rows * inner;
        let numbers = [results, first, count, part, parts, inner].map(|number| number as u32);
        let groups = if lanes { card.groups_for(results) } else { card.row_of_groups(results) };
        card.launch(&Launch {
            program: &REDUCE,
            words: &[("JOINED", joined.to_owned()), ("LANES", u8::from(lanes).to_string())],
            slices: &[
                x.part(begin, end - begin),
                Slice::all(&out, outer * parts * inner).part(first * inner, results),
            ],
            numbers: &[&numbers[..], &[start.to_bits(), begin as u32]].concat(),
            groups,
            work: (end - begin) as u64,
        })?;
    }
    if parts == 1 {
        Ok(out)
    } else {
        reduce(card, Slice::all(&out, outer * parts * inner), [outer, parts, inner], how)
    }
}

pub(super) fn rows(card: &Arc<Card>, x: &Tensor, width: usize, ids: &[u32]) -> Result<Memory> {
    gathered_rows(card, Slice::of(x)?, (width, width), ids)
}

/// Rows `ids` of `x`, seen as rows of `width` elements. With several lists of ids, one behind the other, each is for
/// `own` of a row's elements.
pub(super) fn gathered_rows(
    card: &Arc<Card>,
    x: Slice<'_>,
    (width, own): (usize, usize),
    ids: &[u32],
) -> Result<Memory> {
    let lists = width / own.max(1);
    let chosen = ids.len() / lists.max(1);
    let out = card.room(chosen * width)?;
    if width == 0 || ids.is_empty() {
        return Ok(out);
    }
    let list = card.put(bytes_of(ids))?;
    by_parts(card, (x.count / width, chosen, width), |rows, to| {
        let count = to.len() * width;
        let numbers = [count, width, rows.start, rows.end, 0, to.start, own, chosen];
        card.launch(&Launch {
            program: &ROWS,
            words: &[],
            slices: &[
                x.part(rows.start * width, rows.len() * width),
                Slice::all(&list, ids.len()),
                Slice::all(&out, chosen * width).part(to.start * width, count),
            ],
            numbers: &numbers.map(|number| number as u32),
            groups: card.row_of_groups(count),
            work: count as u64,
        })
    })?;
    Ok(out)
}

pub(super) fn add_rows(
    card: &Arc<Card>,
    x: &Tensor,
    width: usize,
    ids: &[u32],
    count: usize,
) -> Result<Memory> {
    let out = card.room(count * width)?;
    if ids.is_empty() || width == 0 {
        card.clear(out.buffer()?);
        return Ok(out);
    }
    // For each row of the result where its sources begin in the list of all.
    let mut starts = vec![0u32; count + 1];
    for id in ids {
        starts[*id as usize + 1] += 1;
    }
    for row in 0..count {
        starts[row + 1] += starts[row];
    }
    let (mut next, mut list) = (starts.clone(), vec![0u32; ids.len()]);
    for (row, id) in (0u32..).zip(ids) {
        list[next[*id as usize] as usize] = row;
        next[*id as usize] += 1;
    }
    let (begin, numbers) = (starts.len(), [starts, list].concat());
    let (x, list) = (Slice::of(x)?, card.put(bytes_of(&numbers))?);
    by_parts(card, (ids.len(), count, width), |own, to| {
        let results = to.len() * width;
        let keep = u8::from(own.start > 0).to_string();
        card.launch(&Launch {
            program: &ROWS,
            words: &[("ADD", "1".to_owned()), ("KEEP", keep)],
            slices: &[
                x.part(own.start * width, own.len() * width),
                Slice::all(&list, numbers.len()),
                Slice::all(&out, count * width).part(to.start * width, results),
            ],
            numbers: &[results, width, own.start, own.end, begin, to.start, width, 0]
                .map(|number| number as u32),
            groups: card.row_of_groups(results),
            work: results as u64,
        })
    })?;
    Ok(out)
}
