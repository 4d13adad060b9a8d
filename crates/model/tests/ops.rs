//! The fused operations against the plain ones, and both against what they should be.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use candle_core::{Device, Result, Tensor, Var};
use mlx_quant_model::ops::{Activation, AttentionSettings, Kernels, Pairing};

const ACTIVATIONS: [Activation; 8] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::ReluSquared,
    Activation::Sigmoid,
    Activation::Softplus,
    Activation::Identity,
];
const CLAMPED: Activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 1.5 };

/// The same numbers on every run, about normal.
fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.4).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(a: &Tensor, b: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    for (i, (a, b)) in values(a).into_iter().zip(values(b)).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}: {a} and {b} at {i}");
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

type Operation<'a> = &'a dyn Fn(Kernels, &[Tensor]) -> Result<Tensor>;

/// A weighted sum of an operation's result and its gradients with respect to the inputs.
fn gradients(kernels: Kernels, operation: Operation<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
    let variables: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let result = operation(kernels, &tensors).unwrap();
    let loss = (&result * tensor(result.dims(), 77)).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    tensors.iter().map(|tensor| grads.get(tensor).expect("every input has a gradient").clone()).collect()
}

/// Values and gradients of both forms agree, and the gradients with central differences of the values.
#[track_caller]
fn agree(what: &str, inputs: &[Tensor], operation: Operation<'_>) {
    let [fused, plain] = [Kernels::Fused, Kernels::Plain].map(|kernels| operation(kernels, inputs).unwrap());
    close(&fused, &plain, 5e-6, what);
    let [fused_grads, plain_grads] =
        [Kernels::Fused, Kernels::Plain].map(|kernels| gradients(kernels, operation, inputs));
    let loss = |inputs: &[Tensor]| -> f64 {
        let result = operation(Kernels::Fused, inputs).unwrap();
        let weights = values(&tensor(result.dims(), 77));
        values(&result).iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(w)).sum()
    };
    for (i, input) in inputs.iter().enumerate() {
        close(&fused_grads[i], &plain_grads[i], 2e-5, &format!("{what}: gradient of input {i}"));
        let count = input.elem_count();
        for element in (0..count).step_by((count / 5).max(1)) {
            let moved = |by: f32| {
                let mut moved = values(input);
                moved[element] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(moved, input.dims(), &Device::Cpu).unwrap();
                loss(&inputs)
            };
            let step = 4e-3;
            let difference = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            let gradient = f64::from(values(&fused_grads[i])[element]);
            let wrong = (difference - gradient).abs() / (1.0 + gradient.abs());
            assert!(
                wrong < 1e-2,
                "{what}: input {i}, element {element}: {gradient}, by differences {difference}"
            );
        }
    }
}

#[test]
fn linear() {
    for (rows, k, n) in [(1, 1, 1), (1, 40, 24), (7, 32, 1), (5, 3, 2), (33, 96, 80), (3, 1030, 65)] {
        let inputs = [tensor(&[rows, k], 1), tensor(&[n, k], 2), tensor(&[n], 3)];
        let small = 1.0 / (k as f64).sqrt();
        let inputs = [inputs[0].clone(), (&inputs[1] * small).unwrap(), inputs[2].clone()];
        let what = format!("linear [{rows}, {k}] x [{n}, {k}]^T");
        agree(&what, &inputs, &|kernels, x| kernels.linear(&x[0], &x[1], Some(&x[2])));
        agree(&what, &inputs[..2], &|kernels, x| kernels.linear(&x[0], &x[1], None));
    }
    let (x, weight) = (tensor(&[2, 3, 4, 8], 1), tensor(&[5, 8], 2));
    let y = Kernels::Fused.linear(&x, &weight, None).unwrap();
    close(&y, &Kernels::Plain.linear(&x, &weight, None).unwrap(), 1e-5, "four axes");
    let turned = x.transpose(1, 2).unwrap();
    let y = Kernels::Fused.linear(&turned, &weight, None).unwrap();
    close(&y, &Kernels::Plain.linear(&turned.contiguous().unwrap(), &weight, None).unwrap(), 1e-5, "strided");
}

/// Any rows of a batch alone give the bits that they have in the batch.
#[test]
fn linear_does_not_depend_on_the_batch() {
    let all = 1024;
    for (k, n) in [
        (32, 32),
        (33, 7),
        (64, 1),
        (64, 2),
        (96, 576),
        (576, 192),
        (576, 576),
        (576, 1536),
        (1536, 576),
        (1000, 100),
        (1, 9),
        (2048, 48),
        (1536, 1536),
    ] {
        let (x, weight, bias) = (tensor(&[all, k], 5), tensor(&[n, k], 6), tensor(&[n], 7));
        let whole = Kernels::Fused.linear(&x, &weight, Some(&bias)).unwrap();
        let without = Kernels::Fused.linear(&x, &weight, None).unwrap();
        for m in [1, 2, 7, 40, 80, 512] {
            for first in [0, 3, all - m] {
                let part = x.narrow(0, first, m).unwrap();
                let alone = Kernels::Fused.linear(&part, &weight, Some(&bias)).unwrap();
                let expected = whole.narrow(0, first, m).unwrap();
                assert_eq!(bits(&alone), bits(&expected), "{m} rows from {first} of k {k}, n {n}");
                let alone = Kernels::Fused.linear(&part, &weight, None).unwrap();
                assert_eq!(
                    bits(&alone),
                    bits(&without.narrow(0, first, m).unwrap()),
                    "{m} rows, k {k}, n {n}"
                );
            }
        }
    }
}

#[test]
fn norms() {
    for (shape, weight) in [
        (vec![1, 1, 1], vec![1]),
        (vec![2, 3, 40], vec![40]),
        (vec![2, 3, 4, 24], vec![4, 24]),
        (vec![5, 17], vec![17]),
    ] {
        let inputs = [tensor(&shape, 1), tensor(&weight, 2), tensor(&weight, 3)];
        let eps = if shape[2..] == [1] { 0.5 } else { 1e-5 };
        agree("rms_norm", &inputs[..1], &|kernels, x| kernels.rms_norm(&x[0], None, eps));
        agree("rms_norm weight", &inputs[..2], &|kernels, x| kernels.rms_norm(&x[0], Some(&x[1]), eps));
        agree("layer_norm", &inputs[..1], &|kernels, x| kernels.layer_norm(&x[0], None, None, eps));
        agree("layer_norm weight", &inputs[..2], &|kernels, x| {
            kernels.layer_norm(&x[0], Some(&x[1]), None, eps)
        });
        agree("layer_norm bias", &inputs[..2], &|kernels, x| {
            kernels.layer_norm(&x[0], None, Some(&x[1]), eps)
        });
        agree("layer_norm both", &inputs, &|kernels, x| {
            kernels.layer_norm(&x[0], Some(&x[1]), Some(&x[2]), eps)
        });
    }
}

#[test]
fn rotary() {
    for (d, r, tokens) in [(16, 8, 5), (16, 3, 4), (64, 32, 1), (2, 1, 3)] {
        let angles = tensor(&[tokens, r], 9);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            let what = format!("rotary {r} pairs of {d}, {pairing:?}");
            agree(&what, &[tensor(&[2, tokens, 3, d], 1)], &|kernels, x| {
                kernels.rotary(&x[0], &cos, &sin, pairing)
            });
        }
    }
}

#[test]
fn activations() {
    let inputs = [tensor(&[3, 700], 1), tensor(&[3, 700], 2)];
    for activation in ACTIVATIONS {
        let what = format!("{activation:?}");
        agree(&what, &inputs[..1], &|kernels, x| kernels.activate(&x[0], activation));
        agree(&what, &inputs, &|kernels, x| kernels.glu(&x[0], &x[1], activation));
    }
    agree("clamped", &inputs, &|kernels, x| kernels.glu(&x[0], &x[1], CLAMPED));
}

#[test]
fn softmax_and_divergence() {
    for shape in [[1, 1], [3, 7], [4, 100]] {
        let reference = tensor(&shape, 4);
        agree("softmax", &[tensor(&shape, 1)], &|kernels, x| kernels.softmax(&x[0]));
        for temperature in [1.0, 0.7, 3.0] {
            agree("kl_divergence", &[tensor(&shape, 1)], &|kernels, x| {
                kernels.kl_divergence(&reference, &x[0], temperature)
            });
        }
    }
}

fn settings(window: Option<usize>, softcap: Option<f32>) -> AttentionSettings {
    AttentionSettings { scale: 0.3, window, softcap, sinks: None }
}

#[test]
fn attention() {
    // tokens, heads, kv_heads, d, dv
    for (tokens, heads, kv_heads, d, dv) in
        [(1, 2, 1, 8, 8), (5, 4, 2, 16, 8), (70, 6, 2, 8, 12), (150, 1, 1, 16, 16), (40, 9, 3, 4, 4)]
    {
        let inputs = [
            tensor(&[2, tokens, heads, d], 1),
            tensor(&[2, tokens, kv_heads, d], 2),
            tensor(&[2, tokens, kv_heads, dv], 3),
            tensor(&[heads], 4),
        ];
        for (window, softcap) in [
            (None, None),
            (Some(1), None),
            (Some(3), None),
            (Some(tokens + 9), None),
            (None, Some(2.0)),
            (Some(30), Some(1.0)),
        ] {
            let settings = settings(window, softcap);
            let what =
                format!("attention of {tokens} tokens, {heads}/{kv_heads} heads of {d}, {dv}: {settings:?}");
            agree(&what, &inputs[..3], &|kernels, x| kernels.attention(&x[0], &x[1], &x[2], &settings));
            agree(&format!("{what}, sinks"), &inputs, &|kernels, x| {
                let settings = AttentionSettings { sinks: Some(x[3].clone()), ..settings.clone() };
                kernels.attention(&x[0], &x[1], &x[2], &settings)
            });
        }
    }
}

#[test]
fn a_batch_is_its_rows() {
    let rows = 3;
    let inputs =
        [tensor(&[rows, 90, 6, 16], 1), tensor(&[rows, 90, 2, 16], 2), tensor(&[rows, 90, 2, 16], 3)];
    let weight = tensor(&[6, 16], 4);
    let (cos, sin) = (tensor(&[90, 8], 5), tensor(&[90, 8], 6));
    let (window, fused) = (settings(Some(20), Some(3.0)), Kernels::Fused);
    let operations: [Operation<'_>; 5] = [
        &|kernels, x| kernels.attention(&x[0], &x[1], &x[2], &window),
        &|kernels, x| kernels.rms_norm(&x[0], Some(&weight), 1e-6),
        &|kernels, x| kernels.rotary(&x[0], &cos, &sin, Pairing::Halves),
        &|kernels, x| kernels.glu(&x[1], &x[2], Activation::Gelu),
        &|kernels, x| kernels.softmax(&x[0]),
    ];
    for (i, operation) in operations.iter().enumerate() {
        let whole = operation(fused, &inputs).unwrap();
        for row in 0..rows {
            let alone = inputs.clone().map(|input| input.narrow(0, row, 1).unwrap());
            let alone = operation(fused, &alone).unwrap();
            assert_eq!(bits(&alone), bits(&whole.narrow(0, row, 1).unwrap()), "operation {i}, row {row}");
        }
    }
}

#[test]
fn nan_passes_without_a_panic() {
    let nan = Tensor::full(f32::NAN, (2, 5, 2, 8), &Device::Cpu).unwrap();
    let fused = Kernels::Fused;
    assert!(
        values(&fused.attention(&nan, &nan, &nan, &settings(None, Some(2.0))).unwrap())
            .iter()
            .all(|x| x.is_nan())
    );
    assert!(values(&fused.rms_norm(&nan, None, 1e-5).unwrap()).iter().all(|x| x.is_nan()));
    assert!(values(&fused.softmax(&nan).unwrap()).iter().all(|x| x.is_nan()));
    let rows = nan.reshape((20, 8)).unwrap();
    assert!(values(&fused.linear(&rows, &tensor(&[4, 8], 1), None).unwrap()).iter().all(|x| x.is_nan()));
    assert!(values(&fused.kl_divergence(&rows, &rows, 1.0).unwrap()).iter().all(|x| x.is_nan()));
    for activation in ACTIVATIONS {
        let y = fused.activate(&nan, activation).unwrap();
        assert!(values(&y).iter().all(|x| x.is_nan()), "{activation:?}");
    }
}

#[test]
fn wrong_shapes_are_errors_that_show_them() {
    let x = |shape: &[usize]| tensor(shape, 1);
    for kernels in [Kernels::Fused, Kernels::Plain] {
        let attend = |q: &[usize], k: &[usize]| kernels.attention(&x(q), &x(k), &x(k), &settings(None, None));
        let sinks = AttentionSettings { sinks: Some(x(&[3])), ..settings(None, None) };
        let errors = [
            kernels.linear(&x(&[2, 3]), &x(&[4, 5]), None),
            kernels.linear(&x(&[2, 3]), &x(&[4, 3]), Some(&x(&[5]))),
            kernels.rms_norm(&x(&[2, 3]), Some(&x(&[4])), 1e-5),
            kernels.layer_norm(&x(&[2, 3]), None, Some(&x(&[4])), 1e-5),
            kernels.rotary(&x(&[1, 2, 3, 4]), &x(&[2, 3]), &x(&[2, 3]), Pairing::Halves),
            attend(&[1, 2, 3, 4], &[1, 2, 2, 4]),
            attend(&[1, 2, 3, 4], &[1, 3, 3, 4]),
            kernels.attention(&x(&[1, 2, 2, 4]), &x(&[1, 2, 2, 4]), &x(&[1, 2, 2, 4]), &sinks),
            kernels.glu(&x(&[2, 3]), &x(&[3, 2]), Activation::Silu),
            kernels.kl_divergence(&x(&[2, 3]), &x(&[3, 2]), 1.0),
        ];
        for (i, error) in errors.into_iter().enumerate() {
            let message = error.unwrap_err().to_string();
            assert!(message.contains('[') || message.contains("sinks"), "{i}: {message}");
        }
        assert!(kernels.activate(&x(&[2]), CLAMPED).is_err());
    }
}
