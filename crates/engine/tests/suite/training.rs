//! What training of grids asks of an engine: stored numbers, lengths of gradients, steps of Adam.

use mlx_format::FloatType;
use mlx_quant_engine::{AdamInputs, AdamStep, GridSlopes, Tensor, Unit, plain};

use super::{bits, engines, on, tensor, values};

const SCALE_UNIT: Unit = Unit { factor: 3.464_101_6, divisor: 15.0 };
const CENTER_UNIT: Unit = Unit { factor: 1.0, divisor: 1.0 };

/// To the bit what a file will hold: `round(scale)` and `round(center - round(scale) * middle)`.
#[test]
fn stored_numbers_are_rounded_as_files_are() {
    for shape in [[1, 1], [3, 7], [300, 5]] {
        let [scales, centers] = [(tensor(&shape, 1) * 0.05).unwrap(), (tensor(&shape, 2) * 0.3).unwrap()];
        for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
            for middle in [0.5f32, 7.5, 63.5] {
                let stored = |(scale, center): (f32, f32)| {
                    let scale = float.round(scale);
                    (scale, float.round(center - scale * middle))
                };
                let both = values(&scales).into_iter().zip(values(&centers)).map(stored);
                let (of_scales, of_biases): (Vec<f32>, Vec<f32>) = both.unzip();
                for device in engines().into_iter().chain([plain()]) {
                    let [scales, centers] = [&scales, &centers].map(|x| on(&device, x));
                    // A part of a tensor has the numbers that it has in the whole.
                    for rows in [0..shape[0], shape[0] - 1..shape[0]] {
                        let part = |x: &Tensor| x.narrow(0, rows.start, rows.len()).unwrap();
                        let found =
                            device.stored_grid(&part(&scales), &part(&centers), middle, float).unwrap();
                        let own = rows.start * shape[1]..rows.end * shape[1];
                        for (found, expected) in found.iter().zip([&of_scales, &of_biases]) {
                            let expected: Vec<u32> =
                                expected[own.clone()].iter().map(|x| x.to_bits()).collect();
                            assert_eq!(bits(found), expected, "{} {float:?} {middle}", device.name());
                        }
                    }
                    assert!(
                        device.stored_grid(&scales, &on(&device, &tensor(&[2], 1)), middle, float).is_err()
                    );
                }
            }
        }
    }
}

/// Of several grids at once, one of them larger than a workgroup's part, one of them empty.
#[test]
fn squares_of_gradients_in_their_units() {
    let shapes = [[5, 3], [700, 61], [0, 4], [1, 256]];
    let all: Vec<[Tensor; 3]> = shapes
        .iter()
        .enumerate()
        .map(|(at, shape)| {
            // As small as gradients of single groups are.
            let by = [0.05, 1e-6, 3e-5];
            [0, 1, 2].map(|leaf| (tensor(shape, (3 * at + leaf) as u64) * by[leaf]).unwrap())
        })
        .collect();
    let expected = |[scales, of_scales, of_centers]: &[Tensor; 3]| -> f64 {
        let both = values(of_scales).into_iter().zip(values(of_centers));
        let square = |(scale, (of_scale, of_center)): (f32, (f32, f32))| {
            f64::from(of_scale * SCALE_UNIT.of(scale)).powi(2)
                + f64::from(of_center * CENTER_UNIT.of(scale)).powi(2)
        };
        values(scales).into_iter().zip(both).map(square).sum()
    };
    for device in engines().into_iter().chain([plain()]) {
        let own: Vec<[Tensor; 3]> = all.iter().map(|grid| grid.each_ref().map(|x| on(&device, x))).collect();
        let grids: Vec<GridSlopes<'_>> = own
            .iter()
            .map(|[scales, of_scales, of_centers]| GridSlopes {
                scales,
                slopes: [of_scales, of_centers],
                units: [SCALE_UNIT, CENTER_UNIT],
            })
            .collect();
        let found = device.grid_squares(&grids).unwrap();
        assert_eq!(found.len(), grids.len());
        for (found, grid) in found.iter().zip(&all) {
            let expected = expected(grid);
            let exact = device.name() == plain().name() || device.name().starts_with("cpu");
            let bound = if exact { 0.0 } else { 1e-6 * expected };
            assert!((found - expected).abs() <= bound, "{}: {found} {expected}", device.name());
        }
        assert_eq!(device.grid_squares(&[]).unwrap(), Vec::<f64>::new());
        // What is not finite is seen.
        let spoiled = Tensor::from_vec(vec![f32::NAN; 15], (5, 3), &device).unwrap();
        let grid = GridSlopes { slopes: [&spoiled, grids[0].slopes[1]], ..grids[0] };
        assert!(!device.grid_squares(&[grids[1], grid]).unwrap().iter().sum::<f64>().is_finite());
        let wrong = GridSlopes { slopes: grids[3].slopes, ..grids[0] };
        assert!(device.grid_squares(&[wrong]).is_err());
    }
}

/// Steps of Adam as its paper writes them, in float64.
#[test]
fn adam_is_adam() {
    for unit in [None, Some(SCALE_UNIT), Some(CENTER_UNIT)] {
        for shape in [[1, 1], [40, 33]] {
            let (start, scales) = (tensor(&shape, 1), (tensor(&shape, 2) * 0.05).unwrap());
            for device in engines().into_iter().chain([plain()]) {
                let scales = on(&device, &scales);
                let zeros = Tensor::full(0.0, shape, &device).unwrap();
                let mut state = [on(&device, &start), zeros.clone(), zeros];
                let mut expected: Vec<[f64; 3]> =
                    values(&start).into_iter().map(|value| [f64::from(value), 0.0, 0.0]).collect();
                for count in 1..4 {
                    let slopes = on(&device, &(tensor(&shape, 5 + count) * 1e-4).unwrap());
                    let power = count as i32;
                    let step = AdamStep {
                        betas: [0.9, 0.999],
                        corrections: [1.0 - 0.9f32.powi(power), 1.0 - 0.999f32.powi(power)],
                        clip: 0.5,
                        rate: 0.01,
                        unit,
                    };
                    let [values_now, first, second] = &state;
                    let inputs = AdamInputs {
                        values: values_now,
                        moments: [first, second],
                        slopes: &slopes,
                        scales: &scales,
                    };
                    let next = device.adam(&step, inputs).unwrap();
                    let wrong = on(&device, &tensor(&[2], 1));
                    assert!(device.adam(&step, AdamInputs { slopes: &wrong, ..inputs }).is_err());
                    state = next;
                    let all = expected.iter_mut().zip(values(&slopes)).zip(values(&scales));
                    for (([value, m, v], slope), scale) in all {
                        let slope = f64::from(slope) * 0.5;
                        *m = 0.9 * *m + 0.1 * slope;
                        *v = 0.999 * *v + 0.001 * slope * slope;
                        let rate = 0.01 * unit.map_or(1.0, |unit| f64::from(unit.of(scale)));
                        let (m, v) = (*m / (1.0 - 0.9f64.powi(power)), *v / (1.0 - 0.999f64.powi(power)));
                        *value -= rate * m / (v.sqrt() + 1e-12);
                    }
                    for (leaf, found) in state.iter().enumerate() {
                        assert_eq!(found.dims(), shape);
                        // Each as a part of the largest: moments are small.
                        let largest =
                            expected.iter().fold(f64::MIN_POSITIVE, |most, own| most.max(own[leaf].abs()));
                        for (found, expected) in values(found).into_iter().zip(&expected) {
                            let apart = (f64::from(found) - expected[leaf]).abs() / largest;
                            assert!(apart < 2e-5, "{} leaf {leaf}: {apart}", device.name());
                        }
                    }
                }
                let again = Tensor::full(0.0, shape, &device).unwrap();
                let inputs = AdamInputs {
                    values: &state[0],
                    moments: [&again, &again],
                    slopes: &again,
                    scales: &scales,
                };
                let step =
                    AdamStep { betas: [0.9, 0.999], corrections: [0.1, 0.001], clip: 1.0, rate: 0.01, unit };
                let [values_now, ..] = device.adam(&step, inputs).unwrap();
                assert_eq!(bits(&values_now), bits(&state[0]), "no gradient, no step");
            }
        }
    }
}
