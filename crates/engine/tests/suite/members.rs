//! Factors, rounding and linear layers of several members (experts) at once: what each of them gets alone.

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::rounding::How;
use mlx_quant_engine::{Device, Factor, Gram, GramSum, Tensor, cpu, plain};

use super::second_order::{factor, gram};
use super::{bits, engines, numbers, on, tensor};

/// Gram matrices of several members, each of other inputs.
fn members(device: &Device, size: usize, count: usize) -> Vec<Gram> {
    let one = |member: usize| {
        let tokens = size + 40 * member;
        let inputs = numbers(tokens * size, 11 + member as u64);
        let mut sum = GramSum::new(size, device).unwrap();
        sum.add(&Tensor::from_slice(&inputs, (1, tokens, size), device).unwrap()).unwrap();
        sum.finish().unwrap()
    };
    (0..count).map(one).collect()
}

/// What is made of several matrices at once is what is made of each alone, bit for bit; also of one that has to be
/// damped more than the others, and of one that has no factor at all.
#[test]
fn factors_of_several_are_those_of_each() {
    for device in engines().into_iter().chain([plain()]) {
        for size in [40, 96, 200] {
            let mut grams = members(&device, size, 5);
            grams[3] = Gram::empty(size, &device).unwrap();
            // Its smallest eigenvalue is -3, about.
            let loud = |at: usize| if at / size == at % size { 1.0 } else { 4.0 };
            let loud = (0..size * size).map(loud).collect();
            let values = Tensor::from_vec(loud, (size, size), &device).unwrap();
            grams[1] = Gram { size, tokens: 1 << 30, values };
            let order = |member: usize| (0..size).map(|at| (at * 7 + member) % size).collect::<Vec<_>>();
            let diagonals = Gram::diagonals(&grams.iter().collect::<Vec<_>>()).unwrap();
            let alone: Vec<Option<Factor>> =
                (0..5).map(|at| Factor::new(&grams[at], order(at), 0.01).unwrap()).collect();
            assert_eq!(alone[1].as_ref().unwrap().damping.round(), 10.0);
            for (gram, diagonal) in grams.iter().zip(&diagonals) {
                assert_eq!(*diagonal, gram.diagonal().unwrap());
            }
            let all = grams.into_iter().zip(diagonals).enumerate();
            let all = all.map(|(at, (gram, diagonal))| (gram, diagonal, order(at))).collect();
            let together = Factor::of_all(all, 0.01).unwrap();
            let what = format!("{size} on {}", device.name());
            for (alone, together) in alone.iter().zip(&together) {
                let (Some(alone), Some(together)) = (alone, together) else {
                    assert!(alone.is_none() && together.is_none(), "{what}");
                    continue;
                };
                assert_eq!((&alone.order, alone.damping), (&together.order, together.damping), "{what}");
                assert_eq!(bits(&alone.upper), bits(&together.upper), "{what}");
                assert_eq!(bits(&alone.hessian), bits(&together.hessian), "{what}");
            }
            assert_eq!(together.iter().filter(|factor| factor.is_none()).count(), 1, "{what}");
        }
    }
}

/// Rows of several members that are rounded at once, each by its own factor, get what they get alone, bit for bit.
#[test]
fn rows_of_several_are_rounded_as_those_of_each() {
    let (columns, count) = (192, 4);
    for device in engines().into_iter().chain([plain()]) {
        let grams = members(&device, columns, count);
        // Those of one stack, and one from elsewhere behind them; 48 rows are no whole tile of a card.
        for (rows, apart, act_order) in
            [(64, false, false), (32, true, true), (48, false, true), (64, true, true)]
        {
            let order = |member: usize| {
                let turned = |at: usize| (at / 64 + member) % 3 * 64 + (at * 5 + member) % 64;
                (0..columns).map(|at| if act_order { turned(at) } else { at }).collect::<Vec<usize>>()
            };
            let diagonals = Gram::diagonals(&grams.iter().collect::<Vec<_>>()).unwrap();
            let all = grams.iter().cloned().zip(diagonals).enumerate();
            let all = all.map(|(at, (gram, diagonal))| (gram, diagonal, order(at))).collect();
            let mut factors: Vec<Factor> =
                Factor::of_all(all, 0.01).unwrap().into_iter().map(Option::unwrap).collect();
            if apart {
                factors[2] = Factor::new(&grams[2], order(2), 0.01).unwrap().unwrap();
            }
            let weight = on(
                &device,
                &Tensor::from_vec(numbers(count * rows * columns, 5), (count * rows, columns), &cpu())
                    .unwrap(),
            );
            let scheme = Scheme::affine(3, 64).unwrap();
            for sweeps in [0, 2] {
                let compensated = |factor| How::Compensated { factor, block_size: 128, sweeps };
                let refined = |factor| How::Refined { factor, block_size: 128, sweeps };
                let mixed = |(at, factor)| if at == 1 { How::Plain } else { compensated(factor) };
                let ways: [Vec<How<'_>>; 3] = [
                    factors.iter().map(compensated).collect(),
                    factors.iter().map(refined).collect(),
                    factors.iter().enumerate().map(mixed).collect(),
                ];
                for hows in ways {
                    let way = hows.iter().map(|how| format!("{how:?}").chars().take(4).collect::<String>());
                    let way = way.collect::<Vec<_>>().join(" ");
                    let what = format!(
                        "{rows} rows, apart {apart}, order {act_order}, {sweeps} sweeps, {way} on {}",
                        device.name()
                    );
                    let (pending, decoded) =
                        device.round_parts(&weight, scheme, FloatType::Bf16, &hows).unwrap();
                    let rounded = pending.fetch().unwrap();
                    for (at, how) in hows.iter().enumerate() {
                        let own = weight.narrow(0, at * rows, rows).unwrap();
                        let (alone, single) = device.round(&own, scheme, FloatType::Bf16, *how).unwrap();
                        let (alone, part) =
                            (alone.fetch().unwrap(), rounded.rows_of(at * rows..(at + 1) * rows));
                        let other = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a != b).count();
                        let codes = alone.codes.iter().zip(&part.codes).filter(|(a, b)| a != b).count();
                        let apart = (other(&alone.scales, &part.scales), other(&alone.biases, &part.biases));
                        assert!(
                            alone == part,
                            "{what}: of member {at} {codes} codes, {apart:?} scales and biases"
                        );
                        let part = decoded.narrow(0, at * rows, rows).unwrap();
                        assert_eq!(bits(&single), bits(&part), "{what}");
                    }
                }
            }
            let few = device.round_parts(&weight, scheme, FloatType::Bf16, &[How::Plain; 3]);
            assert!(few.is_err() || (count * rows).is_multiple_of(3));
            assert!(device.round_parts(&weight, scheme, FloatType::Bf16, &[]).is_err());
        }
    }
}

/// Experts' tokens that are taken together get what each expert's get alone, bit for bit: of one stack of weights, of
/// weights that lie apart, and of some without tokens.
#[test]
fn linears_of_several_experts_are_those_of_each() {
    for device in engines().into_iter().chain([plain()]) {
        for (k, n, rows) in
            [(64, 48, vec![3, 130, 70]), (30, 7, vec![5, 1, 0, 9]), (192, 256, vec![200, 1, 64, 65, 300])]
        {
            let tokens: usize = rows.iter().sum();
            let x = on(&device, &tensor(&[tokens, k], 3));
            let stack = on(&device, &tensor(&[rows.len(), n, k], 4));
            let stacked: Vec<Tensor> = (0..rows.len()).rev().map(|at| stack.get(at).unwrap()).collect();
            let mut apart = stacked.clone();
            apart[1] = on(&device, &tensor(&[n, k], 5));
            for weights in [stacked, apart] {
                let together = device.linears(&x, &rows, &weights).unwrap();
                assert_eq!(together.dims(), [tokens, n]);
                let mut first = 0;
                for (rows, weight) in rows.iter().zip(&weights) {
                    let own = x.narrow(0, first, *rows).unwrap();
                    let alone = device.linear(&own, weight, None).unwrap();
                    let part = together.narrow(0, first, *rows).unwrap();
                    assert_eq!(bits(&alone), bits(&part), "{k} {n} {rows} on {}", device.name());
                    first += rows;
                }
                assert!(device.linears(&x, &rows[1..], &weights[1..]).is_err());
                assert!(device.linears(&x, &rows, &weights[1..]).is_err());
            }
            // Gradients pass as those of one expert after the other.
            let (input, weights) = (x.variable(), [stack.get(0).unwrap(), stack.get(1).unwrap().variable()]);
            let halves = [tokens / 2, tokens - tokens / 2];
            let together = device.linears(&input, &halves, &weights).unwrap();
            let gradients = together.gradients(&together.detach()).unwrap();
            let one = |at: usize| {
                let own = input.narrow(0, at * halves[0], halves[at]).unwrap();
                device.linear(&own, &weights[at], None).unwrap()
            };
            let alone = Tensor::cat(&[one(0), one(1)], 0).unwrap();
            let expected = alone.gradients(&alone.detach()).unwrap();
            for variable in [&input, &weights[1]] {
                assert_eq!(bits(gradients.get(variable).unwrap()), bits(expected.get(variable).unwrap()));
            }
        }
    }
}

/// Rows do not depend on the rows beside them.
#[test]
fn rounding_does_not_depend_on_other_rows() {
    let (rows, columns) = (70, 128);
    let scheme = Scheme::affine(3, 64).unwrap();
    for device in engines() {
        let factor = factor(&gram(&device, columns, 4, 100).0, (0..columns).collect());
        let how = How::Compensated { factor: &factor, block_size: 128, sweeps: 1 };
        let weight = Tensor::from_vec(numbers(rows * columns, 2), (rows, columns), &device).unwrap();
        let of = |first, count| {
            let part = weight.narrow(0, first, count).unwrap();
            device.round(&part, scheme, FloatType::Bf16, how).unwrap().0.fetch().unwrap()
        };
        let (whole, part) = (of(0, rows), of(5, 33));
        assert_eq!(part.codes, whole.codes[5 * columns..38 * columns], "{}", device.name());
        assert_eq!(part.scales, whole.scales[5 * 2..38 * 2], "{}", device.name());
    }
}
