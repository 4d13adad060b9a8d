//! Learned rounding: what a weight decodes to while it learns, its steps, and what its loss leaves out. Nothing is
//! waited for but codes that somebody fetches.

use std::sync::Arc;

use mlx_format::{FloatType, Scheme};

use super::Gpu;
use super::card::Card;
use super::elementary::rounded_to;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::parts::row_parts;
use super::profile::Operation;
use super::program::{Program, program};
use super::square::made_alone;
use super::trained::{memory_of, on_card};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::learning::{Learning, LearningStart, LearningState};
use crate::plain::{LONGEST, check_count, check_learning, check_same, check_start};
use crate::settings::Held;

static GRID: Program = program!("learned_grid", 5, 2, "grid", "learning");
static WEIGHT: Program = program!("learned_weight", 3, 1, "grid", "learning");
static CODES: Program = program!("learned_codes", 1, 1, "learning");
static STEP: Program = program!("learning_step", 5, 3, "learning");
static COUNTS: Program = program!("counts", 2, 1);
static BORDER: Program = program!("border", 1, 1);
static BELOW: Program = program!("below", 2, 1);

/// Numbers that a workgroup counts.
const PART: usize = 1 << 14;
/// Bits of a size that are found at a time, the first first: of 31, which a float32 without its sign has.
const DIGITS: [u32; 3] = [11, 10, 10];

impl Learning for Gpu {
    fn learned_grid(&self, start: &LearningStart, factors: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        let _operation = Operation::new("learned rounding");
        check_start(start, factors)?;
        grid(&self.card, start, factors)
    }

    fn learned_weight(&self, start: &LearningStart, state: &LearningState) -> Result<Tensor> {
        let _operation = Operation::new("learned rounding");
        weight(&self.card, start, state)
    }

    fn learned_codes(&self, scheme: Scheme, positions: &Tensor) -> Result<Held> {
        let _operation = Operation::new("learned rounding");
        codes(&self.card, scheme, positions)
    }

    fn fetch_codes(&self, codes: &Held, count: usize) -> Result<Vec<u8>> {
        let held = on_card(&self.card, codes)?;
        let memory = enough(memory_of(&held)?, count)?;
        let mut found = Vec::new();
        self.card.get(memory, 0, count.div_ceil(4), &mut |words| {
            found.extend_from_slice(&bytemuck::cast_slice(words)[..count]);
        })?;
        Ok(found)
    }

    fn learning_step(
        &self,
        start: &LearningStart,
        state: &mut LearningState,
        gradient: &Tensor,
        rate: f32,
    ) -> Result<()> {
        let _operation = Operation::new("learned rounding");
        step(&self.card, start, state, gradient, rate)
    }

    fn without_largest(&self, x: &Tensor, count: usize) -> Result<Tensor> {
        let _operation = Operation::new("learned rounding");
        without_largest(&self.card, x, count)
    }
}

/// Memory that holds so many codes at least.
fn enough(memory: &Memory, count: usize) -> Result<&Memory> {
    if memory.buffer()?.size() < count as u64 {
        bail!("fewer codes than {count}");
    }
    Ok(memory)
}

fn stored(float: FloatType) -> (&'static str, String) {
    ("STORED", rounded_to(float).to_owned())
}

fn grid(card: &Arc<Card>, start: &LearningStart, factors: &[Tensor; 2]) -> Result<[Tensor; 2]> {
    let count = start.scales.elem_count();
    let made = [card.room(count)?, card.room(count)?];
    let [bottoms, tops] = &start.ranges;
    let [lows, highs] = factors;
    let [scales, biases] = made.each_ref().map(|memory| Slice::all(memory, count));
    let all = [
        Slice::of(&start.scales)?,
        Slice::of(bottoms)?,
        Slice::of(tops)?,
        Slice::of(lows)?,
        Slice::of(highs)?,
        scales,
        biases,
    ];
    for part in row_parts(card, count, 1) {
        card.launch(&Launch {
            program: &GRID,
            words: &[stored(start.float)],
            slices: &all.map(|slice| slice.part(part.start, part.len())),
            numbers: &[part.len() as u32, start.most() as u32, 0],
            groups: card.row_of_groups(part.len()),
            work: 16 * part.len() as u64,
        })?;
    }
    Ok(made.map(|memory| tensor(memory, start.scales.dims(), &start.scales)))
}

fn weight(card: &Arc<Card>, start: &LearningStart, state: &LearningState) -> Result<Tensor> {
    let [groups, size] = check_learning(start, state)?;
    let [scales, biases] = grid(card, start, &state.factors)?;
    let values = card.room(groups * size)?;
    let [positions, scales, biases] =
        [Slice::of(&state.positions)?, Slice::of(&scales)?, Slice::of(&biases)?];
    let all = Slice::all(&values, groups * size);
    for own in row_parts(card, groups, size) {
        let (first, length) = (own.start * size, own.len() * size);
        card.launch(&Launch {
            program: &WEIGHT,
            words: &[stored(FloatType::F32)],
            slices: &[
                positions.part(first, length),
                scales.part(own.start, own.len()),
                biases.part(own.start, own.len()),
                all.part(first, length),
            ],
            numbers: &[length as u32, size as u32, start.most().to_bits(), 0],
            groups: card.row_of_groups(length),
            work: 8 * length as u64,
        })?;
    }
    Ok(tensor(values, state.positions.dims(), &state.positions))
}

fn codes(card: &Arc<Card>, scheme: Scheme, positions: &Tensor) -> Result<Held> {
    let (count, all) = (positions.elem_count(), Slice::of(positions)?);
    if !count.is_multiple_of(4) {
        bail!("codes of positions {:?} are no whole words", positions.dims());
    }
    let most = ((1u32 << scheme.bits()) - 1) as f32;
    let words = card.room(count / 4)?;
    for own in row_parts(card, count / 4, 4) {
        card.launch(&Launch {
            program: &CODES,
            words: &[],
            slices: &[
                all.part(4 * own.start, 4 * own.len()),
                Slice::all(&words, count / 4).part(own.start, own.len()),
            ],
            numbers: &[own.len() as u32, most.to_bits()],
            groups: card.row_of_groups(own.len()),
            work: 32 * own.len() as u64,
        })?;
    }
    Ok(Held::Device(Arc::new(words)))
}

fn step(
    card: &Arc<Card>,
    start: &LearningStart,
    state: &mut LearningState,
    gradient: &Tensor,
    rate: f32,
) -> Result<()> {
    let [groups, size] = check_learning(start, state)?;
    check_same(&state.positions, gradient, "learning_step")?;
    let held = on_card(card, &start.codes)?;
    let begun = Slice::all(enough(memory_of(&held)?, groups * size)?, groups * size / 4);
    let [scales, _] = grid(card, start, &state.factors)?;
    let [low, high] = &mut state.factors;
    [&mut state.positions, low, high].into_iter().try_for_each(|own| made_alone(card, own))?;
    let [bottoms, tops] = &start.ranges;
    let [lows, highs] = &state.factors;
    let (gradient, positions) = (Slice::of(gradient)?, Slice::of(&state.positions)?);
    let (scales, bottoms, tops) = (Slice::of(&scales)?, Slice::of(bottoms)?, Slice::of(tops)?);
    let (lows, highs) = (Slice::of(lows)?, Slice::of(highs)?);
    let numbers = [1.0 / size as f32, rate, LONGEST * rate, f32::MIN_POSITIVE].map(f32::to_bits);
    for own in row_parts(card, groups, size) {
        let (first, length) = (own.start * size, own.len() * size);
        let sizes = [own.len(), size / 4, start.most() as usize].map(|number| number as u32);
        card.launch(&Launch {
            program: &STEP,
            words: &[],
            slices: &[
                gradient.part(first, length),
                begun.part(first / 4, length / 4),
                scales.part(own.start, own.len()),
                bottoms.part(own.start, own.len()),
                tops.part(own.start, own.len()),
                positions.part(first, length),
                lows.part(own.start, own.len()),
                highs.part(own.start, own.len()),
            ],
            numbers: &[&sizes[..], &numbers[..], &[0]].concat(),
            groups: card.row_of_groups(own.len()),
            work: 16 * length as u64,
        })?;
    }
    Ok(())
}

/// The border is found by radix selection, without a number that leaves the card.
fn without_largest(card: &Arc<Card>, x: &Tensor, wanted: usize) -> Result<Tensor> {
    check_count(x, wanted)?;
    if wanted == 0 {
        return Ok(x.detach());
    }
    let (count, own) = (x.elem_count(), Slice::of(x)?);
    let values = DIGITS.map(|digits| 1usize << digits);
    let (counts, state) = (card.room(values.iter().sum())?, card.room(2)?);
    card.clear(counts.buffer()?);
    card.clear(state.buffer()?);
    let state = Slice::all(&state, 2);
    let (mut known, mut first) = (31, 0);
    for (digits, values) in DIGITS.into_iter().zip(values) {
        let next = known - digits;
        let counts = Slice::all(&counts, 0).part(first, values);
        for part in row_parts(card, count, 1) {
            let parts = part.len().div_ceil(PART);
            let numbers = [part.len(), PART, parts].map(|number| number as u32);
            card.launch(&Launch {
                program: &COUNTS,
                words: &[],
                slices: &[own.part(part.start, part.len()), state, counts],
                numbers: &[&numbers[..], &[known, next, values as u32]].concat(),
                groups: card.groups_for(parts),
                work: 8 * part.len() as u64,
            })?;
        }
        card.launch(&Launch {
            program: &BORDER,
            words: &[],
            slices: &[counts, state],
            numbers: &[values as u32, wanted as u32],
            groups: [1, 1, 1],
            work: values as u64,
        })?;
        (known, first) = (next, first + values);
    }
    let out = card.room(count)?;
    for part in row_parts(card, count, 1) {
        card.launch(&Launch {
            program: &BELOW,
            words: &[],
            slices: &[
                own.part(part.start, part.len()),
                state,
                Slice::all(&out, count).part(part.start, part.len()),
            ],
            numbers: &[part.len() as u32],
            groups: card.row_of_groups(part.len()),
            work: 2 * part.len() as u64,
        })?;
    }
    Ok(tensor(out, x.dims(), x))
}
