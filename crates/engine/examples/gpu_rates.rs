//! Rates of what a calibrated run spends its time in, on one adapter, so that one run on a card tells everything:
//! `cargo run --release -p mlx-quant-engine --features gpu --example gpu_rates [-- gpu:NAME] [--small] [--products] [--fast]`.
//!
//! `--products` measures products alone, `--fast` of these only those by matrix units.
//! Sizes are those of an 8B model (hidden 4096, inner 14336, 32 heads of 128, 8 key-value heads), or small ones with
//! `--small`, which a software adapter takes by itself. A figure is the mean of several runs after one that is not
//! counted (it builds kernels); product, Gram matrix and factor are also held against float64 sums of a few elements.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a benchmark")]

use std::time::{Duration, Instant};

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::gpu::{AdapterChoice, AdapterKind, Gpu, Tiles, adapters};
use mlx_quant_engine::rounding::How;
use mlx_quant_engine::running::{RunningDivergence, RunningScore};
use mlx_quant_engine::{
    Activation, AttentionSettings, Candidates, Device, Engine, Factor, Gram, GramSum, Labels, LearningStart,
    LearningState, Pairing, Precision, Selection, Tensor,
};

/// About normal, the same on every run.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}

struct Bench {
    gpu: Gpu,
    device: Device,
    /// How long an operation is repeated.
    patience: Duration,
}

impl Bench {
    fn tensor(&self, shape: &[usize], seed: u64) -> Tensor {
        Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &self.device).unwrap()
    }

    /// Seconds of one run, and a line about it. `units` is what the rate counts, in operations or bytes.
    fn report<T>(&self, name: &str, units: f64, unit: &str, mut run: impl FnMut() -> T) -> f64 {
        // Builds kernels, and wakes a card that has slowed down.
        let start = Instant::now();
        while start.elapsed() < self.patience {
            drop(run());
            self.gpu.finish().unwrap();
        }
        let (start, mut times) = (Instant::now(), 0u32);
        while times == 0 || (start.elapsed() < self.patience && times < 1000) {
            drop(run());
            times += 1;
            // Recording runs ahead of the card; a look at the clock should not.
            if times.is_power_of_two() {
                self.gpu.finish().unwrap();
            }
        }
        self.gpu.finish().unwrap();
        let seconds = start.elapsed().as_secs_f64() / f64::from(times);
        println!("{name:58} {:10.3} ms {:11.2} {unit}", seconds * 1e3, units / seconds / 1e9);
        seconds
    }
}

fn products(bench: &Bench, tokens: usize, hidden: usize, inner: usize) {
    for (m, k, n) in [
        (tokens, hidden, hidden),
        (tokens, inner, hidden),
        (tokens / 4, hidden, hidden),
        (tokens / 4, hidden, hidden / 4),
        (1, hidden, hidden),
        (tokens, hidden - 1, hidden - 1),
    ] {
        let (x, weight) = (bench.tensor(&[m, k], 1), bench.tensor(&[n, k], 2));
        let operations = 2.0 * (m * k * n) as f64;
        let name = format!("linear [{m}, {k}] x [{n}, {k}]^T");
        bench.report(&name, operations, "GFLOP/s", || bench.device.linear(&x, &weight, None).unwrap());
        let y =
            bench.device.linear(&x, &weight, None).unwrap().narrow(0, m / 2, 1).unwrap().to_vec().unwrap();
        let (row, weights) = (x.narrow(0, m / 2, 1).unwrap().to_vec().unwrap(), weight.to_vec().unwrap());
        let exact = |column: usize| -> f64 {
            row.iter().zip(&weights[column * k..]).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        let apart = (0..n).step_by(n / 9 + 1).map(|at| (f64::from(y[at]) - exact(at)).abs());
        println!("{:58} {:10.2e}", "  furthest from float64", apart.fold(0.0, f64::max));
    }
    let (x, weight) = (bench.tensor(&[tokens, hidden], 1), bench.tensor(&[hidden, hidden], 2));
    let operations = 2.0 * (tokens * hidden * hidden) as f64;
    for (of, x, weight) in [("input", x.variable(), weight.clone()), ("weight", x.clone(), weight.variable())]
    {
        let y = bench.device.linear(&x, &weight, None).unwrap();
        let seed = y.detach();
        let name = format!("gradient of the {of} of linear [{tokens}, {hidden}] x [{hidden}, {hidden}]^T");
        bench.report(&name, operations, "GFLOP/s", || y.gradients(&seed).unwrap());
    }
}

fn attention(bench: &Bench, windows: usize, tokens: usize, heads: usize, kv_heads: usize, d: usize) {
    let q = bench.tensor(&[windows, tokens, heads, d], 1).variable();
    let [k, v] = [2, 3].map(|seed| bench.tensor(&[windows, tokens, kv_heads, d], seed).variable());
    let settings =
        AttentionSettings { scale: 1.0 / (d as f32).sqrt(), window: None, softcap: None, sinks: None };
    // Half of the scores are seen.
    let operations = 2.0 * (windows * heads * tokens * tokens * d) as f64;
    let name = format!("attention of {windows} x {tokens} tokens, {heads}/{kv_heads} heads of {d}");
    bench.report(&name, operations, "GFLOP/s", || bench.device.attention(&q, &k, &v, &settings).unwrap());
    let y = bench.device.attention(&q, &k, &v, &settings).unwrap();
    let seed = y.detach();
    bench.report("  its gradients", 2.5 * operations, "GFLOP/s", || y.gradients(&seed).unwrap());
}

fn passing(bench: &Bench, tokens: usize, hidden: usize, inner: usize, heads: usize, d: usize) {
    let (x, weight) = (bench.tensor(&[1, tokens, hidden], 1), bench.tensor(&[hidden], 2));
    let bytes = |count: usize| 4.0 * count as f64;
    let name = |what: &str| format!("{what} [{tokens}, {hidden}]");
    bench.report(&name("rms_norm"), bytes(2 * tokens * hidden), "GB/s", || {
        bench.device.rms_norm(&x, Some(&weight), 1e-5).unwrap()
    });
    bench.report(&name("add"), bytes(3 * tokens * hidden), "GB/s", || bench.device.add(&x, &x, 1.0).unwrap());
    let rows = x.reshape((tokens, hidden)).unwrap();
    bench.report(&name("transpose"), bytes(2 * tokens * hidden), "GB/s", || rows.t().unwrap());
    let q = bench.tensor(&[1, tokens, heads, d], 1);
    let angles = bench.tensor(&[tokens, d / 2], 2);
    bench.report(&format!("rotary [{tokens}, {heads}, {d}]"), bytes(2 * tokens * heads * d), "GB/s", || {
        bench.device.rotary(&q, &angles, &angles, Pairing::Halves).unwrap()
    });
    let (gate, up) = (bench.tensor(&[1, tokens, inner], 1), bench.tensor(&[1, tokens, inner], 2));
    bench.report(&format!("glu Silu [{tokens}, {inner}]"), bytes(3 * tokens * inner), "GB/s", || {
        bench.device.glu(&gate, &up, Activation::Silu).unwrap()
    });
    let values = numbers(tokens * hidden, 1);
    bench.report(&name("upload and read"), bytes(2 * tokens * hidden), "GB/s", || {
        Tensor::from_slice(&values, (tokens, hidden), &bench.device).unwrap().read(<[f32]>::len).unwrap()
    });
}

/// Gram matrix, factor, rounding of one linear.
fn second_order(bench: &Bench, tokens: usize, size: usize, rows: usize) {
    let x = bench.tensor(&[1, tokens, size], 5);
    let mut sum = GramSum::new(size, &bench.device).unwrap();
    let operations = (tokens * size * (size + 1)) as f64;
    let name = format!("gram_add [{tokens}, {size}] (half a product)");
    bench.report(&name, operations, "GFLOP/s", || sum.add(&x).unwrap());
    let mut sum = GramSum::new(size, &bench.device).unwrap();
    sum.add(&x).unwrap();
    let gram: Gram = sum.finish().unwrap();
    let order: Vec<usize> = (0..size).collect();
    // A factorization (n^3 / 3) and a triangular inverse (n^3 / 3, of which this does twice as much).
    let operations = size.pow(3) as f64 * 2.0 / 3.0;
    bench.report(&format!("factor [{size}, {size}]"), operations, "GFLOP/s", || {
        Factor::new(&gram, order.clone(), 0.01).unwrap().unwrap()
    });
    let factor = Factor::new(&gram, order, 0.01).unwrap().unwrap();
    let weight = bench.tensor(&[rows, size], 6);
    let scheme = Scheme::affine(4, 64).unwrap();
    let weights = vec![1.0; size];
    let elements = (rows * size) as f64;
    for (what, how) in [
        ("searched grid, nearest", How::Nearest { weights: &weights }),
        ("GPTQ", How::Compensated { factor: &factor, block_size: 128, sweeps: 0 }),
        ("GPTQ, 2 sweeps", How::Compensated { factor: &factor, block_size: 128, sweeps: 2 }),
    ] {
        let name = format!("round [{rows}, {size}] at 4 bits: {what}");
        bench.report(&name, elements, "G weights/s", || {
            bench.device.round(&weight, scheme, FloatType::Bf16, how).unwrap()
        });
    }
}

/// Losses of a tile of the vocabulary, each with what of it comes back.
fn losses(bench: &Bench, tokens: usize, width: usize) {
    let [own, theirs] = [1, 2].map(|seed| bench.tensor(&[tokens, width], seed));
    let bytes = |times: usize| 4.0 * (times * tokens * width) as f64;
    let name = |what: &str| format!("{what} [{tokens}, {width}]");
    let (targets, lse) = (vec![7; tokens], vec![9.0; tokens]);
    bench.report(&name("score"), bytes(1), "GB/s", || {
        let mut running = vec![RunningScore::default(); tokens];
        bench.device.score(&own, 0, &targets, &mut running).unwrap();
    });
    bench.report(&name("compare"), bytes(2), "GB/s", || {
        let mut running = vec![RunningDivergence::default(); tokens];
        bench.device.compare(&theirs, &own, 0, &targets, &mut running).unwrap();
    });
    for (what, tiles) in [("keep_likeliest, a first tile", 1), ("keep_likeliest, four tiles", 4)] {
        bench.report(&name(what), bytes(tiles), "GB/s", || {
            let mut found = vec![Candidates::default(); tokens];
            for tile in 0..tiles {
                let first = (tile * width) as u32;
                bench.device.keep_likeliest(&own, first, width / 2, &mut found).unwrap();
            }
        });
    }
    bench.report(&name("label_slopes"), bytes(2), "GB/s", || {
        let mut labels = Labels::new(vec![0.5; tokens]);
        bench.device.label_slopes(&own, &lse, None, false, &mut labels).unwrap()
    });
    bench.report(&name("divergence_slopes"), bytes(3), "GB/s", || {
        let lses = (&*lse, &*lse);
        bench.device.divergence_slopes(&theirs, &own, lses, (1.0, 1.0), &mut 0.0).unwrap()
    });
    let scores = bench.tensor(&[tokens, 128], 3);
    let selection = Selection { top_k: 8, groups: None };
    bench.report(&format!("route [{tokens}, 128] to 8"), (tokens * 128 * 4) as f64, "GB/s", || {
        bench.device.route(&scores, &selection).unwrap()
    });
}

fn delta(bench: &Bench, windows: usize, tokens: usize, heads: usize, d: usize) {
    let shape = [windows, tokens, heads, d];
    let [q, k] = [1, 2].map(|seed| (bench.tensor(&shape, seed) * 0.05).unwrap());
    let v = bench.tensor(&shape, 3);
    let beta = Tensor::full(0.5, &shape[..3], &bench.device).unwrap();
    let operations = 6.0 * (windows * tokens * heads * d * d) as f64;
    for (axes, of) in [(3, "head"), (4, "row of a state")] {
        let decay = Tensor::full(0.5, &shape[..axes], &bench.device).unwrap();
        let inputs = [&q, &k, &v, &decay, &beta].map(Tensor::variable);
        let [q, k, v, decay, beta] = &inputs;
        let name = format!(
            "gated_delta of {windows} x {tokens} tokens, {heads} heads of {d}, a decay for each {of}"
        );
        let rule = || bench.device.gated_delta(q, k, v, decay, beta).unwrap();
        bench.report(&name, operations, "GFLOP/s", rule);
        let y = rule();
        let seed = y.detach();
        bench.report("  its gradients", 4.0 * operations, "GFLOP/s", || y.gradients(&seed).unwrap());
    }
}

/// As in Nemotron-H: eight groups of heads, states of 128 by 64.
fn linear_attention(bench: &Bench, windows: usize, tokens: usize, heads: usize) {
    let (keys, values, groups) = (128, 64, heads.div_ceil(16));
    let shape = [windows, tokens, groups, keys];
    let [q, k] = [1, 2].map(|seed| (bench.tensor(&shape, seed) * 0.05).unwrap());
    let v = bench.tensor(&[windows, tokens, heads, values], 3);
    let log_decay = Tensor::full(-0.5, [windows, tokens, heads], &bench.device).unwrap();
    let inputs = [q, k, v, log_decay].map(|input| input.variable());
    let [q, k, v, log_decay] = &inputs;
    let operations = 4.0 * (windows * tokens * heads * keys * values) as f64;
    let name = format!("linear_attention of {windows} x {tokens} tokens, {heads} heads of {keys} x {values}");
    bench.report(&name, operations, "GFLOP/s", || bench.device.linear_attention(q, k, v, log_decay).unwrap());
    let y = bench.device.linear_attention(q, k, v, log_decay).unwrap();
    let seed = y.detach();
    bench.report("  its gradients", 3.0 * operations, "GFLOP/s", || y.gradients(&seed).unwrap());
}

/// A linear that learns: bytes are positions (read, written), codes, gradients and what they decode to.
fn learning(bench: &Bench, rows: usize, columns: usize, tokens: usize) {
    let (scheme, size) = (Scheme::affine(2, 64).unwrap(), (rows, columns / 64));
    let grids = |value: f32| Tensor::full(value, size, &bench.device).unwrap();
    let start = LearningStart {
        scheme,
        float: FloatType::Bf16,
        codes: bench.device.hold(vec![1; rows * columns]).unwrap(),
        scales: grids(0.1),
        ranges: [grids(-0.1), grids(0.2)],
    };
    let positions = Tensor::full(1.25, (rows, columns), &bench.device).unwrap();
    let mut state = LearningState { positions, factors: [grids(1.0), grids(1.01)] };
    let gradient = bench.tensor(&[rows, columns], 1);
    let bytes = |count: usize| (count * rows * columns) as f64;
    bench.report(&format!("learned_weight [{rows}, {columns}]"), bytes(8), "GB/s", || {
        bench.device.learned_weight(&start, &state).unwrap()
    });
    bench.report("  its codes", bytes(5), "GB/s", || {
        bench.device.learned_codes(scheme, &state.positions).unwrap()
    });
    bench.report("  a step", bytes(13), "GB/s", || {
        bench.device.learning_step(&start, &mut state, &gradient, 1e-4).unwrap();
    });
    let difference = bench.tensor(&[tokens, columns], 2);
    let read = (5 * 4 * tokens * columns) as f64;
    bench.report(&format!("without_largest of [{tokens}, {columns}]"), read, "GB/s", || {
        bench.device.without_largest(&difference, tokens * columns / 1000).unwrap()
    });
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    for adapter in adapters() {
        println!("{adapter:?}");
    }
    let named = arguments.iter().find(|argument| argument.starts_with("gpu"));
    let choice = named.map_or(AdapterChoice::Best, |name| name.parse().unwrap());
    let gpu = match Gpu::open(&choice) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    let small =
        gpu.adapter().kind == AdapterKind::Software || arguments.iter().any(|argument| argument == "--small");
    println!("{}{}", gpu.name(), if small { ", small sizes" } else { "" });
    let patience = Duration::from_millis(if small { 200 } else { 150 });
    let bench = Bench { device: Device::new(gpu.clone()), gpu, patience };
    if small {
        attention(&bench, 2, 128, 4, 2, 64);
        passing(&bench, 128, 256, 512, 4, 64);
        second_order(&bench, 128, 256, 128);
        losses(&bench, 64, 512);
        delta(&bench, 1, 64, 2, 32);
        linear_attention(&bench, 1, 64, 4);
        learning(&bench, 128, 256, 64);
    } else if arguments.iter().all(|argument| argument != "--products") {
        attention(&bench, 8, 512, 32, 8, 128);
        attention(&bench, 2, 4096, 32, 8, 128);
        passing(&bench, 8192, 4096, 14336, 32, 128);
        second_order(&bench, 8192, 4096, 4096);
        second_order(&bench, 8192, 14336, 4096);
        losses(&bench, 2048, 2048);
        delta(&bench, 4, 512, 32, 128);
        linear_attention(&bench, 4, 512, 128);
    }
    println!("{:?}", bench.device.memory().unwrap());
    let (tokens, hidden, inner) = if small { (1500, 300, 3000) } else { (8192, 4096, 14336) };
    let measured = |name: &str, gpu: Gpu| {
        println!("products {name}");
        let bench = Bench { device: Device::new(gpu.clone()), gpu, patience };
        products(&bench, tokens, hidden, inner);
        let x = bench.tensor(&[1, tokens, hidden], 5);
        let mut sum = GramSum::new(hidden, &bench.device).unwrap();
        let operations = (tokens * hidden * (hidden + 1)) as f64;
        bench.report("gram_add (half a product)", operations, "GFLOP/s", || sum.add(&x).unwrap());
    };
    let all = arguments.iter().all(|argument| argument != "--fast");
    for tiles in [Tiles::Plain, Tiles::Turns].into_iter().filter(|_| all) {
        measured(&format!("with tiles {tiles:?}"), Gpu::with_tiles(&choice, tiles).unwrap());
    }
    match Gpu::with_precision(&choice, Precision::Fast) {
        Ok(gpu) => {
            measured("by matrix units", gpu.clone());
            if !small && all {
                let bench = Bench { device: Device::new(gpu.clone()), gpu, patience };
                second_order(&bench, 8192, 4096, 4096);
            }
        }
        Err(error) => println!("{error}"),
    }
}
