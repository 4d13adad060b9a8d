//! Which adapter the suite uses, and what is the gpu engine's alone.
//!
//! `MLX_QUANT_TEST_ADAPTER` names one (`gpu:1`, `gpu:llvmpipe`) and makes it an error if it is not there. Without it the
//! first card is taken, or else a software adapter, since a test is no run of anybody's. Without any adapter these tests
//! are left out, and say so.
#![allow(clippy::print_stderr, reason = "a run says which adapter it used")]

use std::sync::OnceLock;

use mlx_quant_engine::gpu::{AdapterChoice, AdapterKind, Gpu, adapters};
use mlx_quant_engine::{Device, LAST, Tensor, plain};

use super::{bits, distance, on, tensor, values};

/// The adapter of the tests.
fn choice() -> Option<AdapterChoice> {
    if let Ok(name) = std::env::var("MLX_QUANT_TEST_ADAPTER") {
        return Some(name.parse().unwrap());
    }
    let all = adapters();
    let card = all.iter().find(|adapter| adapter.kind != AdapterKind::Software);
    card.or(all.first()).map(|adapter| AdapterChoice::Index(adapter.index))
}

/// The gpu engine of this machine, one for all tests.
pub(crate) fn device() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let open = || {
        let Some(choice) = choice() else {
            eprintln!("the gpu engine is not tested: this machine has no adapter");
            return None;
        };
        let gpu = Gpu::open(&choice).unwrap();
        eprintln!("the gpu engine is tested on {:?}", gpu.adapter());
        Some(Device::new(gpu))
    };
    DEVICE.get_or_init(open).clone()
}

/// One whose kernels see little of a buffer at once.
fn narrow() -> Option<Device> {
    choice().map(|choice| Device::new(Gpu::with_binding(&choice, 4096).unwrap()))
}

#[test]
fn a_software_adapter_has_to_be_named() {
    let cards = adapters().iter().filter(|adapter| adapter.kind != AdapterKind::Software).count();
    match Gpu::open(&AdapterChoice::Best) {
        Ok(gpu) => assert!(cards > 0 && gpu.adapter().kind != AdapterKind::Software),
        Err(error) => {
            assert_eq!(cards, 0);
            assert!(error.to_string().contains("hint: "), "{error}");
        }
    }
    for wrong in [AdapterChoice::Index(99), AdapterChoice::Name("no such card".to_owned())] {
        let error = Gpu::open(&wrong).unwrap_err().to_string();
        assert!(error.contains("hint: "), "{error}");
    }
}

/// What does not fit a binding goes in parts, to the same results.
#[test]
fn operations_go_in_parts_that_fit_a_binding() {
    let Some(device) = narrow() else { return };
    let (x, y) = (tensor(&[40, 90], 1), tensor(&[40, 90], 2));
    let (own_x, own_y) = (on(&device, &x), on(&device, &y));
    let same = |own: Tensor, reference: Tensor| {
        assert!(distance(&own, &reference) <= 5e-6, "{}", distance(&own, &reference));
    };
    same((&own_x + &own_y).unwrap(), (&x + &y).unwrap());
    same(own_x.t().unwrap(), x.t().unwrap());
    same(
        own_x.broadcast_mul(&own_y.narrow(0, 3, 1).unwrap()).unwrap(),
        x.broadcast_mul(&y.narrow(0, 3, 1).unwrap()).unwrap(),
    );
    for axis in 0..2 {
        same(own_x.sum(axis).unwrap(), x.sum(axis).unwrap());
        same(own_x.max_keepdim(axis).unwrap(), x.max_keepdim(axis).unwrap());
    }
    same(own_x.sum_all().unwrap(), x.sum_all().unwrap());
    let ids: Vec<u32> = (0..60).map(|at| at * 7 % 40).collect();
    same(own_x.rows(&ids).unwrap(), x.rows(&ids).unwrap());
    same(Tensor::cat(&[&own_x, &own_y], LAST).unwrap(), Tensor::cat(&[&x, &y], LAST).unwrap());
    let variable = own_x.variable();
    let gradient = variable.rows(&ids).unwrap().gradients(&own_x.rows(&ids).unwrap()).unwrap();
    let reference = x.variable();
    let expected = reference.rows(&ids).unwrap().gradients(&x.rows(&ids).unwrap()).unwrap();
    same(gradient.get(&variable).unwrap().clone(), expected.get(&reference).unwrap().clone());
    same(own_x.matmul(&own_y.t().unwrap()).unwrap(), x.matmul(&y.t().unwrap()).unwrap());
    let bias = tensor(&[40], 3);
    for device in [&device] {
        let weight = on(device, &y).variable();
        let input = own_x.variable();
        let linear = device.linear(&input, &weight, Some(&on(device, &bias))).unwrap();
        let (own_weight, own_input) = (y.variable(), x.variable());
        let reference = plain().linear(&own_input, &own_weight, Some(&bias)).unwrap();
        same(linear.clone(), reference.clone());
        let seed = tensor(&[40, 40], 5);
        let [own, expected] =
            [linear.gradients(&on(device, &seed)), reference.gradients(&seed)].map(Result::unwrap);
        same(own.get(&weight).unwrap().clone(), expected.get(&own_weight).unwrap().clone());
        same(own.get(&input).unwrap().clone(), expected.get(&own_input).unwrap().clone());
    }
}

/// More than llvmpipe, or this card, sees at once.
#[test]
fn a_tensor_beyond_a_binding() {
    let Some(device) = device() else { return };
    let count = 40 << 20;
    let x = Tensor::from_vec((0..count).map(|at| (at % 1000) as f32).collect(), (1 << 10, 40 << 10), &device)
        .unwrap();
    let y = (&x * 2.0).unwrap().t().unwrap();
    let last = y.narrow(0, (40 << 10) - 1, 1).unwrap();
    let expected: Vec<f32> = (1..=1 << 10).map(|row| ((row * (40 << 10) - 1) % 1000) as f32 * 2.0).collect();
    assert_eq!(values(&last), expected);
}

#[test]
fn memory_is_counted_and_used_again() {
    let Some(choice) = choice() else { return };
    let device = Device::new(Gpu::open(&choice).unwrap());
    let x = Tensor::full(1.0, (1000, 1000), &device).unwrap();
    let one = device.memory().unwrap();
    assert!(one.in_use >= 4_000_000 && one.in_use < 5_000_000 && one.peak >= one.in_use, "{one:?}");
    for _ in 0..50 {
        drop((&x + &x).unwrap());
    }
    let after = device.memory().unwrap();
    assert_eq!(after.in_use, one.in_use);
    assert!(after.peak <= 2 * one.in_use && after.kept <= one.in_use, "{after:?}");
    drop(x);
    assert_eq!(device.memory().unwrap().in_use, 0);
}

/// What an adapter cannot hold is an error that says so, and not the end.
#[test]
fn too_large_is_an_error() {
    let Some(device) = device() else { return };
    let x = Tensor::full(1.0, (1 << 16, 1), &device).unwrap();
    let error = x.broadcast_as((1 << 16, 1 << 16)).unwrap_err().to_string();
    assert!(error.contains("hint: "), "{error}");
    assert_eq!(values(&x.sum_all().unwrap()), [65_536.0]);
}

#[test]
fn tensors_of_other_engines_are_refused() {
    let (Some(device), Some(other)) = (device(), narrow()) else { return };
    let (x, y, host) = (on(&device, &tensor(&[3], 1)), on(&other, &tensor(&[3], 1)), tensor(&[3], 1));
    assert!((&x + &y).is_err() && (&x + &host).is_err() && (&host + &x).is_err());
    assert_eq!(bits(&x), bits(&y));
}

/// Windows on several threads at a time get what they get alone.
#[test]
fn threads_share_a_card() {
    let Some(device) = device() else { return };
    let weight = on(&device, &tensor(&[64, 96], 1));
    let of = |seed: u64| {
        let x = on(&device, &tensor(&[17, 96], seed));
        let y = device.linear(&x, &weight, None).unwrap();
        bits(&device.softmax(&device.rms_norm(&y, None, 1e-5).unwrap()).unwrap())
    };
    let alone: Vec<_> = (0..8).map(of).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(move || of(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}
