//! Products by a card's matrix units, held against float32 where an adapter has them; left out by name elsewhere.

use mlx_quant_engine::gpu::{AdapterChoice, Gpu};
use mlx_quant_engine::{Device, Gram, GramSum, Precision, Tensor, plain};

use super::gpu::say;
use super::{bits, on, tensor, values};

fn device() -> Option<Device> {
    match Gpu::with_precision(&AdapterChoice::Best, Precision::Fast) {
        Ok(gpu) => Some(Device::new(gpu)),
        Err(error) => {
            say(&format!("matrix units are not tested: {error}"));
            None
        }
    }
}

/// Products of `k` numbers of about one differ by the last of 22 bits each, and sums are cut to float32 as they grow.
fn near(found: &Tensor, exact: &Tensor, k: usize) {
    assert_eq!(found.dims(), exact.dims());
    let most = values(exact).iter().fold(0f32, |most, x| most.max(x.abs()));
    let bound = most * (k as f32 * 2f32.powi(-23) + 2f32.powi(-18));
    for (found, exact) in values(found).iter().zip(values(exact)) {
        assert!((found - exact).abs() <= bound, "{found} where {exact} is expected, bound {bound}");
    }
}

#[test]
fn linear_layers_and_their_gradients() {
    let Some(device) = device() else { return };
    for [m, k, n] in [[128, 64, 128], [1, 100, 68], [130, 1000, 132], [257, 76, 384]] {
        let (x, weight, bias) = (tensor(&[m, k], 1), tensor(&[n, k], 2), tensor(&[n], 3));
        // Lines of other sizes have other powers of two.
        let weight = (weight * 1e-4).unwrap();
        let of = |device: &Device| {
            let [x, weight, bias] = [&x, &weight, &bias].map(|own| on(device, own).variable());
            let y = device.linear(&x, &weight, Some(&bias)).unwrap();
            let all = y.gradients(&on(device, &tensor(&[m, n], 4))).unwrap();
            let of = |variable: &Tensor| all.get(variable).unwrap().clone();
            (y.detach(), of(&x), of(&weight))
        };
        let (found, exact) = (of(&device), of(&plain()));
        near(&found.0, &exact.0, k);
        near(&found.1, &exact.1, n);
        near(&found.2, &exact.2, m);
        // A window has the bits that it has in a batch.
        let [first, own] = [x.narrow(0, 0, 1).unwrap(), weight.clone()].map(|own| on(&device, &own));
        let alone = device.linear(&first, &own, Some(&on(&device, &bias))).unwrap();
        assert_eq!(bits(&alone), bits(&found.0.narrow(0, 0, 1).unwrap()));
    }
}

#[test]
fn gram_matrices_and_rows_of_them() {
    let Some(device) = device() else { return };
    let (tokens, size) = (200, 384);
    let x = tensor(&[tokens, size], 5);
    let sum = |device: &Device, rows: std::ops::Range<usize>| {
        let mut sum = GramSum::of_rows(size, rows, device).unwrap();
        sum.add(&on(device, &x)).unwrap();
        sum
    };
    let whole = |device: &Device| sum(device, 0..size).finish().unwrap();
    let (found, exact) = (whole(&device), whole(&plain()));
    let diagonals = [found.diagonal().unwrap(), exact.diagonal().unwrap()];
    for (found, exact) in diagonals[0].iter().zip(&diagonals[1]) {
        assert!((found - exact).abs() <= exact.abs() * tokens as f32 * 2f32.powi(-20), "{found} {exact}");
    }
    let mut in_parts = Gram::empty(size, &device).unwrap();
    for first in (0..size).step_by(128) {
        sum(&device, first..first + 128).place(&mut in_parts).unwrap();
    }
    assert_eq!(in_parts.diagonal().unwrap(), found.diagonal().unwrap());
}
