//! What learned rounding asks of an engine: what a weight decodes to while it learns, its codes, steps, and the loss
//! without its largest differences.

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::{Device, LearningStart, LearningState, Tensor, plain};

use super::{bits, engines, numbers, on, tensor, values};

/// A weight that learns, in numbers of this process.
pub(crate) struct Weight {
    scheme: Scheme,
    float: FloatType,
    rows: usize,
    columns: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    ranges: [Vec<f32>; 2],
    positions: Vec<f32>,
    factors: [Vec<f32>; 2],
}

impl Weight {
    /// Scales of both signs and one of zero, positions between codes and at the borders, ranges that have moved.
    pub(crate) fn new(bits: u32, group: usize, float: FloatType, (rows, columns): (usize, usize)) -> Self {
        let scheme = Scheme::affine(bits, group).unwrap();
        let most = ((1u32 << bits) - 1) as f32;
        let groups = rows * columns / group;
        let codes: Vec<u8> =
            (0..rows * columns).map(|at| ((at * 7 + at / 37) % (most as usize + 1)) as u8).collect();
        let apart = [0.5, -0.5, 0.25, -0.75, 1.0, -1.0, 0.499_999_97, -0.3, 0.0, 0.999_999];
        let position = |(at, code): (usize, &u8)| {
            (f32::from(*code) + apart[(at * 3 + at / 64) % apart.len()]).clamp(-0.5, most + 0.5)
        };
        let mut scales: Vec<f32> = numbers(groups, 1).iter().map(|x| float.round(0.1 * x)).collect();
        scales[groups / 2] = 0.0;
        let biases: Vec<f32> = numbers(groups, 2).iter().map(|x| float.round(0.4 * x)).collect();
        let high = scales.iter().zip(&biases).map(|(scale, bias)| bias + scale * most).collect();
        let factors = [3, 4].map(|seed| numbers(groups, seed).iter().map(|x| 1.0 + 0.05 * x).collect());
        let positions = codes.iter().enumerate().map(position).collect();
        Self { scheme, float, rows, columns, codes, scales, ranges: [biases, high], positions, factors }
    }

    fn most(&self) -> f32 {
        ((1u32 << self.scheme.bits()) - 1) as f32
    }

    pub(crate) fn on(&self, device: &Device) -> (LearningStart, LearningState) {
        let size = (self.rows, self.columns / self.scheme.group_size());
        let grids = |values: &Vec<f32>| Tensor::from_slice(values, size, device).unwrap();
        let start = LearningStart {
            scheme: self.scheme,
            float: self.float,
            codes: device.hold(self.codes.clone()).unwrap(),
            scales: grids(&self.scales),
            ranges: self.ranges.each_ref().map(grids),
        };
        let positions = Tensor::from_slice(&self.positions, (self.rows, self.columns), device).unwrap();
        (start, LearningState { positions, factors: self.factors.each_ref().map(grids) })
    }

    fn code(&self, at: usize) -> f32 {
        self.positions[at].round().clamp(0.0, self.most())
    }

    /// Scale and bias of a group in the stored dtype.
    fn stored(&self, at: usize) -> (f32, f32) {
        let [low, high] = [0, 1].map(|end| self.ranges[end][at] * (self.factors[end][at] - 1.0));
        let scale = self.scales[at] + (high - low) / self.most();
        (self.float.round(scale), self.float.round(self.ranges[0][at] + low))
    }

    fn decoded(&self) -> Vec<f32> {
        let one = |at: usize| {
            let (scale, bias) = self.stored(at / self.scheme.group_size());
            self.code(at) * scale + bias
        };
        (0..self.positions.len()).map(one).collect()
    }

    /// A step, one operation after the other.
    fn step(&mut self, gradient: &[f32], rate: f32) {
        let (size, most) = (self.scheme.group_size(), self.most());
        let sign = |x: f32| if x == 0.0 { 0.0 } else { x.signum() };
        for group in 0..self.scales.len() {
            let scale = self.stored(group).0;
            let own = group * size..(group + 1) * size;
            let (mut to_low, mut to_high, mut mean) = (0f32, 0f32, 0f32);
            for slope in &gradient[own.clone()] {
                mean += slope.abs();
            }
            let unit = rate * sign(scale) / (mean / size as f32).max(f32::MIN_POSITIVE);
            for at in own {
                let part = self.code(at) / most;
                to_high += gradient[at] * part;
                to_low += gradient[at] * (1.0 - part);
                let begun = f32::from(self.codes[at]);
                let moved = self.positions[at] - (unit * gradient[at]).clamp(-4.0 * rate, 4.0 * rate);
                self.positions[at] = moved.clamp(begun - 1.0, begun + 1.0).clamp(-0.5, most + 0.5);
            }
            for (end, to) in [to_low, to_high].into_iter().enumerate() {
                self.factors[end][group] -= rate * sign(to * self.ranges[end][group]);
            }
        }
    }
}

fn all() -> impl Iterator<Item = Device> {
    engines().into_iter().chain([plain()])
}

fn as_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// To the bit what a file will hold: codes are positions rounded, halves away from zero, within the scheme's.
#[test]
fn what_learns_decodes_as_it_will_be_stored() {
    for bits_of_a_code in [1, 2, 3, 4, 5, 6, 8] {
        for (group, shape) in [(32, (7, 96)), (64, (40, 320)), (128, (3, 128))] {
            for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
                let weight = Weight::new(bits_of_a_code, group, float, shape);
                let stored: (Vec<f32>, Vec<f32>) =
                    (0..weight.scales.len()).map(|at| weight.stored(at)).unzip();
                let codes: Vec<u8> = (0..weight.codes.len()).map(|at| weight.code(at) as u8).collect();
                for device in all() {
                    let name = format!("{} {bits_of_a_code} {group} {float:?}", device.name());
                    let (start, state) = weight.on(&device);
                    let [scales, biases] = device.learned_grid(&start, &state.factors).unwrap();
                    assert_eq!(bits(&scales), as_bits(&stored.0), "{name}");
                    assert_eq!(bits(&biases), as_bits(&stored.1), "{name}");
                    let decoded = device.learned_weight(&start, &state).unwrap();
                    assert_eq!(decoded.dims(), [shape.0, shape.1]);
                    assert_eq!(bits(&decoded), as_bits(&weight.decoded()), "{name}");
                    let held = device.learned_codes(weight.scheme, &state.positions).unwrap();
                    assert!(device.fetch_codes(&held, codes.len()).unwrap() == codes, "{name}");
                }
            }
        }
    }
}

/// A state that somebody else holds as well stays as it is there.
#[test]
fn steps_are_those_of_the_formula() {
    for (bits_of_a_code, group, rate) in [(2, 32, 0.01), (3, 64, 0.3), (8, 128, 0.002), (1, 32, 0.05)] {
        let mut weight = Weight::new(bits_of_a_code, group, FloatType::Bf16, (9, 256));
        let mut gradients: Vec<Vec<f32>> = (10..13).map(|seed| numbers(9 * 256, seed)).collect();
        for gradient in &mut gradients {
            for slope in gradient.iter_mut() {
                *slope *= 1e-4;
            }
            // Groups of no gradient, and of one that is far larger than the others.
            gradient[..group].fill(0.0);
            gradient[group + 3] = 1.0;
        }
        let devices: Vec<Device> = all().collect();
        let mut states: Vec<_> = devices.iter().map(|device| weight.on(device)).collect();
        for gradient in &gradients {
            let before = (weight.positions.clone(), weight.factors.clone());
            weight.step(gradient, rate);
            for (device, (start, state)) in devices.iter().zip(&mut states) {
                let held = state.clone();
                let gradient = Tensor::from_slice(gradient, (9, 256), device).unwrap();
                device.learning_step(start, state, &gradient, rate).unwrap();
                let exact = device.memory().is_none();
                let pairs = [
                    (&state.positions, &weight.positions, 2e-6),
                    (&state.factors[0], &weight.factors[0], 0.0),
                    (&state.factors[1], &weight.factors[1], 0.0),
                ];
                for (found, expected, bound) in pairs {
                    let bound = if exact { 0.0 } else { bound };
                    let found = values(found);
                    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                    assert!(apart <= bound, "{} {bits_of_a_code}: {apart}", device.name());
                }
                // From the next step on all stand at the same numbers.
                (*start, *state) = weight.on(device);
                let stood: Vec<f32> = values(&held.positions);
                assert_eq!(stood, before.0, "{}", device.name());
                assert_eq!(held.factors.each_ref().map(values), before.1, "{}", device.name());
            }
        }
        let most = weight.most();
        for (position, code) in weight.positions.iter().zip(&weight.codes) {
            assert!(
                (position - f32::from(*code)).abs() <= 1.0 && *position >= -0.5 && *position <= most + 0.5
            );
        }
    }
}

/// In place where nobody else has the numbers: the same ones.
#[test]
fn steps_in_place_are_those_of_a_copy() {
    let weight = Weight::new(3, 32, FloatType::F16, (6, 64));
    for device in all() {
        let gradient = on(&device, &tensor(&[6, 64], 5));
        let (start, mut state) = weight.on(&device);
        let mut shared = state.clone();
        let held = shared.clone();
        device.learning_step(&start, &mut shared, &gradient, 0.05).unwrap();
        drop(held);
        let (_, fresh) = weight.on(&device);
        state = fresh;
        device.learning_step(&start, &mut state, &gradient, 0.05).unwrap();
        assert_eq!(bits(&state.positions), bits(&shared.positions));
        assert_eq!(state.factors.each_ref().map(bits), shared.factors.each_ref().map(bits));
        assert_ne!(values(&state.positions), weight.positions);
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let weight = Weight::new(4, 32, FloatType::F32, (40, 64));
    let other = Weight::new(4, 32, FloatType::F32, (4, 96));
    for device in all() {
        let (start, mut state) = weight.on(&device);
        let (others_start, others_state) = other.on(&device);
        assert!(device.learned_grid(&start, &others_state.factors).is_err());
        assert!(device.learned_weight(&start, &others_state).is_err());
        let mixed = LearningState { positions: others_state.positions.clone(), ..state.clone() };
        assert!(device.learned_weight(&start, &mixed).is_err());
        assert!(device.learning_step(&start, &mut state, &others_state.positions, 0.1).is_err());
        let short = LearningStart { codes: device.hold(vec![0; 4]).unwrap(), ..start.clone() };
        let gradient = on(&device, &tensor(&[40, 64], 1));
        assert!(device.learning_step(&short, &mut state, &gradient, 0.1).is_err(), "{}", device.name());
        // Nothing was begun.
        assert_eq!(values(&state.positions), weight.positions);
        assert!(device.fetch_codes(&others_start.codes, 1 << 20).is_err());
    }
}

/// Against a sort of all sizes: of many numbers and few, of equal ones, zeros, infinity and what is no number.
#[test]
fn the_largest_are_left_out() {
    let drawn = numbers(70_000, 1);
    let cut = |count: usize| drawn[..count].to_vec();
    let equal: Vec<f32> = (0..5000).map(|at| [1.5, -1.5, 0.5, -0.0][at % 4]).collect();
    let mut odd = cut(3000);
    (odd[7], odd[8], odd[9], odd[10]) = (f32::NAN, f32::NEG_INFINITY, -f32::NAN, 1e-42);
    for (what, numbers) in [("one", cut(1)), ("few", cut(7)), ("many", drawn), ("equal", equal), ("odd", odd)]
    {
        let mut sizes: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
        sizes.sort_unstable_by(|a, b| b.total_cmp(a));
        for count in [0, 1, 2, 3, numbers.len() / 1000, numbers.len() / 3, numbers.len()] {
            let border = if count == 0 { f32::NAN } else { sizes[count.min(sizes.len()) - 1] };
            let left = |x: &f32| if x.abs() >= border { 0 } else { x.to_bits() };
            let expected: Vec<u32> = numbers.iter().map(left).collect();
            for device in all() {
                let x = Tensor::from_slice(&numbers, numbers.len(), &device).unwrap();
                if count > numbers.len() {
                    assert!(device.without_largest(&x, count).is_err());
                    continue;
                }
                let found = device.without_largest(&x, count).unwrap();
                assert!(bits(&found) == expected, "{what}, {count} on {}", device.name());
                // Of a part of a tensor.
                let part = x.narrow(0, numbers.len() / 2, 1).unwrap();
                let found = device.without_largest(&part, 1).unwrap();
                let middle = numbers[numbers.len() / 2];
                assert_eq!(values(&found)[0].is_nan(), middle.is_nan());
                assert!(middle.is_nan() || bits(&found) == [0], "{what} on {}", device.name());
            }
        }
    }
}
