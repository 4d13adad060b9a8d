//! Time of the operations of one 512-token window of SmolLM2-135M on one thread:
//! `cargo bench -p mlx-quant-engine --bench operations`. Prints the fastest of many runs, on the CPU engine and made of
//! elementary operations there.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a benchmark")]

use std::time::Instant;

use mlx_quant_engine::running::RunningDivergence;
use mlx_quant_engine::{Activation, AttentionSettings, Pairing, Tensor, cpu};

fn tensor(shape: &[usize]) -> Tensor {
    let number = |at: usize| (at.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
    let values = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(values, shape, &cpu()).unwrap()
}

/// Milliseconds of the fastest of many runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while started.elapsed().as_secs_f64() < 0.7 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    best
}

/// `gigas` is what the figure beside the time counts: floating-point operations or bytes, in units of 1e9.
fn report(name: &str, gigas: f64, unit: &str, run: impl Fn() -> mlx_quant_engine::Result<Tensor>) {
    let time = fastest(|| drop(run().unwrap()));
    println!("{name:44} {time:8.3} ms {:7.1} {unit}", gigas / time * 1e3);
}

fn main() {
    let device = cpu();
    let (tokens, hidden, heads, kv_heads, d, wide) = (512, 576, 9, 3, 64, 1536);
    for (rows, k, n) in [
        (tokens, hidden, wide),
        (tokens, wide, hidden),
        (tokens, hidden, hidden),
        (tokens, hidden, 192),
        (1, hidden, wide),
    ] {
        let (x, weight) = (tensor(&[rows, k]), tensor(&[n, k]));
        let name = format!("linear [{rows}, {k}] x [{n}, {k}]^T");
        report(&name, (2 * rows * k * n) as f64 / 1e9, "GFLOP/s", || device.linear(&x, &weight, None));
    }
    let x = tensor(&[1, tokens, hidden]);
    let weight = tensor(&[hidden]);
    let bytes = (2 * 4 * tokens * hidden) as f64 / 1e9;
    report("rms_norm [512, 576]", bytes, "GB/s", || device.rms_norm(&x, Some(&weight), 1e-5));
    report("layer_norm [512, 576]", bytes, "GB/s", || {
        device.layer_norm(&x, Some(&weight), Some(&weight), 1e-5)
    });
    report("product with a row [512, 576]", bytes, "GB/s", || x.broadcast_mul(&weight));
    report("transpose [512, 576]", bytes, "GB/s", || x.t());
    let q = tensor(&[1, tokens, heads, d]);
    let (cos, sin) = (tensor(&[tokens, d / 2]), tensor(&[tokens, d / 2]));
    for pairing in [Pairing::Halves, Pairing::Interleaved] {
        report(&format!("rotary [512, 9, 64] {pairing:?}"), bytes, "GB/s", || {
            device.rotary(&q, &cos, &sin, pairing)
        });
    }
    let (gate, up) = (tensor(&[1, tokens, wide]), tensor(&[1, tokens, wide]));
    let bytes = (3 * 4 * tokens * wide) as f64 / 1e9;
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let name = format!("glu {activation:?} [512, 1536]");
        report(&name, bytes, "GB/s", || device.glu(&gate, &up, activation));
    }
    for (heads, kv_heads) in [(heads, kv_heads), (9, 9), (8, 1)] {
        let q = tensor(&[1, tokens, heads, d]);
        let (k, v) = (tensor(&[1, tokens, kv_heads, d]), tensor(&[1, tokens, kv_heads, d]));
        for (window, softcap) in [(None, None), (Some(128), None), (None, Some(50.0))] {
            let settings = AttentionSettings { scale: 0.125, window, softcap, sinks: None };
            let name = format!("attention {heads}/{kv_heads} window {window:?} cap {softcap:?}");
            let causal = (2 * heads * tokens * tokens * d) as f64 / 1e9;
            report(&name, causal, "GFLOP/s", || device.attention(&q, &k, &v, &settings));
        }
    }
    let vocabulary = 49152;
    let (p, q) = (tensor(&[vocabulary]).to_vec().unwrap(), tensor(&[vocabulary + 1]).to_vec().unwrap());
    let gathering = fastest(|| {
        let mut running = RunningDivergence::default();
        for (index, (p, q)) in p.chunks(2048).zip(q[1..].chunks(2048)).enumerate() {
            running.add(p, q, index as u32 * 2048, 7);
        }
        assert!(running.divergence() > 0.0);
    });
    println!("RunningDivergence of {vocabulary} in tiles of 2048: {gathering:.4} ms");
    let state = |features: &[usize]| tensor(&[&[1, tokens, 16], features].concat());
    let (q, k, v) = (state(&[128]), state(&[128]), state(&[128]));
    let (decay, beta) = (tensor(&[1, tokens, 16]).abs().unwrap(), tensor(&[1, tokens, 16]).abs().unwrap());
    let operations = (6 * tokens * 16 * 128 * 128) as f64 / 1e9;
    report("gated_delta [512, 16, 128, 128]", operations, "GFLOP/s", || {
        device.gated_delta(&q, &k, &v, &decay, &beta)
    });
    let log_decay = beta.neg().unwrap();
    let operations = (4 * tokens * 16 * 128 * 128) as f64 / 1e9;
    report("linear_attention [512, 16, 128, 128]", operations, "GFLOP/s", || {
        device.linear_attention(&q, &k, &v, &log_decay)
    });
}
