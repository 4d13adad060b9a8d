//! Linear layers that note what passes them, and those whose grids are trained.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::linear::{for_input, for_weight, forward, sizes, tensor};
use super::memory::Memory;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::elementary::Opaque;
use crate::error::{Error, Result, bail};
use crate::plain::{check_codes, check_decode, check_linear};
use crate::settings::{Codes, Held, Notebook};

static SQUARES: Program = program!("squares", 2, 1);
static PAIRS: Program = program!("pairs", 1, 1);
static GROUPS: Program = program!("groups", 2, 2);
static DECODE: Program = program!("decode", 3, 1, "grid");

/// Rows that a thread adds up.
const PART: usize = 64;

/// Codes on the card.
pub(super) fn on_card(card: &Arc<Card>, codes: &Held) -> Result<Arc<dyn Opaque>> {
    match codes {
        Held::Device(memory) => Ok(memory.clone()),
        Held::Host(codes) => Ok(Arc::new(card.put(codes)?)),
    }
}

/// The memory behind it.
pub(super) fn memory_of(codes: &Arc<dyn Opaque>) -> Result<&Memory> {
    let any: &dyn std::any::Any = &**codes;
    any.downcast_ref().ok_or_else(|| Error::msg("codes of another engine"))
}

/// What squares are of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Squares<'s> {
    /// The features themselves.
    Features,
    /// Expected gradients of labels with respect to logits; of a row five numbers, the first two its log-sum-exp.
    Slopes { tokens: Slice<'s>, softcap: Option<f64> },
}

/// Sums of squares of the features of `x [rows, features]`, numbers in two float32: to `sums [2, features]`, with `keep`
/// added to what is there.
pub(super) fn squares(
    card: &Arc<Card>,
    x: Slice<'_>,
    features: usize,
    what: Squares<'_>,
    sums: Slice<'_>,
    keep: bool,
) -> Result<()> {
    let all = x.count / features.max(1);
    if all == 0 && !keep {
        card.clear_some(sums.memory.buffer()?, 4 * sums.first as u64, Some(4 * sums.count as u64));
    }
    let (tokens, inverse) = match what {
        Squares::Features => (None, 0.0),
        Squares::Slopes { tokens, softcap } => (Some(tokens), softcap.map_or(0.0, f64::recip)),
    };
    for rows in row_parts(card, all, features) {
        let parts = rows.len().div_ceil(PART);
        let count = 2 * parts * features;
        let out = card.room(count)?;
        let own = x.part(rows.start * features, rows.len() * features);
        let numbers = [parts * features, features, rows.len(), PART, 0].map(|number| number as u32);
        card.launch(&Launch {
            program: &SQUARES,
            words: &[("SLOPES", u8::from(tokens.is_some()).to_string())],
            slices: &[
                own,
                tokens.map_or(own, |tokens| tokens.part(5 * rows.start, 5 * rows.len())),
                Slice::all(&out, count),
            ],
            numbers: &[&numbers[..], &[(inverse as f32).to_bits()]].concat(),
            groups: card.row_of_groups(parts * features),
            work: 32 * (rows.len() * features) as u64,
        })?;
        card.launch(&Launch {
            program: &PAIRS,
            words: &[("KEEP", u8::from(keep || rows.start > 0).to_string())],
            slices: &[Slice::all(&out, count), sums],
            numbers: &[features as u32, parts as u32, 0],
            groups: card.row_of_groups(features),
            work: 8 * count as u64,
        })?;
    }
    Ok(())
}

/// Adds squares of the features of `x` to sums that stay on the card.
fn note(card: &Arc<Card>, x: &Tensor, features: usize, held: &mut Option<Tensor>) -> Result<()> {
    let keep = held.is_some();
    let sums = match held.take() {
        Some(sums) => sums,
        None => tensor(card.room(2 * features)?, &[2, features], x),
    };
    if sums.dims() != [2, features] {
        bail!("a notebook with sums {:?} beside {features} features", sums.dims());
    }
    squares(card, Slice::of(x)?, features, Squares::Features, Slice::of(&sums)?, keep)?;
    *held = Some(sums);
    Ok(())
}

/// Adds a bias that no gradient reaches.
fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        None => Ok(y),
        Some(bias) => y.broadcast_add(&bias.detach()),
    }
}

pub(super) fn observed_linear(
    card: &Arc<Card>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    notebook: &Notebook,
) -> Result<Tensor> {
    check_linear(x, weight, bias)?;
    let (shape, [m, k, n]) = sizes(x, weight)?;
    let out = forward(card, x, weight, None, [m, k, n])?;
    {
        let mut notes = notebook.open();
        notes.seen.tokens += m as u64;
        note(card, x, k, &mut notes.held[0])?;
    }
    let (card, notebook, weight) = (card.clone(), notebook.clone(), weight.detach());
    let y = Tensor::made(x.device(), shape, out.shared(), "observed linear", &[x], move |pull| {
        note(&card, pull.grad, n, &mut notebook.open().held[1])?;
        Ok(vec![Some(for_input(&card, &pull.inputs[0], &weight, pull.grad)?)])
    });
    with_bias(y, bias)
}

/// Codes and what they decode to, both on the card.
pub(super) fn decode(
    card: &Arc<Card>,
    codes: &Held,
    (size, middle): (usize, f32),
    scales: &Tensor,
    biases: &Tensor,
) -> Result<Arc<Codes>> {
    let [rows, groups] = check_decode(scales, biases)?;
    if !size.is_multiple_of(4) {
        bail!("decode: groups of {size} are no whole words");
    }
    let held = on_card(card, codes)?;
    let (count, memory) = (rows * groups * size, memory_of(&held)?);
    if memory.buffer()?.size() < count as u64 {
        bail!("decode: fewer codes than scales {:?} of groups of {size}", scales.dims());
    }
    let values = card.room(count)?;
    let [own_scales, own_biases] = [Slice::of(scales)?, Slice::of(biases)?];
    for own in row_parts(card, rows * groups, size) {
        let (first, length) = (own.start * size, own.len() * size);
        card.launch(&Launch {
            program: &DECODE,
            words: &[("STORED", "x".to_owned())],
            slices: &[
                Slice::all(memory, count / 4).part(first / 4, length / 4),
                own_scales.part(own.start, own.len()),
                own_biases.part(own.start, own.len()),
                Slice::all(&values, count).part(first, length),
            ],
            numbers: &[length as u32 / 4, size as u32, 0],
            groups: card.row_of_groups(length / 4),
            work: 4 * length as u64,
        })?;
    }
    let weight = tensor(values, &[rows, groups * size], scales);
    Ok(Arc::new(Codes { codes: Held::Device(held), group_size: size, middle, weight }))
}

pub(super) fn packed_linear(
    card: &Arc<Card>,
    x: &Tensor,
    codes: &Arc<Codes>,
    (scales, centers): (&Tensor, &Tensor),
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    check_linear(x, &codes.weight, bias)?;
    check_codes(codes, scales, centers)?;
    let (shape, sizes) = sizes(x, &codes.weight)?;
    let out = forward(card, x, &codes.weight, None, sizes)?;
    let inputs = [x, scales, centers];
    let numbers =
        if inputs.iter().any(|input| input.is_tracked()) { Some(on_card(card, &codes.codes)?) } else { None };
    let (card, codes) = (card.clone(), codes.clone());
    let y = Tensor::made(x.device(), shape, out.shared(), "packed linear", &inputs, move |pull| {
        let (x, grad) = (&pull.inputs[0], pull.grad);
        let for_x = if pull.wanted[0] { Some(for_input(&card, x, &codes.weight, grad)?) } else { None };
        let Some(numbers) = numbers.as_ref().filter(|_| pull.wanted[1] || pull.wanted[2]) else {
            return Ok(vec![for_x, None, None]);
        };
        let weight = for_weight(&card, x, grad, sizes)?;
        let [scales, centers] = by_group(&card, &weight, &codes, memory_of(numbers)?)?;
        let like = |memory| Some(tensor(memory, pull.inputs[1].dims(), x));
        Ok(vec![for_x, like(scales), like(centers)])
    });
    with_bias(y, bias)
}

/// Gradients of scales and centers, from that of the weight.
fn by_group(card: &Arc<Card>, weight: &Tensor, codes: &Codes, numbers: &Memory) -> Result<[Memory; 2]> {
    let (size, count) = (codes.group_size.max(1), weight.elem_count());
    let groups = count / size;
    let [scales, centers] = [card.room(groups)?, card.room(groups)?];
    let weight = Slice::of(weight)?;
    for own in row_parts(card, groups, size) {
        // Groups are whole words of four codes.
        let (first, length) = (own.start * size, own.len() * size);
        card.launch(&Launch {
            program: &GROUPS,
            words: &[],
            slices: &[
                weight.part(first, length),
                Slice::all(numbers, count.div_ceil(4)).part(first / 4, length.div_ceil(4)),
                Slice::all(&scales, groups).part(own.start, own.len()),
                Slice::all(&centers, groups).part(own.start, own.len()),
            ],
            numbers: &[own.len() as u32, size as u32, codes.middle.to_bits()],
            groups: card.groups_for(own.len().div_ceil(8)),
            work: 4 * length as u64,
        })?;
    }
    Ok([scales, centers])
}
