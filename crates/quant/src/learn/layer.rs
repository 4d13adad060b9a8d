//! A linear whose rounding is learned: where each weight stands between codes, and the range of each group.

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::rounding::Rounded;
use rayon::prelude::*;

/// How far from its code's middle a weight may begin, in steps of the grid: what lies beyond the border to the next code was put
/// where it is by second-order rounding, which has its reasons.
const MARGIN: f32 = 0.4;

/// No weight moves farther than so many mean steps.
const LONGEST: f32 = 4.0;

/// A linear (of an expert) that learns.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    scheme: Scheme,
    float: FloatType,
    columns: usize,
    /// Codes that it began with, `[rows, columns]`.
    begun: Vec<u8>,
    /// Where each weight stands on its group's grid, in steps: the nearest code is its code.
    positions: Vec<f32>,
    /// Scales in the beginning, `[rows, groups]`.
    scales: Vec<f32>,
    /// What the lowest and the highest code decoded to then.
    ranges: [Vec<f32>; 2],
    /// What these are multiplied by.
    factors: [Vec<f32>; 2],
}

/// Codes and ranges of a step.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    codes: Vec<u8>,
    factors: [Vec<f32>; 2],
}

impl Standing {
    pub(super) const fn new(codes: Vec<u8>, factors: [Vec<f32>; 2]) -> Self {
        Self { codes, factors }
    }

    pub(super) fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// By name.
    pub(super) fn factors(&self) -> [(&'static str, &[f32]); 2] {
        [("best.low", &self.factors[0]), ("best.high", &self.factors[1])]
    }
}

/// The largest code.
fn largest(scheme: Scheme) -> f32 {
    ((1u32 << scheme.bits()) - 1) as f32
}

/// The sign; zero of zero.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

impl Layer {
    /// From rounded numbers, and what the weight is above what they decode to, `[rows, columns]`.
    pub(crate) fn new(rounded: &Rounded, float: FloatType, above: &[f32]) -> Self {
        let group = rounded.scheme.group_size();
        let most = largest(rounded.scheme);
        let position = |(at, (code, above)): (usize, (&u8, &f32))| {
            let scale = rounded.scales[at / group];
            let part = if scale == 0.0 { 0.0 } else { above / scale };
            f32::from(*code) + if part.is_finite() { part.clamp(-MARGIN, MARGIN) } else { 0.0 }
        };
        let high = |(scale, bias): (&f32, &f32)| bias + scale * most;
        let ones = vec![1.0; rounded.scales.len()];
        Self {
            scheme: rounded.scheme,
            float,
            columns: rounded.columns,
            begun: rounded.codes.clone(),
            positions: rounded.codes.iter().zip(above).enumerate().map(position).collect(),
            scales: rounded.scales.clone(),
            ranges: [rounded.biases.clone(), rounded.scales.iter().zip(&rounded.biases).map(high).collect()],
            factors: [ones.clone(), ones],
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.begun.len() / self.columns.max(1), self.columns)
    }

    /// Scale and bias of a group in the stored dtype.
    fn stored(&self, at: usize) -> (f32, f32) {
        let [low, high] = [0, 1].map(|end| self.ranges[end][at] * (self.factors[end][at] - 1.0));
        let scale = self.scales[at] + (high - low) / largest(self.scheme);
        (self.float.round(scale), self.float.round(self.ranges[0][at] + low))
    }

    fn code(&self, at: usize) -> f32 {
        self.positions[at].round().clamp(0.0, largest(self.scheme))
    }

    fn codes(&self) -> Vec<u8> {
        (0..self.positions.len()).into_par_iter().map(|at| self.code(at) as u8).collect()
    }

    /// What it decodes to now, `[rows, columns]`.
    pub(crate) fn decoded(&self) -> Vec<f32> {
        let size = self.scheme.group_size();
        let mut out = vec![0f32; self.positions.len()];
        out.par_chunks_mut(size).enumerate().for_each(|(group, out)| {
            let (scale, bias) = self.stored(group);
            for (at, value) in out.iter_mut().enumerate() {
                *value = self.code(group * size + at) * scale + bias;
            }
        });
        out
    }

    /// Weights and groups.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.positions.len(), self.scales.len())
    }

    /// What steps move, by name.
    pub(super) fn moved(&self) -> [(&'static str, &[f32]); 3] {
        [("positions", &self.positions), ("low", &self.factors[0]), ("high", &self.factors[1])]
    }

    /// Takes over what steps had moved, [`Self::counts`] numbers.
    pub(super) fn go_on(&mut self, positions: Vec<f32>, factors: [Vec<f32>; 2]) {
        (self.positions, self.factors) = (positions, factors);
    }

    /// What decides what it decodes to.
    pub(crate) fn standing(&self) -> Standing {
        Standing { codes: self.codes(), factors: self.factors.clone() }
    }

    /// Takes it back to where it stood.
    pub(crate) fn restore(&mut self, standing: Standing) {
        self.positions.par_iter_mut().zip(&standing.codes).for_each(|(position, code)| {
            *position = f32::from(*code);
        });
        self.factors = standing.factors;
    }

    /// As it stands now.
    pub(crate) fn rounded(&self) -> Rounded {
        let codes = self.codes();
        let (scales, biases) = (0..self.ranges[0].len()).map(|at| self.stored(at)).unzip();
        Rounded { scheme: self.scheme, columns: self.columns, codes, scales, biases }
    }

    /// A step against the loss's gradient with respect to what it decodes to, `[rows, columns]`: positions move by `rate` on the mean
    /// over a group, each in proportion to its gradient; ends of ranges by `rate` as a part of them.
    ///
    /// Steps of one length for all (SignRound) let a weight that belongs between two codes spend as long at the farther as at the
    /// nearer one; in proportion it stays longer where its gradient is small. At 2 bits that was worth 3 % of KL.
    pub(crate) fn step(&mut self, gradient: &[f32], rate: f32) {
        let (size, most) = (self.scheme.group_size(), largest(self.scheme));
        let stored: Vec<(f32, f32)> =
            (0..self.ranges[0].len()).into_par_iter().map(|at| self.stored(at)).collect();
        let [low, high] = &mut self.factors;
        let [bottom, top] = &self.ranges;
        let ends = low.par_iter_mut().zip(high).zip(bottom.par_iter().zip(top)).zip(&stored);
        let groups = self.positions.par_chunks_mut(size).zip(self.begun.par_chunks(size));
        groups.zip(gradient.par_chunks(size)).zip(ends).for_each(
            |(((positions, begun), gradient), (((low, high), (bottom, top)), (scale, _)))| {
                let (mut to_low, mut to_high) = (0f32, 0f32);
                let mean = gradient.iter().map(|slope| slope.abs()).sum::<f32>() / size as f32;
                let unit = rate * sign(*scale) / mean.max(f32::MIN_POSITIVE);
                for ((position, begun), gradient) in positions.iter_mut().zip(begun).zip(gradient) {
                    let part = position.round().clamp(0.0, most) / most;
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 3;
    const COLUMNS: usize = 64;

    fn number(seed: usize) -> f32 {
        ((seed * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5
    }

    /// A rounded weight whose groups have scales of both signs, and what the weight is above it.
    fn begun() -> (Rounded, Vec<f32>) {
        let scheme = Scheme::affine(3, 32).unwrap();
        let groups = ROWS * COLUMNS / 32;
        let float = FloatType::Bf16;
        let sign = |at: usize| if at.is_multiple_of(2) { 1.0 } else { -1.0 };
        let scales: Vec<f32> =
            (0..groups).map(|at| float.round(sign(at) * (0.1 + 0.01 * at as f32))).collect();
        let rounded = Rounded {
            scheme,
            columns: COLUMNS,
            codes: (0..ROWS * COLUMNS).map(|at| (at * 5 % 8) as u8).collect(),
            biases: (0..groups).map(|at| float.round(-0.3 * sign(at))).collect(),
            scales: scales.clone(),
        };
        let above = (0..ROWS * COLUMNS).map(|at| 3.0 * number(at) * scales[at / 32].abs()).collect();
        (rounded, above)
    }

    /// The sum of squares of what it decodes to above what is wanted, and its gradient.
    fn loss(layer: &Layer, wanted: &[f32]) -> (f64, Vec<f32>) {
        let gradient: Vec<f32> =
            layer.decoded().iter().zip(wanted).map(|(own, wanted)| own - wanted).collect();
        (gradient.iter().map(|part| f64::from(part * part)).sum(), gradient)
    }

    #[test]
    fn it_begins_with_the_codes_that_stand() {
        let (rounded, above) = begun();
        let layer = Layer::new(&rounded, FloatType::Bf16, &above);
        assert_eq!(layer.rounded(), rounded);
        assert_eq!(layer.decoded(), rounded.decoded());
    }

    /// Weights that the codes cannot be right for: codes and ranges move towards them, a code by one at most.
    #[test]
    fn steps_go_down_and_codes_move_by_one() {
        let (rounded, above) = begun();
        let wanted: Vec<f32> = rounded
            .decoded()
            .iter()
            .enumerate()
            .map(|(at, value)| value * 1.1 + 0.15 * number(at + 77))
            .collect();
        let mut layer = Layer::new(&rounded, FloatType::Bf16, &above);
        let before = loss(&layer, &wanted).0;
        let standing = layer.standing();
        for step in 0..100 {
            let (_, gradient) = loss(&layer, &wanted);
            layer.step(&gradient, 0.02 * (1.0 - step as f32 / 100.0));
        }
        let after = loss(&layer, &wanted).0;
        assert!(after < 0.8 * before, "{before} {after}");
        let codes = layer.rounded().codes;
        let moved = |(own, begun): (&u8, &u8)| own.abs_diff(*begun);
        assert_eq!(codes.iter().zip(&rounded.codes).map(moved).max(), Some(1));
        assert!(codes.iter().all(|code| *code < 8));
        layer.restore(standing);
        assert_eq!(loss(&layer, &wanted).0, before);
    }

    /// What is right already stays.
    #[test]
    fn nothing_moves_without_a_gradient() {
        let (rounded, above) = begun();
        let mut layer = Layer::new(&rounded, FloatType::Bf16, &above);
        let before = layer.decoded();
        layer.step(&vec![0.0; before.len()], 1.0);
        assert_eq!(layer.decoded(), before);
    }
}
