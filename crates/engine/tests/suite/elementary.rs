//! Elementary operations and their gradients, which are written once for all engines.

use mlx_quant_engine::{LAST, REST, Tensor, plain};

use super::{Operation, agree, engines, on, run, tensor, values};

#[test]
fn functions_of_one_number() {
    let positive =
        Tensor::from_vec((1..=60).map(|at| at as f32 / 20.0).collect(), (4, 15), &plain()).unwrap();
    let any = tensor(&[4, 15], 1);
    let of_positive: [(&str, Operation<'_>); 3] =
        [("log", &|_, x| x[0].log()), ("sqrt", &|_, x| x[0].sqrt()), ("recip", &|_, x| x[0].recip())];
    for (name, operation) in of_positive {
        agree(name, std::slice::from_ref(&positive), operation);
    }
    let of_any: [(&str, Operation<'_>); 8] = [
        ("exp", &|_, x| x[0].exp()),
        ("tanh", &|_, x| x[0].tanh()),
        ("erf", &|_, x| x[0].erf()),
        ("abs", &|_, x| x[0].abs()),
        ("neg", &|_, x| x[0].neg()),
        ("sqr", &|_, x| x[0].sqr()),
        ("affine", &|_, x| x[0].affine(-0.3, 2.0)),
        ("clamp", &|_, x| x[0].clamp(-0.5, 0.7)),
    ];
    for (name, operation) in of_any {
        agree(name, std::slice::from_ref(&any), operation);
    }
}

#[test]
fn pairs_are_repeated_to_a_common_shape() {
    for (x, y) in [
        (vec![2, 3, 5], vec![2, 3, 5]),
        (vec![2, 3, 5], vec![5]),
        (vec![2, 3, 5], vec![3, 1]),
        (vec![1, 5], vec![4, 1]),
        (vec![2, 1, 5], vec![3, 5]),
        (vec![3], vec![]),
    ] {
        let away = |seed| (tensor(if seed == 1 { &x } else { &y }, seed).sqr().unwrap() + 0.5).unwrap();
        let inputs = [away(1), away(2)];
        let what = format!("{x:?} and {y:?}");
        agree(&format!("sum of {what}"), &inputs, &|_, x| x[0].broadcast_add(&x[1]));
        agree(&format!("difference of {what}"), &inputs, &|_, x| x[0].broadcast_sub(&x[1]));
        agree(&format!("product of {what}"), &inputs, &|_, x| x[0].broadcast_mul(&x[1]));
        agree(&format!("quotient of {what}"), &inputs, &|_, x| x[0].broadcast_div(&x[1]));
    }
    let [x, y] = [tensor(&[2, 3], 1), tensor(&[2], 2)];
    let message = x.broadcast_add(&y).unwrap_err().to_string();
    assert!(message.contains("[2, 3]") && message.contains("[2]"), "{message}");
    assert!((&x + &y).is_err() && (&x * x.t().unwrap()).is_err());
}

#[test]
fn other_arrangements() {
    let x = [tensor(&[3, 4, 5], 1)];
    let all: [(&str, Operation<'_>); 12] = [
        ("reshape", &|_, x| x[0].reshape((2, REST))),
        ("transpose", &|_, x| x[0].transpose(0, 2)),
        ("t", &|_, x| x[0].t()),
        ("narrow first", &|_, x| x[0].narrow(0, 1, 2)),
        ("narrow middle", &|_, x| x[0].narrow(1, 1, 2)),
        ("narrow last", &|_, x| x[0].narrow(LAST, 4, 1)),
        ("get", &|_, x| x[0].get(2)),
        ("unsqueeze", &|_, x| x[0].unsqueeze(1)),
        ("broadcast", &|_, x| x[0].unsqueeze(0)?.broadcast_as((2, 3, 4, 5))),
        ("pad", &|_, x| x[0].pad_with_zeros(1, 2, 1)),
        ("rows", &|_, x| x[0].rows(&[2, 0, 2])),
        ("cat", &|_, x| Tensor::cat(&[x[0].clone(), x[0].narrow(1, 0, 1)?], 1)),
    ];
    for (name, operation) in all {
        agree(name, &x, operation);
    }
    let two = [tensor(&[2, 5], 1), tensor(&[2, 5], 2)];
    for axis in 0..3 {
        agree("stack", &two, &|_, x| Tensor::stack(x, axis));
    }
    for device in engines().into_iter().chain([plain()]) {
        let x = on(&device, &x[0]);
        assert!(x.rows(&[3]).is_err() && x.narrow(1, 3, 2).is_err() && x.reshape((7, REST)).is_err());
        assert_eq!(values(&x.transpose(1, 2).unwrap().transpose(1, 2).unwrap()), values(&x));
        assert_eq!(values(&x.narrow(0, 1, 1).unwrap()), values(&x)[20..40]);
    }
}

#[test]
fn sums_and_products() {
    let x = [tensor(&[3, 4, 5], 1)];
    for axis in 0..3 {
        agree("sum", &x, &|_, x| x[0].sum(axis));
        agree("mean", &x, &|_, x| x[0].mean_keepdim(axis));
        let largest: Operation<'_> = &|_, x| x[0].max_keepdim(axis);
        for device in engines() {
            assert_eq!(values(&run(&device, largest, &x)), values(&run(&plain(), largest, &x)));
        }
    }
    agree("sum of all", &x, &|_, x| x[0].sum_all());
    for (batch, m, k, n) in [(1, 1, 1, 1), (2, 3, 4, 5), (3, 1, 7, 2), (1, 20, 30, 40)] {
        let pair = [tensor(&[batch, m, k], 1), tensor(&[batch, k, n], 2)];
        agree("matmul", &pair, &|_, x| x[0].matmul(&x[1]));
    }
}
