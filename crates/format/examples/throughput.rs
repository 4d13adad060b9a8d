//! Whole-array throughput of the quantizer, best of several runs, as JSON on stdout:
//! `cargo run --release -p mlx-format --example throughput -- [THREADS] [REPEATS] [FILTER]`
//! (a filter such as `"bfloat16 4 bits, group size 64"` keeps the lines that contain it).
//!
//! The same array as `benches/kernels.py` gives to `mx.quantize`; a memcpy of the input on as many threads
//! stands beside it as the floor.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../benches/rows/mod.rs"]
mod rows;

use std::time::Instant;

use mlx_format::{FloatType, Mode, PackedMut, Scheme};
use rayon::prelude::*;

const ROWS: usize = 4096;
const COLUMNS: usize = 4096;

fn best(repeats: usize, mut run: impl FnMut()) -> f64 {
    run();
    (0..repeats)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |a| a.parse().unwrap());
    let repeats = arguments.next().map_or(9, |a| a.parse().unwrap());
    let filter = arguments.next().unwrap_or_default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let mut state = 1u64;
    let values: Vec<f32> = (0..ROWS * COLUMNS)
        .map(|_| {
            // Sum of four uniforms: near enough to a Gaussian of sigma 0.02.
            (0..4)
                .map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 40) as f32 / (1 << 24) as f32 - 0.5
                })
                .sum::<f32>()
                * 0.035
        })
        .collect();
    let mut schemes: Vec<Scheme> =
        Mode::ALL[1..].iter().map(|mode| Scheme::new(*mode, None, None).unwrap()).collect();
    for bits in [2, 3, 4, 5, 6, 8] {
        schemes.extend([32, 64, 128].map(|group| Scheme::affine(bits, group).unwrap()));
    }
    println!(
        "{{\"simd\": \"{}\", \"threads\": {threads}, \"gigabytes_per_second\": {{",
        mlx_format::simd_name()
    );
    for (last, float) in [(false, FloatType::F32), (false, FloatType::F16), (true, FloatType::Bf16)] {
        let mut input = vec![0u8; values.len() * float.size()];
        float.narrow(&values, &mut input);
        let gigabytes = input.len() as f64 / 1e9;
        let mut copy = vec![0u8; input.len()];
        let seconds = best(repeats, || {
            pool.install(|| {
                copy.par_chunks_mut(1 << 20)
                    .zip(input.par_chunks(1 << 20))
                    .for_each(|(to, from)| to.copy_from_slice(from));
            });
        });
        print!("  \"{} memcpy\": {:.2}", float.name(), gigabytes / seconds);
        for scheme in schemes.iter().filter(|scheme| format!("{} {scheme}", float.name()).contains(&filter)) {
            let scales = ROWS * scheme.scale_bytes(COLUMNS, float);
            let mut weight = vec![0u8; ROWS * scheme.words(COLUMNS) * 4];
            let (mut scales, mut biases) =
                (vec![0u8; scales], vec![0u8; if scheme.has_biases() { scales } else { 0 }]);
            let seconds = best(repeats, || {
                let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
                pool.install(|| rows::quantize(*scheme, float, COLUMNS, &input, out)).unwrap();
            });
            print!(",\n  \"{} {scheme}\": {:.2}", float.name(), gigabytes / seconds);
        }
        println!("{}", if last { "\n}}" } else { "," });
    }
}
