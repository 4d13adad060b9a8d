//! Observed and trained linears, and the seam of a cut chain of gradients.

use std::sync::Arc;

use mlx_quant_engine::{Codes, Device, Held, Notebook, Observed, REST, Result, Tensor, plain};

use super::{agree, distance, engines, numbers, on, tensor, values};

/// Codes between 0 and 15 and what they decode to.
fn codes(device: &Device, rows: usize, columns: usize, group: usize) -> Arc<Codes> {
    let codes: Vec<u8> = numbers(rows * columns, 3).iter().map(|x| (x.abs() * 20.0) as u8 % 16).collect();
    let weight = weight(
        &codes,
        7.5,
        group,
        &on(device, &grid(rows, columns, group, 4)),
        &on(device, &grid(rows, columns, group, 5)),
    );
    Arc::new(Codes {
        codes: Held::Host(Arc::new(codes)),
        group_size: group,
        middle: 7.5,
        weight: weight.unwrap().detach(),
    })
}

fn grid(rows: usize, columns: usize, group: usize, seed: u64) -> Tensor {
    (tensor(&[rows, columns / group], seed) * 0.05).unwrap()
}

/// `(code - middle) * scale + center`.
fn weight(codes: &[u8], middle: f32, group: usize, scales: &Tensor, centers: &Tensor) -> Result<Tensor> {
    let (rows, groups) = scales.dims2()?;
    let numbers = codes.iter().map(|code| f32::from(*code) - middle).collect();
    let numbers = Tensor::from_vec(numbers, (rows, groups, group), scales.device())?;
    let weight = numbers.broadcast_mul(&scales.unsqueeze(2)?)?.broadcast_add(&centers.unsqueeze(2)?)?;
    weight.reshape((rows, REST))
}

/// Gradients of a packed linear are those of its formula, and of central differences of it.
#[test]
fn packed_linear_has_the_gradients_of_its_formula() {
    for (rows, columns, group) in [(5, 64, 32), (40, 128, 64), (3, 256, 128)] {
        let inputs =
            [tensor(&[2, 7, columns], 6), grid(rows, columns, group, 4), grid(rows, columns, group, 5)];
        let bias = tensor(&[rows], 8);
        let all = codes(&plain(), rows, columns, group);
        agree("the formula", &inputs, &|device, x| {
            let weight = weight(all.codes.host()?, all.middle, group, &x[1], &x[2])?;
            device.linear(&x[0], &weight, Some(&on(device, &bias)))
        });
        for device in engines().into_iter().chain([plain()]) {
            let own = codes(&device, rows, columns, group);
            let x: Vec<Tensor> = inputs.iter().map(|input| on(&device, input).variable()).collect();
            let bias = on(&device, &bias);
            let seed = on(&device, &tensor(&[2, 7, rows], 7));
            let packed = device.packed_linear(&x[0], &own, &x[1], &x[2], Some(&bias)).unwrap();
            let formula = weight(own.codes.host().unwrap(), own.middle, group, &x[1], &x[2]).unwrap();
            let formula = device.linear(&x[0], &formula, Some(&bias)).unwrap();
            assert!(distance(&packed, &formula) < 2e-5);
            let [packed, formula] = [packed, formula].map(|y| y.gradients(&seed).unwrap());
            for x in &x {
                assert!(distance(packed.get(x).unwrap(), formula.get(x).unwrap()) < 2e-5);
            }
        }
    }
}

/// What an observed linear notes, and that it changes neither the result nor the gradient that goes on.
#[test]
fn observed_linear_notes_squares() {
    for device in engines().into_iter().chain([plain()]) {
        let x = on(&device, &tensor(&[3, 4, 32], 1)).variable();
        let [weight, bias, seed] =
            [tensor(&[6, 32], 2), tensor(&[6], 5), tensor(&[3, 4, 6], 3)].map(|x| on(&device, &x));
        let notebook = Notebook::default();
        let y = device.observed_linear(&x, &weight, Some(&bias), &notebook).unwrap();
        let plain = device.linear(&x, &weight, Some(&bias)).unwrap();
        assert!(distance(&y, &plain) < 2e-5);
        let [own, expected] = [y, plain].map(|y| y.gradients(&seed).unwrap());
        assert!(distance(own.get(&x).unwrap(), expected.get(&x).unwrap()) < 2e-5);
        // Twice through one of them, never back; and one that nothing passes.
        let notebooks = [Notebook::default(), notebook, Notebook::default()];
        for rows in [0..1, 1..3] {
            let x = x.detach().narrow(0, rows.start, rows.len()).unwrap();
            device.observed_linear(&x, &weight, None, &notebooks[2]).unwrap();
        }
        let all = Notebook::take(&notebooks).unwrap();
        assert_eq!(all[0], Observed::default());
        let (seen, twice) = (&all[1], &all[2]);
        assert_eq!((twice.tokens, twice.gradients.len()), (12, 0));
        assert!(twice.inputs.iter().zip(&seen.inputs).all(|(twice, once)| (twice - once).abs() < 1e-9));
        assert_eq!(Notebook::take(&notebooks).unwrap(), vec![Observed::default(); 3], "they are empty now");
        assert_eq!(seen.tokens, 12);
        let squares = |values: &[f32], columns: usize, at: usize| -> f64 {
            values.chunks_exact(columns).map(|row| f64::from(row[at]).powi(2)).sum()
        };
        for at in 0..32 {
            assert!((seen.inputs[at] - squares(&values(&x), 32, at)).abs() < 1e-9);
        }
        for at in 0..6 {
            assert!((seen.gradients[at] - squares(&values(&seed), 6, at)).abs() < 1e-9);
        }
    }
}

/// Several results at once, one of which is a variable itself: chains that go on where they were cut.
#[test]
fn gradients_of_several_results_are_summed() {
    for device in engines().into_iter().chain([plain()]) {
        let x = on(&device, &tensor(&[2, 3], 1)).variable();
        let untouched = on(&device, &tensor(&[2], 2)).variable();
        let [seed, other] = [4, 5].map(|seed| on(&device, &tensor(&[2, 3], seed)));
        let y = (&x * 3.0).unwrap();
        let z = (&y * &y).unwrap();
        let gradients = Tensor::gradients_of(&[(&y, &seed), (&z, &other), (&x, &seed)]).unwrap();
        let found = values(gradients.get(&x).unwrap());
        let (x, seed, other) = (values(&x), values(&seed), values(&other));
        for (at, found) in found.into_iter().enumerate() {
            let expected = 4.0 * seed[at] + 18.0 * x[at] * other[at];
            assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{found} {expected}");
        }
        assert!(gradients.get(&untouched).is_none());
        assert!(y.gradients(&on(&device, &tensor(&[3, 2], 1))).is_err(), "a seed of another shape");
    }
}
