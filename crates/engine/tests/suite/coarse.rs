//! Coarse operations: odd sizes, one row, one column, nothing; bits that do not depend on the batch; NaN; wrong shapes.

use mlx_quant_engine::{Activation, AttentionSettings, Groups, Pairing, Selection, Tensor, plain};

use super::{Operation, agree, bits, distance, engines, on, run, tensor, values};

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

#[test]
fn linear() {
    for (rows, k, n) in [(1, 1, 1), (1, 40, 24), (7, 32, 1), (5, 3, 2), (33, 96, 80), (3, 1030, 65)] {
        let inputs = [tensor(&[rows, k], 1), tensor(&[n, k], 2), tensor(&[n], 3)];
        let small = 1.0 / (k as f64).sqrt();
        let inputs = [inputs[0].clone(), (&inputs[1] * small).unwrap(), inputs[2].clone()];
        let what = format!("linear [{rows}, {k}] x [{n}, {k}]^T");
        agree(&what, &inputs, &|device, x| device.linear(&x[0], &x[1], Some(&x[2])));
        agree(&what, &inputs[..2], &|device, x| device.linear(&x[0], &x[1], None));
    }
    let inputs = [tensor(&[2, 3, 4, 8], 1), tensor(&[5, 8], 2)];
    agree("four axes", &inputs, &|device, x| device.linear(&x[0], &x[1], None));
    agree("turned", &inputs, &|device, x| device.linear(&x[0].transpose(1, 2)?, &x[1], None));
}

#[test]
fn nothing_gives_nothing() {
    for device in engines().into_iter().chain([plain()]) {
        let x = |shape: &[usize]| Tensor::from_vec(Vec::new(), shape, &device).unwrap();
        let weight = on(&device, &tensor(&[5, 8], 2));
        assert_eq!(device.linear(&x(&[0, 8]), &weight, None).unwrap().dims(), [0, 5]);
        assert_eq!(device.softmax(&x(&[0, 4])).unwrap().dims(), [0, 4]);
        assert_eq!(device.rms_norm(&x(&[0, 8]), None, 1e-5).unwrap().dims(), [0, 8]);
        assert_eq!(device.activate(&x(&[0]), Activation::Silu).unwrap().dims(), [0]);
        let variable = x(&[0, 8]).variable();
        let y = device.linear(&variable, &weight, None).unwrap();
        assert_eq!(y.gradients(&x(&[0, 5])).unwrap().get(&variable).unwrap().dims(), [0, 8]);
    }
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
        for device in engines() {
            let [x, weight, bias] = [(vec![all, k], 5), (vec![n, k], 6), (vec![n], 7)]
                .map(|(shape, seed)| on(&device, &tensor(&shape, seed)));
            let whole = device.linear(&x, &weight, Some(&bias)).unwrap();
            let without = device.linear(&x, &weight, None).unwrap();
            for m in [1, 2, 7, 40, 80, 512] {
                for first in [0, 3, all - m] {
                    let part = x.narrow(0, first, m).unwrap();
                    let alone = device.linear(&part, &weight, Some(&bias)).unwrap();
                    let expected = whole.narrow(0, first, m).unwrap();
                    assert_eq!(bits(&alone), bits(&expected), "{m} rows from {first} of k {k}, n {n}");
                    let alone = device.linear(&part, &weight, None).unwrap();
                    let expected = without.narrow(0, first, m).unwrap();
                    assert_eq!(bits(&alone), bits(&expected), "{m} rows, k {k}, n {n}");
                }
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
        agree("rms_norm", &inputs[..1], &|device, x| device.rms_norm(&x[0], None, eps));
        agree("rms_norm weight", &inputs[..2], &|device, x| device.rms_norm(&x[0], Some(&x[1]), eps));
        agree("layer_norm", &inputs[..1], &|device, x| device.layer_norm(&x[0], None, None, eps));
        agree("layer_norm weight", &inputs[..2], &|device, x| {
            device.layer_norm(&x[0], Some(&x[1]), None, eps)
        });
        agree("layer_norm bias", &inputs[..2], &|device, x| device.layer_norm(&x[0], None, Some(&x[1]), eps));
        agree("layer_norm both", &inputs, &|device, x| {
            device.layer_norm(&x[0], Some(&x[1]), Some(&x[2]), eps)
        });
    }
}

#[test]
fn sums_of_a_residual_stream() {
    let inputs = [tensor(&[2, 3, 17], 1), tensor(&[2, 3, 17], 2)];
    agree("add", &inputs, &|device, x| device.add(&x[0], &x[1], 1.0));
    agree("add scaled", &inputs, &|device, x| device.add(&x[0], &x[1], -0.22));
}

#[test]
fn rotary() {
    for (d, r, tokens) in [(16, 8, 5), (16, 3, 4), (64, 32, 1), (2, 1, 3)] {
        let angles = tensor(&[tokens, r], 9);
        let of = |f: fn(f32) -> f32| values(&angles).into_iter().map(f).collect::<Vec<_>>();
        let (cos, sin) = (of(f32::cos), of(f32::sin));
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            let what = format!("rotary {r} pairs of {d}, {pairing:?}");
            agree(&what, &[tensor(&[2, tokens, 3, d], 1)], &|device, x| {
                let [cos, sin] =
                    [&cos, &sin].map(|values| Tensor::from_slice(values, (tokens, r), device).unwrap());
                device.rotary(&x[0], &cos, &sin, pairing)
            });
        }
    }
}

#[test]
fn activations() {
    let inputs = [tensor(&[3, 700], 1), tensor(&[3, 700], 2)];
    for activation in ACTIVATIONS {
        let what = format!("{activation:?}");
        agree(&what, &inputs[..1], &|device, x| device.activate(&x[0], activation));
        agree(&what, &inputs, &|device, x| device.glu(&x[0], &x[1], activation));
    }
    agree("clamped", &inputs, &|device, x| device.glu(&x[0], &x[1], CLAMPED));
}

/// Where exponentials overflow and underflow.
#[test]
fn huge_and_tiny_values() {
    let extreme = [1e30, -1e30, 1e-30, -1e-30, 88.0, -88.0, 104.0, -104.0, 0.0, -0.0, 1e4, -1e4];
    let x = Tensor::from_slice(&extreme, (2, 6), &plain()).unwrap();
    for activation in ACTIVATIONS {
        let operation: Operation<'_> = &|device, x| device.activate(&x[0], activation);
        let reference = run(&plain(), operation, std::slice::from_ref(&x));
        for device in engines() {
            let own = run(&device, operation, std::slice::from_ref(&x));
            assert!(
                distance(&own, &reference) < 1e-5,
                "{activation:?}: {:?} {:?}",
                values(&own),
                values(&reference)
            );
        }
    }
    for device in engines() {
        let y = device.softmax(&on(&device, &x)).unwrap();
        assert!(
            distance(&y, &run(&plain(), &|device, x| device.softmax(&x[0]), std::slice::from_ref(&x))) < 1e-6
        );
        let y = device.rms_norm(&on(&device, &(&x * 1e-12).unwrap()), None, 1e-6).unwrap();
        assert!(values(&y).iter().all(|y| y.is_finite()));
    }
}

#[test]
fn softmax() {
    for shape in [[1, 1], [3, 7], [4, 100]] {
        agree("softmax", &[tensor(&shape, 1)], &|device, x| device.softmax(&x[0]));
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
            agree(&what, &inputs[..3], &|device, x| device.attention(&x[0], &x[1], &x[2], &settings));
            agree(&format!("{what}, sinks"), &inputs, &|device, x| {
                let settings = AttentionSettings { sinks: Some(x[3].clone()), ..settings.clone() };
                device.attention(&x[0], &x[1], &x[2], &settings)
            });
        }
    }
}

/// Numbers between `low` and 1.
fn gate(shape: &[usize], seed: u64, low: f32) -> Tensor {
    let numbers = values(&tensor(shape, seed)).into_iter();
    let within = numbers.map(|x| low + (1.0 - low) / (1.0 + (-x).exp())).collect();
    Tensor::from_vec(within, shape, &plain()).unwrap()
}

/// q, k, v, decay, beta of seeded numbers, scaled as a model's are.
fn delta(batch: usize, tokens: usize, heads: usize, key_dim: usize, value_dim: usize) -> [Tensor; 5] {
    let unit = 1.7 / (key_dim as f64).sqrt();
    let scaled = |shape: &[usize], seed, factor: f64| (tensor(shape, seed) * factor).unwrap();
    let gate = |seed, low| gate(&[batch, tokens, heads], seed, low);
    [
        scaled(&[batch, tokens, heads, key_dim], 1, unit * 0.5),
        scaled(&[batch, tokens, heads, key_dim], 2, unit * 0.5),
        tensor(&[batch, tokens, heads, value_dim], 3),
        gate(4, 0.5),
        gate(5, 0.0),
    ]
}

#[test]
fn gated_delta() {
    for (batch, tokens, heads, key_dim, value_dim) in
        [(2, 9, 3, 16, 32), (1, 12, 2, 8, 5), (1, 1, 1, 1, 1), (2, 7, 1, 33, 70), (1, 67, 2, 70, 20)]
    {
        let inputs = delta(batch, tokens, heads, key_dim, value_dim);
        let rule: Operation<'_> = &|device, x| device.gated_delta(&x[0], &x[1], &x[2], &x[3], &x[4]);
        agree("gated_delta", &inputs, rule);
        let [q, k, v, _, beta] = inputs;
        let decay = gate(k.dims(), 6, 0.5);
        agree("gated_delta, a decay for each row", &[q, k, v, decay, beta], rule);
    }
}

/// A decay for each row that is the same for all of them is that of the head.
#[test]
fn decays_of_rows_are_those_of_their_head() {
    let [q, k, v, decay, beta] = delta(2, 37, 2, 20, 18);
    let spread = decay.unsqueeze(3).unwrap().broadcast_as(k.dims()).unwrap();
    for device in engines() {
        let [q, k, v, beta] = [&q, &k, &v, &beta].map(|x| on(&device, x));
        let of = |decay: &Tensor| device.gated_delta(&q, &k, &v, &on(&device, decay), &beta).unwrap();
        assert_eq!(bits(&of(&decay)), bits(&of(&spread)), "{}", device.name());
    }
}

/// q, k, v, log_decay of seeded numbers, as Mamba 2 has them: some decays leave nothing, some nearly everything.
fn linear_attention(sizes: [usize; 4], key_dim: usize, value_dim: usize) -> [Tensor; 4] {
    let [batch, tokens, groups, heads] = sizes;
    let scaled = |shape: &[usize], seed, factor: f64| (tensor(shape, seed) * factor).unwrap();
    let fading = values(&tensor(&[batch, tokens, heads], 4)).into_iter().map(|x| -(2.0 * x).exp());
    let log_decay = Tensor::from_vec(fading.collect(), (batch, tokens, heads), &plain()).unwrap();
    let unit = 1.0 / (key_dim as f64).sqrt();
    [
        scaled(&[batch, tokens, groups, key_dim], 1, unit),
        scaled(&[batch, tokens, groups, key_dim], 2, unit),
        tensor(&[batch, tokens, heads, value_dim], 3),
        log_decay,
    ]
}

#[test]
fn linear_attention_of_heads_and_groups() {
    for (sizes, key_dim, value_dim) in [
        ([2, 9, 3, 3], 16, 32),
        ([1, 12, 2, 6], 8, 5),
        ([1, 1, 1, 1], 1, 1),
        ([2, 7, 1, 4], 33, 70),
        ([1, 67, 1, 2], 70, 20),
    ] {
        let inputs = linear_attention(sizes, key_dim, value_dim);
        let what = format!("linear_attention {sizes:?}, {key_dim}, {value_dim}");
        agree(&what, &inputs, &|device, x| device.linear_attention(&x[0], &x[1], &x[2], &x[3]));
    }
}

/// A decay of nothing makes each token see itself alone, and none makes a running sum.
#[test]
fn linear_attention_at_both_ends() {
    for device in engines().into_iter().chain([plain()]) {
        let x = |values: &[f32], heads: usize| {
            let width = values.len() / 3 / heads;
            Tensor::from_slice(values, [1, 3, heads, width], &device).unwrap()
        };
        let (q, k) = (x(&[1.0, 2.0, 3.0], 1), x(&[1.0, 1.0, 2.0], 1));
        let v = x(&[1.0, 5.0, 2.0, 6.0, 3.0, 7.0], 2);
        let of = |fading: f32| {
            let log_decay = Tensor::full(fading, (1, 3, 2), &device).unwrap();
            values(&device.linear_attention(&q, &k, &v, &log_decay).unwrap())
        };
        assert_eq!(of(f32::NEG_INFINITY), [1.0, 5.0, 4.0, 12.0, 18.0, 42.0], "{}", device.name());
        assert_eq!(of(0.0), [1.0, 5.0, 6.0, 22.0, 27.0, 75.0], "{}", device.name());
    }
}

#[test]
fn experts_are_chosen_alike() {
    let mut scores = values(&tensor(&[40, 16], 3));
    // Of equals the first.
    scores[3] = scores[9];
    scores[17] = scores[18];
    let scores = Tensor::from_vec(scores, (40, 16), &plain()).unwrap();
    for groups in [
        None,
        Some(Groups { count: 4, keep: 2, best_two: true }),
        Some(Groups { count: 2, keep: 1, best_two: false }),
    ] {
        let selection = Selection { top_k: 3, groups };
        let reference = plain().route(&scores, &selection).unwrap();
        assert!(reference.iter().all(|chosen| chosen.len() == 3));
        for device in engines() {
            assert_eq!(device.route(&on(&device, &scores), &selection).unwrap(), reference);
        }
    }
}

/// More experts than a workgroup has threads, groups that do not divide them or hold one each, all scores alike, NaN.
#[test]
fn many_experts_are_chosen_alike() {
    let mut scores = values(&tensor(&[6, 301], 4));
    scores[301..602].fill(0.25);
    (scores[700], scores[701], scores[702]) = (f32::NAN, f32::INFINITY, -f32::NAN);
    scores[903..1204].fill(f32::NEG_INFINITY);
    let scores = Tensor::from_vec(scores, (6, 301), &plain()).unwrap();
    let groups = |count, keep, best_two| Some(Groups { count, keep, best_two });
    for (top_k, groups) in [
        (8, None),
        (301, None),
        (400, None),
        (0, None),
        (5, groups(4, 2, true)),
        (9, groups(301, 3, true)),
        (9, groups(1000, 20, false)),
        (12, groups(8, 0, false)),
    ] {
        let selection = Selection { top_k, groups };
        let reference = plain().route(&scores, &selection).unwrap();
        for device in engines() {
            assert_eq!(device.route(&on(&device, &scores), &selection).unwrap(), reference, "{selection:?}");
        }
    }
}

/// Gradients of windows side by side are those of each alone.
#[test]
fn gradients_of_a_batch_are_its_rows() {
    let [q, k, v, decay, beta] = delta(3, 40, 2, 16, 20);
    let each = gate(k.dims(), 6, 0.5);
    for inputs in [[q.clone(), k.clone(), v.clone(), decay, beta.clone()], [q, k, v, each, beta]] {
        rows_of_a_batch(&inputs, &|device, x| device.gated_delta(&x[0], &x[1], &x[2], &x[3], &x[4]));
    }
    rows_of_a_batch(&linear_attention([3, 40, 2, 4], 16, 20), &|device, x| {
        device.linear_attention(&x[0], &x[1], &x[2], &x[3])
    });
}

fn rows_of_a_batch(inputs: &[Tensor], rule: Operation<'_>) {
    for device in engines() {
        let all: Vec<Tensor> = inputs.iter().map(|input| on(&device, input).variable()).collect();
        let seed = on(&device, &tensor(inputs[2].dims(), 9));
        let whole = rule(&device, &all).unwrap().gradients(&seed).unwrap();
        for row in 0..3 {
            let of = |x: &Tensor| x.narrow(0, row, 1).unwrap();
            let own: Vec<Tensor> = all.iter().map(|input| of(&input.detach()).variable()).collect();
            let alone = rule(&device, &own).unwrap().gradients(&of(&seed)).unwrap();
            for (at, (own, all)) in own.iter().zip(&all).enumerate() {
                let [own, all] = [alone.get(own).unwrap().clone(), of(whole.get(all).unwrap())];
                assert_eq!(bits(&own), bits(&all), "input {at}, row {row} on {}", device.name());
            }
        }
    }
}

#[test]
fn a_batch_is_its_rows() {
    let rows = 3;
    let shapes = [[rows, 90, 6, 16], [rows, 90, 2, 16], [rows, 90, 2, 16]];
    let window = settings(Some(20), Some(3.0));
    for device in engines() {
        let inputs: Vec<Tensor> =
            shapes.iter().zip(1..).map(|(shape, seed)| on(&device, &tensor(shape, seed))).collect();
        let weight = on(&device, &tensor(&[6, 16], 4));
        let (cos, sin) = (on(&device, &tensor(&[90, 8], 5)), on(&device, &tensor(&[90, 8], 6)));
        let operations: [Operation<'_>; 5] = [
            &|device, x| device.attention(&x[0], &x[1], &x[2], &window),
            &|device, x| device.rms_norm(&x[0], Some(&weight), 1e-6),
            &|device, x| device.rotary(&x[0], &cos, &sin, Pairing::Halves),
            &|device, x| device.glu(&x[1], &x[2], Activation::Gelu),
            &|device, x| device.softmax(&x[0]),
        ];
        for (i, operation) in operations.iter().enumerate() {
            let whole = operation(&device, &inputs).unwrap();
            for row in 0..rows {
                let alone: Vec<Tensor> =
                    inputs.iter().map(|input| input.narrow(0, row, 1).unwrap()).collect();
                let alone = operation(&device, &alone).unwrap();
                assert_eq!(bits(&alone), bits(&whole.narrow(0, row, 1).unwrap()), "operation {i}, row {row}");
            }
        }
    }
}

#[test]
fn nan_passes_without_a_panic() {
    for device in engines() {
        let nan = Tensor::full(f32::NAN, (2, 5, 2, 8), &device).unwrap();
        let all_nan = |y: Tensor| values(&y).iter().all(|x| x.is_nan());
        assert!(all_nan(device.attention(&nan, &nan, &nan, &settings(None, Some(2.0))).unwrap()));
        assert!(all_nan(device.rms_norm(&nan, None, 1e-5).unwrap()));
        assert!(all_nan(device.softmax(&nan).unwrap()));
        assert!(all_nan(nan.clamp(-1.0, 1.0).unwrap()));
        let rows = nan.reshape((20, 8)).unwrap();
        assert!(all_nan(device.linear(&rows, &on(&device, &tensor(&[4, 8], 1)), None).unwrap()));
        for activation in ACTIVATIONS {
            assert!(all_nan(device.activate(&nan, activation).unwrap()), "{activation:?}");
        }
    }
}

#[test]
fn wrong_shapes_are_errors_that_show_them() {
    for device in engines().into_iter().chain([plain()]) {
        let x = |shape: &[usize]| on(&device, &tensor(shape, 1));
        let attend = |q: &[usize], k: &[usize]| device.attention(&x(q), &x(k), &x(k), &settings(None, None));
        let sinks = AttentionSettings { sinks: Some(x(&[3])), ..settings(None, None) };
        let short = |at: &[usize]| {
            device.gated_delta(
                &x(&[2, 6, 4, 8]),
                &x(&[2, 6, 4, 8]),
                &x(&[2, 6, 4, 12]),
                &x(&[2, 6, 4]),
                &x(at),
            )
        };
        let read = |keys: &[usize], decay: &[usize]| {
            device.linear_attention(&x(keys), &x(keys), &x(&[2, 6, 4, 12]), &x(decay))
        };
        let errors = [
            device.linear(&x(&[2, 3]), &x(&[4, 5]), None),
            device.linear(&x(&[2, 3]), &x(&[4, 3]), Some(&x(&[5]))),
            device.rms_norm(&x(&[2, 3]), Some(&x(&[4])), 1e-5),
            device.layer_norm(&x(&[2, 3]), None, Some(&x(&[4])), 1e-5),
            device.rotary(&x(&[1, 2, 3, 4]), &x(&[2, 3]), &x(&[2, 3]), Pairing::Halves),
            attend(&[1, 2, 3, 4], &[1, 2, 2, 4]),
            attend(&[1, 2, 3, 4], &[1, 3, 3, 4]),
            device.attention(&x(&[1, 2, 2, 4]), &x(&[1, 2, 2, 4]), &x(&[1, 2, 2, 4]), &sinks),
            device.glu(&x(&[2, 3]), &x(&[3, 2]), Activation::Silu),
            device.add(&x(&[2, 3]), &x(&[3, 2]), 1.0),
            short(&[2, 5, 4]),
            read(&[2, 6, 2, 8], &[2, 6, 3]),
            read(&[2, 6, 3, 8], &[2, 6, 4]),
        ];
        for (i, error) in errors.into_iter().enumerate() {
            let message = error.unwrap_err().to_string();
            assert!(message.contains('[') || message.contains("sinks"), "{i}: {message}");
        }
        assert!(device.activate(&x(&[2]), CLAMPED).is_err());
    }
}
