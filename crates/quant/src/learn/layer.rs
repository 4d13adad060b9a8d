//! A linear whose rounding is learned: where each weight stands between codes, and the range of each group. What steps
//! move lies where the walk computes.

use mlx_format::FloatType;
use mlx_quant_engine::rounding::Rounded;
use mlx_quant_engine::{Device, Held, LearningStart, LearningState, Result, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::methods::Pending;

/// How far from its code's middle a weight may begin, in steps of the grid: what lies beyond the border to the next code was put
/// where it is by second-order rounding, which has its reasons.
const MARGIN: f32 = 0.4;

/// A linear (of an expert) that learns.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    start: LearningStart,
    state: LearningState,
    /// Recognises where it began, and who computes: SHA-256.
    began: [u8; 32],
}

/// Codes and ranges of a step.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    /// `[rows, columns]`, so many.
    codes: Held,
    count: usize,
    /// As [`LearningState::factors`].
    factors: [Tensor; 2],
}

/// Numbers of this process, by name.
pub(super) type Named = Vec<(&'static str, Vec<f32>)>;

fn named<const N: usize>(names: [&'static str; N], tensors: [&Tensor; N]) -> Result<Named> {
    names.into_iter().zip(tensors).map(|(name, tensor)| Ok((name, tensor.to_vec()?))).collect()
}

/// A hash of an engine's name and what a layer begins with.
fn began(device: &Device, codes: &[u8], grids: [&[f32]; 2]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(device.name());
    hash.update(codes);
    for numbers in grids {
        for number in numbers {
            hash.update(number.to_le_bytes());
        }
    }
    hash.finalize().into()
}

impl Layer {
    /// From rounded numbers, and what the weight is above what they decode to, `[rows, columns]`; on a device.
    ///
    /// # Errors
    /// If the device has no room.
    pub(crate) fn new(rounded: Rounded, float: FloatType, above: &[f32], device: &Device) -> Result<Self> {
        let (rows, scheme) = (rounded.rows(), rounded.scheme);
        let Rounded { columns, codes, scales, biases, .. } = rounded;
        let began = began(device, &codes, [&scales, &biases]);
        let group = scheme.group_size();
        let position = |(at, (code, above)): (usize, (&u8, &f32))| {
            let scale = scales[at / group];
            let part = if scale == 0.0 { 0.0 } else { above / scale };
            f32::from(*code) + if part.is_finite() { part.clamp(-MARGIN, MARGIN) } else { 0.0 }
        };
        let positions = codes.par_iter().zip(above).enumerate().map(position).collect();
        let size = (rows, columns / group);
        let most = ((1u32 << scheme.bits()) - 1) as f32;
        let high = scales.iter().zip(&biases).map(|(scale, bias)| bias + scale * most).collect();
        let ones = Tensor::full(1.0, size, device)?;
        let state = LearningState {
            positions: Tensor::from_vec(positions, (rows, columns), device)?,
            factors: [ones.clone(), ones],
        };
        let start = LearningStart {
            scheme,
            float,
            codes: device.hold(codes)?,
            ranges: [Tensor::from_vec(biases, size, device)?, Tensor::from_vec(high, size, device)?],
            scales: Tensor::from_vec(scales, size, device)?,
        };
        Ok(Self { start, state, began })
    }

    fn device(&self) -> &Device {
        self.state.positions.device()
    }

    /// What it decodes to now, `[rows, columns]`.
    pub(crate) fn decoded(&self) -> Result<Tensor> {
        self.device().learned_weight(&self.start, &self.state)
    }

    /// Weights and groups.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.state.positions.elem_count(), self.start.scales.elem_count())
    }

    /// Recognises codes, scales and biases that it began with, and the engine.
    pub(super) const fn began(&self) -> &[u8; 32] {
        &self.began
    }

    /// What steps moved, fetched.
    pub(super) fn moved(&self) -> Result<Named> {
        let LearningState { positions, factors: [low, high] } = &self.state;
        named(["positions", "low", "high"], [positions, low, high])
    }

    /// Takes over what steps had moved, [`Self::counts`] numbers.
    pub(super) fn go_on(&mut self, positions: Vec<f32>, factors: [Vec<f32>; 2]) -> Result<()> {
        let positions = Tensor::from_vec(positions, self.state.positions.dims(), self.device())?;
        self.state = LearningState { positions, factors: self.brought(factors)? };
        Ok(())
    }

    fn brought(&self, [low, high]: [Vec<f32>; 2]) -> Result<[Tensor; 2]> {
        let bring = |numbers| Tensor::from_vec(numbers, self.start.scales.dims(), self.device());
        Ok([bring(low)?, bring(high)?])
    }

    /// What decides what it decodes to.
    pub(crate) fn standing(&self) -> Result<Standing> {
        let codes = self.device().learned_codes(self.start.scheme, &self.state.positions)?;
        Ok(Standing { codes, count: self.counts().0, factors: self.state.factors.clone() })
    }

    /// Where it stood, from numbers of this process.
    pub(super) fn stood(&self, codes: Vec<u8>, factors: [Vec<f32>; 2]) -> Result<Standing> {
        Ok(Standing {
            count: codes.len(),
            codes: self.device().hold(codes)?,
            factors: self.brought(factors)?,
        })
    }

    /// Takes it back to where it stood.
    pub(crate) fn restore(&mut self, standing: Standing) -> Result<()> {
        let Standing { codes, factors, .. } = standing;
        let (rows, columns) = self.state.positions.dims2()?;
        let [ones, zeros] = [1.0, 0.0].map(|number| Tensor::full(number, (rows, 1), self.device()));
        let positions = self.device().decode(&codes, (columns, 0.0), &ones?, &zeros?)?.weight.clone();
        self.state = LearningState { positions, factors };
        Ok(())
    }

    /// As it stands now; of it only codes and grids stay on the device.
    pub(crate) fn rounded(self) -> Result<Pending> {
        let (rows, columns) = self.state.positions.dims2()?;
        let scheme = self.start.scheme;
        let codes = self.device().learned_codes(scheme, &self.state.positions)?;
        let [scales, biases] = self.device().learned_grid(&self.start, &self.state.factors)?;
        Ok(Pending::new(rows, move || {
            let codes = scales.device().fetch_codes(&codes, rows * columns)?;
            Ok(Rounded { scheme, columns, codes, scales: scales.to_vec()?, biases: biases.to_vec()? })
        }))
    }

    /// A step against the loss's gradient with respect to what it decodes to, `[rows, columns]`.
    ///
    /// Steps of one length for all (SignRound) let a weight that belongs between two codes spend as long at the farther as at the
    /// nearer one; in proportion it stays longer where its gradient is small. At 2 bits that was worth 3 % of KL.
    pub(crate) fn step(&mut self, gradient: &Tensor, rate: f32) -> Result<()> {
        let device = self.device().clone();
        device.learning_step(&self.start, &mut self.state, gradient, rate)
    }
}

impl Standing {
    pub(super) fn codes(&self) -> Result<Vec<u8>> {
        let [low, _] = &self.factors;
        low.device().fetch_codes(&self.codes, self.count)
    }

    pub(super) fn factors(&self) -> Result<Named> {
        named(["best.low", "best.high"], self.factors.each_ref())
    }
}

#[cfg(test)]
mod tests {
    use mlx_format::Scheme;
    use mlx_quant_engine::cpu;

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
    fn loss(layer: &Layer, wanted: &[f32]) -> (f64, Tensor) {
        let gradient: Vec<f32> =
            decoded(layer).iter().zip(wanted).map(|(own, wanted)| own - wanted).collect();
        let sum = gradient.iter().map(|part| f64::from(part * part)).sum();
        (sum, Tensor::from_vec(gradient, (ROWS, COLUMNS), layer.device()).unwrap())
    }

    fn layer(rounded: &Rounded, above: &[f32]) -> Layer {
        Layer::new(rounded.clone(), FloatType::Bf16, above, &cpu()).unwrap()
    }

    fn decoded(layer: &Layer) -> Vec<f32> {
        layer.decoded().unwrap().to_vec().unwrap()
    }

    fn stored(layer: &Layer) -> Rounded {
        layer.clone().rounded().unwrap().fetch().unwrap()
    }

    #[test]
    fn it_begins_with_the_codes_that_stand() {
        let (rounded, above) = begun();
        let layer = layer(&rounded, &above);
        assert_eq!(stored(&layer), rounded);
        assert_eq!(decoded(&layer), rounded.decoded());
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
        let mut layer = layer(&rounded, &above);
        let before = loss(&layer, &wanted).0;
        let standing = layer.standing().unwrap();
        for step in 0..100 {
            let (_, gradient) = loss(&layer, &wanted);
            layer.step(&gradient, 0.02 * (1.0 - step as f32 / 100.0)).unwrap();
        }
        let after = loss(&layer, &wanted).0;
        assert!(after < 0.8 * before, "{before} {after}");
        let codes = stored(&layer).codes;
        let moved = |(own, begun): (&u8, &u8)| own.abs_diff(*begun);
        assert_eq!(codes.iter().zip(&rounded.codes).map(moved).max(), Some(1));
        assert!(codes.iter().all(|code| *code < 8));
        layer.restore(standing).unwrap();
        assert_eq!(loss(&layer, &wanted).0, before);
    }

    /// What is right already stays.
    #[test]
    fn nothing_moves_without_a_gradient() {
        let (rounded, above) = begun();
        let mut layer = layer(&rounded, &above);
        let before = decoded(&layer);
        layer.step(&Tensor::full(0.0, (ROWS, COLUMNS), &cpu()).unwrap(), 1.0).unwrap();
        assert_eq!(decoded(&layer), before);
    }
}
