//! One suite for all engines: each is held against `plain`, and both against what they should be.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod coarse;
mod elementary;
#[cfg(feature = "gpu")]
mod gpu;
mod learned;
mod learning;
mod losses;
mod members;
mod second_order;
mod training;
#[cfg(feature = "gpu")]
mod units;

use mlx_quant_engine::{Device, Result, Tensor, cpu, plain};

/// Every engine of this machine but `plain`.
fn engines() -> Vec<Device> {
    #[cfg(feature = "gpu")]
    return std::iter::once(cpu()).chain(gpu::device()).collect();
    #[cfg(not(feature = "gpu"))]
    vec![cpu()]
}

/// The same numbers on every run, about normal.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.4).collect()
}

/// Numbers in the reference's memory; an operation's inputs are brought to each engine.
fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &plain()).unwrap()
}

/// The same numbers on another engine.
fn on(device: &Device, x: &Tensor) -> Tensor {
    Tensor::from_vec(values(x), x.dims(), device).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_vec().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// What they differ by at most, as a part of one plus their size. Infinite where only one of them is no number.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let one = |(a, b): (f32, f32)| {
        if a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan() {
            0.0
        } else {
            (a - b).abs() / (1.0 + b.abs())
        }
    };
    let apart = values(a).into_iter().zip(values(b)).map(one);
    apart.fold(0.0, |most, apart| if apart.is_nan() { f32::INFINITY } else { most.max(apart) })
}

type Operation<'a> = &'a dyn Fn(&Device, &[Tensor]) -> Result<Tensor>;

/// Gradients of a weighted sum of an operation's result with respect to the inputs.
fn gradients(device: &Device, operation: Operation<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
    let variables: Vec<Tensor> = inputs.iter().map(|input| on(device, input).variable()).collect();
    let result = operation(device, &variables).unwrap();
    let weights = on(device, &tensor(result.dims(), 77));
    let gradients = result.gradients(&weights).unwrap();
    variables.iter().map(|variable| gradients.get(variable).expect("every input has one").clone()).collect()
}

fn run(device: &Device, operation: Operation<'_>, inputs: &[Tensor]) -> Tensor {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| on(device, input)).collect();
    operation(device, &inputs).unwrap()
}

/// Values and gradients of every engine agree with those of `plain`, and its gradients with central differences.
#[track_caller]
fn agree(what: &str, inputs: &[Tensor], operation: Operation<'_>) {
    let reference = run(&plain(), operation, inputs);
    let reference_gradients = gradients(&plain(), operation, inputs);
    for device in engines() {
        let name = device.name();
        let apart = distance(&run(&device, operation, inputs), &reference);
        assert!(apart <= 5e-6, "{what} on {name}: {apart}");
        for (i, own) in gradients(&device, operation, inputs).iter().enumerate() {
            let apart = distance(own, &reference_gradients[i]);
            assert!(apart <= 2e-5, "{what} on {name}: gradient of input {i}: {apart}");
        }
    }
    let loss = |inputs: &[Tensor]| -> f64 {
        let result = run(&plain(), operation, inputs);
        let weights = values(&tensor(result.dims(), 77));
        values(&result).iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(w)).sum()
    };
    for (i, input) in inputs.iter().enumerate() {
        let count = input.elem_count();
        for element in (0..count).step_by((count / 5).max(1)) {
            let moved = |by: f32| {
                let mut moved = values(input);
                moved[element] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(moved, input.dims(), &plain()).unwrap();
                loss(&inputs)
            };
            let step = 4e-3;
            let difference = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            let gradient = f64::from(values(&reference_gradients[i])[element]);
            let wrong = (difference - gradient).abs() / (1.0 + gradient.abs());
            assert!(
                wrong < 1e-2,
                "{what}: input {i}, element {element}: {gradient}, differences {difference}"
            );
        }
    }
}
