//! Observed and trained linears, and the seam of a cut chain of gradients.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use mlx_quant_model::ops::{Codes, Kernels, Notebook, observed_linear, packed_linear, seeded};

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..4).map(|_| uniform()).sum::<f32>()).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(a: &Tensor, b: &Tensor, what: &str) {
    for (a, b) in values(a).into_iter().zip(values(b)) {
        assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{what}: {a} and {b}");
    }
}

/// Gradients of a packed linear are those of the same thing written in candle's operations, and of central differences.
#[test]
fn packed_linear_has_the_gradients_of_its_formula() {
    for (rows, columns, group) in [(5, 64, 32), (40, 128, 64), (3, 256, 128)] {
        let groups = columns / group;
        let codes: Vec<u8> = numbers(rows * columns, 3).iter().map(|x| (x.abs() * 20.0) as u8 % 16).collect();
        let middle = 7.5f32;
        let [scales, centers] = [4, 5].map(|seed| Var::from_tensor(&tensor(&[rows, groups], seed)).unwrap());
        let x = Var::from_tensor(&tensor(&[2, 7, columns], 6)).unwrap();
        let bias = tensor(&[rows], 8);
        let seed = tensor(&[2, 7, rows], 7);
        let plain = |scales: &Tensor, centers: &Tensor| {
            let numbers: Vec<f32> = codes.iter().map(|code| f32::from(*code) - middle).collect();
            let numbers = Tensor::from_vec(numbers, (rows, groups, group), &Device::Cpu).unwrap();
            let weight = numbers.broadcast_mul(&scales.unsqueeze(2).unwrap()).unwrap();
            let weight = weight.broadcast_add(&centers.unsqueeze(2).unwrap()).unwrap();
            weight.reshape((rows, columns)).unwrap()
        };
        let weight = plain(scales.as_tensor(), centers.as_tensor()).detach();
        let packed = Arc::new(Codes { codes: codes.clone(), group_size: group, middle, weight });
        let own = packed_linear(&x, &packed, &scales, &centers, Some(&bias)).unwrap();
        let reference =
            Kernels::Plain.linear(&x, &plain(scales.as_tensor(), centers.as_tensor()), Some(&bias)).unwrap();
        close(&own, &reference, "result");
        let grads = seeded(&own, &seed).unwrap().backward().unwrap();
        let expected = (reference * &seed).unwrap().sum_all().unwrap().backward().unwrap();
        for (variable, what) in [(&x, "x"), (&scales, "scales"), (&centers, "centers")] {
            close(grads.get(variable).unwrap(), expected.get(variable).unwrap(), what);
        }
        let loss = |scales: &Tensor| -> f64 {
            let y = Kernels::Plain.linear(&x, &plain(scales, centers.as_tensor()), None).unwrap();
            values(&y).iter().zip(values(&seed)).map(|(y, g)| f64::from(*y) * f64::from(g)).sum()
        };
        let moved = |by: f32| {
            let mut moved = values(scales.as_tensor());
            moved[1] += by;
            loss(&Tensor::from_vec(moved, (rows, groups), &Device::Cpu).unwrap())
        };
        let difference = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        let gradient = f64::from(values(grads.get(&scales).unwrap())[1]);
        assert!((difference - gradient).abs() < 1e-2 * (1.0 + gradient.abs()), "{difference} {gradient}");
    }
}

/// What an observed linear notes, and that it changes neither the result nor the gradient that goes on.
#[test]
fn observed_linear_notes_squares() {
    let (x, weight) = (Var::from_tensor(&tensor(&[3, 4, 32], 1)).unwrap(), tensor(&[6, 32], 2));
    let (bias, seed) = (tensor(&[6], 5), tensor(&[3, 4, 6], 3));
    let notebook = Notebook::default();
    let y = observed_linear(&x, &weight, Some(&bias), &notebook).unwrap();
    let plain = Kernels::Fused.linear(&x, &weight, Some(&bias)).unwrap();
    close(&y, &plain, "result");
    let grads = seeded(&y, &seed).unwrap().backward().unwrap();
    let expected = seeded(&plain, &seed).unwrap().backward().unwrap();
    close(grads.get(&x).unwrap(), expected.get(&x).unwrap(), "gradient");
    let seen = notebook.lock().unwrap();
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

#[test]
fn a_seed_of_another_shape_is_refused() {
    let x = tensor(&[2, 3], 1);
    assert!(seeded(&x, &tensor(&[3, 2], 1)).is_err());
}
