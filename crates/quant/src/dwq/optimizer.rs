//! Adam (Kingma and Ba 2014, arXiv 1412.6980) with a rate for each group, a warm-up, a decay and a clip.
//!
//! A group's natural unit is its own step between codes: a change of the center by a step moves every weight by one code, and so does,
//! on average, a change of the scale by a step over the spread of the codes. Rates are fractions of these, so that the same
//! rate fits any width, any layer and any model.

use rayon::prelude::*;

use super::grids::{Grid, Slopes};

const BETAS: (f32, f32) = (0.9, 0.999);
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
fn units(grid: &Grid, at: usize) -> (f32, f32) {
    let codes = ((1u32 << grid.scheme.bits()) - 1) as f32;
    let scale = grid.scales[at].abs();
    (scale * 12f32.sqrt() / codes, scale)
}

/// Length of all slopes, each in its unit; sums in a fixed order.
pub(super) fn length(grids: &[Grid], slopes: &[Slopes]) -> f64 {
    let one = |(grid, slopes): (&Grid, &Slopes)| -> f64 {
        (0..grid.scales.len())
            .map(|at| {
                let (scale, center) = units(grid, at);
                f64::from(slopes[0][at] * scale).powi(2) + f64::from(slopes[1][at] * center).powi(2)
            })
            .sum()
    };
    let parts: Vec<f64> = grids.par_iter().zip(slopes).map(one).collect();
    parts.iter().sum::<f64>().sqrt()
}

/// By how much a gradient is shortened, and what is usual from now on.
pub(super) fn clip(length: f64, usual: Option<f64>) -> (f64, f64) {
    let Some(usual) = usual else { return (1.0, length) };
    let allowed = length.min(CLIP * usual);
    (if length > 0.0 { allowed / length } else { 1.0 }, MEMORY * usual + (1.0 - MEMORY) * allowed)
}

/// One step of all grids; `step` counts from 0.
#[expect(clippy::needless_range_loop, reason = "a place in six arrays")]
pub(super) fn advance(grids: &mut [Grid], slopes: &[Slopes], rate: Rate, part: f64, clip: f64, step: usize) {
    let count = i32::try_from(step).unwrap_or(i32::MAX - 1) + 1;
    let (first, second) = (1.0 - BETAS.0.powi(count), 1.0 - BETAS.1.powi(count));
    grids.par_iter_mut().zip(slopes).for_each(|(grid, slopes)| {
        for at in 0..grid.scales.len() {
            let units = units(grid, at);
            let rates = match rate {
                Rate::Relative(rate) => [units.0, units.1].map(|unit| unit * (rate * part) as f32),
                Rate::Absolute(rate) => [(rate * part) as f32; 2],
            };
            for (leaf, rate) in rates.into_iter().enumerate() {
                let slope = slopes[leaf][at] * clip as f32;
                let [m, v] = [2 * leaf, 2 * leaf + 1].map(|which| grid.moments[which][at]);
                let m = BETAS.0 * m + (1.0 - BETAS.0) * slope;
                let v = BETAS.1 * v + (1.0 - BETAS.1) * slope * slope;
                grid.moments[2 * leaf][at] = m;
                grid.moments[2 * leaf + 1][at] = v;
                let change = rate * (m / first) / ((v / second).sqrt() + 1e-12);
                let value = if leaf == 0 { &mut grid.scales[at] } else { &mut grid.centers[at] };
                *value -= change;
            }
        }
    });
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
