//! Training of grids: what is stored of them, how long their gradients are, and steps of Adam.

use mlx_format::FloatType;
use rayon::prelude::*;

use super::{check_same, numbers};
use crate::Tensor;
use crate::error::Result;
use crate::settings::{AdamInputs, AdamStep, GridSlopes};

/// Keeps a step finite where the gradient was zero so far.
pub(crate) const EPSILON: f32 = 1e-12;

/// Refuses gradients that do not fit their grid.
pub(crate) fn check_grid(grid: &GridSlopes<'_>) -> Result<()> {
    grid.slopes.into_iter().try_for_each(|slopes| check_same(grid.scales, slopes, "grid_squares"))
}

/// Refuses inputs of different shapes.
pub(crate) fn check_adam(inputs: AdamInputs<'_>) -> Result<()> {
    let AdamInputs { values, moments: [first, second], slopes, scales } = inputs;
    [first, second, slopes, scales].into_iter().try_for_each(|own| check_same(values, own, "adam"))
}

pub(crate) fn stored_grid(
    scales: &Tensor,
    centers: &Tensor,
    middle: f32,
    float: FloatType,
) -> Result<[Tensor; 2]> {
    check_same(scales, centers, "stored_grid")?;
    let (all_scales, all_centers) = (numbers(scales)?, numbers(centers)?);
    let stored = |(scale, center): (&f32, &f32)| {
        let scale = float.round(*scale);
        (scale, float.round(center - scale * middle))
    };
    let (own, biases): (Vec<f32>, Vec<f32>) =
        all_scales.par_iter().zip(&*all_centers).with_min_len(1 << 12).map(stored).unzip();
    let like = |values| Tensor::from_vec(values, scales.dims(), scales.device());
    Ok([like(own)?, like(biases)?])
}

pub(crate) fn grid_squares(grids: &[GridSlopes<'_>]) -> Result<Vec<f64>> {
    let one = |grid: &GridSlopes<'_>| -> Result<f64> {
        check_grid(grid)?;
        let (scales, [of_scales, of_centers]) = (numbers(grid.scales)?, grid.slopes.map(numbers));
        let (of_scales, of_centers) = (of_scales?, of_centers?);
        let both = of_scales.iter().zip(&*of_centers);
        let square = |(scale, (of_scale, of_center)): (&f32, (&f32, &f32))| {
            let [unit, center_unit] = grid.units.map(|unit| unit.of(*scale));
            f64::from(of_scale * unit).powi(2) + f64::from(of_center * center_unit).powi(2)
        };
        Ok(scales.iter().zip(both).map(square).sum())
    };
    grids.par_iter().map(one).collect()
}

pub(crate) fn adam(step: &AdamStep, inputs: AdamInputs<'_>) -> Result<[Tensor; 3]> {
    check_adam(inputs)?;
    let AdamInputs { values, moments: [first, second], slopes, scales } = inputs;
    let (mut own, mut first, mut second) = (values.to_vec()?, first.to_vec()?, second.to_vec()?);
    let (slopes, scales) = (numbers(slopes)?, numbers(scales)?);
    let AdamStep { betas: [keep_first, keep_second], corrections, clip, rate, unit } = *step;
    let moments = first.iter_mut().zip(&mut second);
    for ((value, (m, v)), (slope, scale)) in own.iter_mut().zip(moments).zip(slopes.iter().zip(&*scales)) {
        let slope = slope * clip;
        *m = keep_first * *m + (1.0 - keep_first) * slope;
        *v = keep_second * *v + (1.0 - keep_second) * slope * slope;
        let rate = unit.map_or(rate, |unit| unit.of(*scale) * rate);
        *value -= rate * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + EPSILON);
    }
    let like = |made| Tensor::from_vec(made, values.dims(), values.device());
    Ok([like(own)?, like(first)?, like(second)?])
}
