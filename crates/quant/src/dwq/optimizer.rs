//! Adam (Kingma and Ba 2014, arXiv 1412.6980) with a rate for each group, a warm-up, a decay and a clip.
//!
//! A group's natural unit is its own step between codes: a change of the center by a step moves every weight by one code, and so does,
//! on average, a change of the scale by a step over the spread of the codes. Rates are fractions of these, so that the same
//! rate fits any width, any layer and any model. A norm's weight is measured in what the norm multiplies with.

use mlx_quant_engine::{AdamInputs, AdamStep, GridSlopes, Result as EngineResult, Tensor, Unit};

use super::grids::{Grid, Slopes};
use super::norms::NormWeight;
use super::student::{BatchSlopes, Student};
use crate::walks::each;

/// Of the first and the second moment.
const BETAS: [f32; 2] = [0.9, 0.999];
/// Part of the steps during which the rate rises.
const WARM_UP: f64 = 0.1;
/// What is left of the rate at the end.
const FLOOR: f64 = 0.05;
/// A gradient longer than this many times the usual is cut to that.
const CLIP: f64 = 3.0;
/// Weight of the past in what is usual.
const MEMORY: f64 = 0.9;

/// How far a step goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rate {
    /// Part of a code by which weights move.
    Relative(f64),
    /// Of scales and biases, as `mlx_lm.dwq` has it.
    Absolute(f64),
}

/// The part of the rate at step `step` of `steps`, the first being 0.
pub(super) fn schedule(step: usize, steps: usize) -> f64 {
    let warm = (steps as f64 * WARM_UP).ceil().max(1.0);
    let at = step as f64 + 1.0;
    if at <= warm {
        return at / warm;
    }
    let passed = (at - warm) / (steps as f64 - warm).max(1.0);
    FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (std::f64::consts::PI * passed.min(1.0)).cos())
}

/// A group's units: of its scale, of its center.
fn units(grid: &Grid) -> [Unit; 2] {
    let codes = ((1u32 << grid.scheme.bits()) - 1) as f32;
    [Unit { factor: 12f32.sqrt(), divisor: codes }, Unit { factor: 1.0, divisor: 1.0 }]
}

/// A norm's unit: what it multiplies with.
const NORM: Unit = Unit { factor: 1.0, divisor: 1.0 };

/// Length of all slopes, each in its unit; sums in a fixed order. The device is waited for once.
pub(super) fn length(student: &Student<'_>, slopes: &BatchSlopes) -> EngineResult<f64> {
    let factors = student.norms.iter().map(NormWeight::factors).collect::<EngineResult<Vec<_>>>()?;
    let of_grids = student.grids.iter().zip(&slopes.grids).map(|(grid, slopes)| GridSlopes {
        scales: &grid.scales,
        slopes: slopes.each_ref(),
        units: units(grid),
    });
    let nothing = Unit { factor: 0.0, divisor: 1.0 };
    let of_norms = factors.iter().zip(&slopes.norms).map(|(factors, slopes)| GridSlopes {
        scales: factors,
        slopes: [slopes, slopes],
        units: [NORM, nothing],
    });
    let all: Vec<GridSlopes<'_>> = of_grids.chain(of_norms).collect();
    Ok(student.walk.device.grid_squares(&all)?.iter().sum::<f64>().sqrt())
}

/// By how much a gradient is shortened, and what is usual from now on.
pub(super) fn clip(length: f64, usual: Option<f64>) -> (f64, f64) {
    let Some(usual) = usual else { return (1.0, length) };
    let allowed = length.min(CLIP * usual);
    (if length > 0.0 { allowed / length } else { 1.0 }, MEMORY * usual + (1.0 - MEMORY) * allowed)
}

/// How one step goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Going {
    pub(super) rate: Rate,
    /// Part of the rate, by [`schedule`].
    pub(super) part: f64,
    /// Factor of gradients, by [`clip`].
    pub(super) clip: f64,
    /// From 0.
    pub(super) step: usize,
}

impl Going {
    /// The step of numbers that have this unit.
    fn step(self, unit: Unit) -> AdamStep {
        let count = i32::try_from(self.step).unwrap_or(i32::MAX - 1) + 1;
        let (rate, unit) = match self.rate {
            Rate::Relative(rate) => (rate, Some(unit)),
            Rate::Absolute(rate) => (rate, None),
        };
        AdamStep {
            betas: BETAS,
            corrections: BETAS.map(|beta| 1.0 - beta.powi(count)),
            clip: self.clip as f32,
            rate: (rate * self.part) as f32,
            unit,
        }
    }
}

/// One step of everything that is trained.
pub(super) fn advance(
    student: &mut Student<'_>,
    slopes: &BatchSlopes,
    going: Going,
    pool: &rayon::ThreadPool,
) -> EngineResult<()> {
    let Student { walk, grids, norms, .. } = student;
    let of_grid = |(grid, slopes): (&mut Grid, &Slopes)| advance_grid(grid, slopes, going);
    each(&walk.device, pool, grids.iter_mut().zip(&slopes.grids), of_grid)?;
    let of_norm = |(norm, slopes): (&mut NormWeight, &Tensor)| advance_norm(norm, slopes, going);
    each(&walk.device, pool, norms.iter_mut().zip(&slopes.norms), of_norm)?;
    Ok(())
}

fn advance_grid(grid: &mut Grid, slopes: &Slopes, going: Going) -> EngineResult<()> {
    // Scales as they are give the units of both.
    let scales = grid.scales.clone();
    for (leaf, unit) in units(grid).into_iter().enumerate() {
        let values = if leaf == 0 { &grid.scales } else { &grid.centers };
        let moments = [&grid.moments[2 * leaf], &grid.moments[2 * leaf + 1]];
        let inputs = AdamInputs { values, moments, slopes: &slopes[leaf], scales: &scales };
        let [value, first, second] = scales.device().adam(&going.step(unit), inputs)?;
        *(if leaf == 0 { &mut grid.scales } else { &mut grid.centers }) = value;
        (grid.moments[2 * leaf], grid.moments[2 * leaf + 1]) = (first, second);
    }
    Ok(())
}

fn advance_norm(norm: &mut NormWeight, slopes: &Tensor, going: Going) -> EngineResult<()> {
    let (values, factors) = (&norm.weights, norm.factors()?);
    let inputs = AdamInputs { values, moments: norm.moments.each_ref(), slopes, scales: &factors };
    let [weights, first, second] = values.device().adam(&going.step(NORM), inputs)?;
    (norm.weights, norm.moments) = (weights, [first, second]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let all: Vec<f64> = (0..100).map(|step| schedule(step, 100)).collect();
        assert!(all[..10].is_sorted() && (all[9] - 1.0).abs() < 1e-12);
        assert!(all[10..].is_sorted_by(|a, b| a >= b) && (all[99] - FLOOR).abs() < 1e-9);
        assert!(schedule(0, 1).is_finite() && schedule(0, 1) > 0.0);
    }

    #[test]
    fn outliers_are_cut_and_do_not_become_usual() {
        assert_eq!(clip(2.0, None), (1.0, 2.0));
        let (factor, usual) = clip(100.0, Some(2.0));
        assert!((factor - 0.06).abs() < 1e-12 && (usual - 2.4).abs() < 1e-12);
        assert_eq!(clip(0.0, Some(0.0)).0, 1.0);
    }
}
