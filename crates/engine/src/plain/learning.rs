//! Learned rounding: what a weight decodes to while it learns, its steps, and what its loss leaves out.

use mlx_format::Scheme;
use rayon::prelude::*;

use super::{check_same, numbers};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::learning::{LearningStart, LearningState};
use crate::settings::Held;

/// No weight moves farther than so many mean steps.
pub(crate) const LONGEST: f32 = 4.0;

/// The sign; zero of zero.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

fn code(position: f32, most: f32) -> f32 {
    position.round().clamp(0.0, most)
}

/// Refuses numbers of groups that do not fit each other.
pub(crate) fn check_start(start: &LearningStart, factors: &[Tensor; 2]) -> Result<[usize; 2]> {
    let (rows, groups) = start.scales.dims2()?;
    start.ranges.iter().chain(factors).try_for_each(|own| check_same(&start.scales, own, "learned_grid"))?;
    Ok([rows, groups])
}

/// Refuses a state that does not fit its start; gives the number of groups and their size.
pub(crate) fn check_learning(start: &LearningStart, state: &LearningState) -> Result<[usize; 2]> {
    let [rows, groups] = check_start(start, &state.factors)?;
    let size = start.scheme.group_size();
    if state.positions.dims() != [rows, groups * size] {
        bail!("positions {:?} with scales {:?} of groups of {size}", state.positions.dims(), [rows, groups]);
    }
    Ok([rows * groups, size])
}

/// Refuses more elements than there are.
pub(crate) fn check_count(x: &Tensor, count: usize) -> Result<()> {
    if count > x.elem_count() {
        bail!("without_largest: {count} of {:?}", x.dims());
    }
    Ok(())
}

pub(crate) fn learned_grid(start: &LearningStart, factors: &[Tensor; 2]) -> Result<[Tensor; 2]> {
    let [rows, groups] = check_start(start, factors)?;
    let (most, float) = (start.most(), start.float);
    let (scales, [bottom, top]) = (numbers(&start.scales)?, start.ranges.each_ref().map(numbers));
    let (bottom, top, [low, high]) = (bottom?, top?, factors.each_ref().map(numbers));
    let (low, high) = (low?, high?);
    let stored = |at: usize| {
        let [low, high] = [bottom[at] * (low[at] - 1.0), top[at] * (high[at] - 1.0)];
        let scale = scales[at] + (high - low) / most;
        (float.round(scale), float.round(bottom[at] + low))
    };
    let (own, biases): (Vec<f32>, Vec<f32>) =
        (0..rows * groups).into_par_iter().with_min_len(1 << 12).map(stored).unzip();
    let like = |values| Tensor::from_vec(values, (rows, groups), start.scales.device());
    Ok([like(own)?, like(biases)?])
}

pub(crate) fn learned_weight(start: &LearningStart, state: &LearningState) -> Result<Tensor> {
    let [_, size] = check_learning(start, state)?;
    let [scales, biases] = learned_grid(start, &state.factors)?;
    let (scales, biases, positions) = (numbers(&scales)?, numbers(&biases)?, numbers(&state.positions)?);
    let most = start.most();
    let mut out = vec![0f32; positions.len()];
    let groups =
        out.par_chunks_mut(size).zip(positions.par_chunks(size)).zip(scales.par_iter().zip(&*biases));
    groups.for_each(|((out, positions), (scale, bias))| {
        for (value, position) in out.iter_mut().zip(positions) {
            *value = code(*position, most) * scale + bias;
        }
    });
    Tensor::from_vec(out, state.positions.dims(), state.positions.device())
}

pub(crate) fn learned_codes(scheme: Scheme, positions: &Tensor) -> Result<Held> {
    let most = ((1u32 << scheme.bits()) - 1) as f32;
    let codes = numbers(positions)?.par_iter().map(|position| code(*position, most) as u8).collect();
    positions.device().hold(codes)
}

fn fetched(codes: &Held, count: usize) -> Result<&[u8]> {
    match codes.host()? {
        codes if codes.len() == count => Ok(codes),
        codes => bail!("{} codes where {count} are needed", codes.len()),
    }
}

pub(crate) fn fetch_codes(codes: &Held, count: usize) -> Result<Vec<u8>> {
    fetched(codes, count).map(<[u8]>::to_vec)
}

/// Changes the numbers of three tensors, in place where they lie in this process's memory and nobody else has them.
fn change(all: [&mut Tensor; 3], change: impl FnOnce([&mut [f32]; 3])) -> Result<()> {
    if all.iter().all(|own| own.host().is_ok()) {
        let [first, second, third] = all.map(Tensor::host_mut);
        change([first?, second?, third?]);
        return Ok(());
    }
    let [first, second, third] = all.each_ref().map(|own| own.to_vec());
    let mut values = [first?, second?, third?];
    change(values.each_mut().map(Vec::as_mut_slice));
    for (own, values) in all.into_iter().zip(values) {
        *own = Tensor::from_vec(values, own.dims(), own.device())?;
    }
    Ok(())
}

pub(crate) fn learning_step(
    start: &LearningStart,
    state: &mut LearningState,
    gradient: &Tensor,
    rate: f32,
) -> Result<()> {
    let [groups, size] = check_learning(start, state)?;
    check_same(&state.positions, gradient, "learning_step")?;
    let most = start.most();
    let [scales, _] = learned_grid(start, &state.factors)?;
    let (scales, begun, gradient) =
        (numbers(&scales)?, fetched(&start.codes, groups * size)?, numbers(gradient)?);
    let [bottom, top] = start.ranges.each_ref().map(numbers);
    let (bottom, top) = (bottom?, top?);
    let [low, high] = &mut state.factors;
    change([&mut state.positions, low, high], |[positions, low, high]| {
        let ends = low.par_iter_mut().zip(high).zip(bottom.par_iter().zip(&*top)).zip(&*scales);
        let groups = positions.par_chunks_mut(size).zip(begun.par_chunks(size));
        groups.zip(gradient.par_chunks(size)).zip(ends).for_each(
            |(((positions, begun), gradient), (((low, high), (bottom, top)), scale))| {
                let (mut to_low, mut to_high) = (0f32, 0f32);
                let mean = gradient.iter().map(|slope| slope.abs()).sum::<f32>() / size as f32;
                let unit = rate * sign(*scale) / mean.max(f32::MIN_POSITIVE);
                for ((position, begun), gradient) in positions.iter_mut().zip(begun).zip(gradient) {
                    let part = code(*position, most) / most;
                    to_high += gradient * part;
                    to_low += gradient * (1.0 - part);
                    let begun = f32::from(*begun);
                    let moved = *position - (unit * gradient).clamp(-LONGEST * rate, LONGEST * rate);
                    *position = moved.clamp(begun - 1.0, begun + 1.0).clamp(-0.5, most + 0.5);
                }
                *low -= rate * sign(to_low * bottom);
                *high -= rate * sign(to_high * top);
            },
        );
    })
}

pub(crate) fn without_largest(x: &Tensor, count: usize) -> Result<Tensor> {
    check_count(x, count)?;
    if count == 0 {
        return Ok(x.detach());
    }
    let mut values = x.to_vec()?;
    let mut sizes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    let at = sizes.len() - count;
    let (_, border, _) = sizes.select_nth_unstable_by(at, f32::total_cmp);
    let border = *border;
    values.iter_mut().filter(|value| value.abs() >= border).for_each(|value| *value = 0.0);
    Tensor::from_vec(values, x.dims(), x.device())
}
