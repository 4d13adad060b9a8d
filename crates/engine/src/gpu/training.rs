//! Training of grids: what is stored of them, how long their gradients are, and steps of Adam.

use std::sync::Arc;

use mlx_format::FloatType;

use super::card::Card;
use super::elementary::rounded_to;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::parts::row_parts;
use super::program::{Program, program};
use crate::Tensor;
use crate::error::Result;
use crate::plain::{EPSILON, check_adam, check_grid, check_same};
use crate::settings::{AdamInputs, AdamStep, GridSlopes, Unit};

static STORED: Program = program!("stored", 2, 2);
static LENGTHS: Program = program!("lengths", 3, 1);
static ADAM: Program = program!("adam", 5, 3);

/// Groups that a workgroup adds up.
const PART: usize = 1 << 14;

pub(super) fn stored_grid(
    card: &Arc<Card>,
    scales: &Tensor,
    centers: &Tensor,
    middle: f32,
    float: FloatType,
) -> Result<[Tensor; 2]> {
    check_same(scales, centers, "stored_grid")?;
    let count = scales.elem_count();
    let [own, biases] = [card.room(count)?, card.room(count)?];
    let all = [Slice::of(scales)?, Slice::of(centers)?, Slice::all(&own, count), Slice::all(&biases, count)];
    for part in row_parts(card, count, 1) {
        card.launch(&Launch {
            program: &STORED,
            words: &[("STORED", rounded_to(float).to_owned())],
            slices: &all.map(|slice| slice.part(part.start, part.len())),
            numbers: &[part.len() as u32, middle.to_bits(), 0],
            groups: card.row_of_groups(part.len()),
            work: 4 * part.len() as u64,
        })?;
    }
    Ok([tensor(own, scales.dims(), scales), tensor(biases, scales.dims(), scales)])
}

pub(super) fn grid_squares(card: &Arc<Card>, grids: &[GridSlopes<'_>]) -> Result<Vec<f64>> {
    // Each grid in parts that fit a binding, and each of these in parts of a workgroup.
    let parts = |grid: &GridSlopes<'_>| -> usize {
        row_parts(card, grid.scales.elem_count(), 1).map(|own| own.len().div_ceil(PART)).sum()
    };
    let counts: Vec<usize> = grids.iter().map(parts).collect();
    let all: usize = counts.iter().sum();
    if all == 0 {
        return Ok(vec![0.0; grids.len()]);
    }
    let sums = card.room(2 * all)?;
    let mut next = 0;
    for grid in grids {
        check_grid(grid)?;
        let [of_scales, of_centers] = grid.slopes;
        let inputs = [Slice::of(grid.scales)?, Slice::of(of_scales)?, Slice::of(of_centers)?];
        let units = grid.units.map(|Unit { factor, divisor }| [factor.to_bits(), divisor.to_bits()]);
        for own in row_parts(card, grid.scales.elem_count(), 1) {
            let count = own.len().div_ceil(PART);
            let [scales, of_scales, of_centers] = inputs.map(|slice| slice.part(own.start, own.len()));
            let numbers = [own.len(), PART, count, 0].map(|number| number as u32);
            card.launch(&Launch {
                program: &LENGTHS,
                words: &[],
                slices: &[
                    scales,
                    of_scales,
                    of_centers,
                    Slice::all(&sums, 2 * all).part(2 * next, 2 * count),
                ],
                numbers: &[&numbers[..], units.as_flattened()].concat(),
                groups: card.groups_for(count),
                work: 32 * own.len() as u64,
            })?;
            next += count;
        }
    }
    let mut found = Vec::with_capacity(grids.len());
    card.get(&sums, 0, 2 * all, &mut |mut numbers| {
        for count in &counts {
            let (own, rest) = numbers.split_at(2 * count);
            numbers = rest;
            found.push(own.iter().map(|number| f64::from(*number)).sum());
        }
    })?;
    Ok(found)
}

pub(super) fn adam(card: &Arc<Card>, step: &AdamStep, inputs: AdamInputs<'_>) -> Result<[Tensor; 3]> {
    check_adam(inputs)?;
    let AdamInputs { values, moments: [first, second], slopes, scales } = inputs;
    let (count, dims) = (values.elem_count(), values.dims());
    let made = [card.room(count)?, card.room(count)?, card.room(count)?];
    let [to_values, to_firsts, to_seconds] = made.each_ref().map(|memory| Slice::all(memory, count));
    let [values_now, first, second] = [Slice::of(values)?, Slice::of(first)?, Slice::of(second)?];
    let [slopes, scales] = [Slice::of(slopes)?, Slice::of(scales)?];
    let all = [values_now, first, second, slopes, scales, to_values, to_firsts, to_seconds];
    let AdamStep { betas, corrections, clip, rate, unit } = *step;
    let Unit { factor, divisor } = unit.unwrap_or(Unit { factor: 1.0, divisor: 1.0 });
    let numbers = [betas[0], betas[1], corrections[0], corrections[1], clip, rate, EPSILON, factor, divisor];
    for part in row_parts(card, count, 1) {
        card.launch(&Launch {
            program: &ADAM,
            words: &[("UNIT", u8::from(unit.is_some()).to_string())],
            slices: &all.map(|slice| slice.part(part.start, part.len())),
            numbers: &[&[part.len() as u32], &numbers.map(f32::to_bits)[..]].concat(),
            groups: card.row_of_groups(part.len()),
            work: 16 * part.len() as u64,
        })?;
    }
    Ok(made.map(|memory| tensor(memory, dims, values)))
}
