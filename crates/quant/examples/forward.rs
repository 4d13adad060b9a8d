//! One full-precision forward pass, timed, for `benches/forward.py`: prints one JSON object.
//!
//!     forward MODEL WINDOWS.json
//!
//! Loading and a first pass are left out of the time. The linears of the pass are then run alone, on the same threads and
//! shapes, which tells the share of time that is matrix products; and faer's peak is measured in the same process.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measurement for developers")]

use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use mlx_format::checkpoint::Directory;
use mlx_quant::evaluate::measure;
use mlx_quant::threads::threads_or_all;
use mlx_quant::walks::{Residency, Walk};
use mlx_quant::{Silent, open};
use mlx_quant_engine::Tensor;
use rayon::prelude::*;
use serde_json::json;

/// As the command line has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let windows: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(&arguments[2]).unwrap()).unwrap();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let threads = threads_or_all(threads);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let model = open(&Directory::open(arguments[1].as_ref()).unwrap()).unwrap();
    let walk = Walk::open(&model).unwrap().with(Residency::Resident);

    let pass = || {
        let hidden = walk.hidden(&windows, &pool, &Silent, &mut 0).unwrap();
        measure((&walk, hidden), None, &windows, &pool, &Silent).unwrap()
    };
    let measures = pass();
    let best = |work: &dyn Fn()| {
        let round = || {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        };
        (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
    };
    let seconds = best(&|| drop(pass()));

    let tokens: usize = windows.iter().map(|window| window.len()).sum();
    let linears = linears(&walk);
    let weights: usize = linears.iter().map(Tensor::elem_count).sum();
    let length = windows[0].len();
    let matmul_seconds = best(&|| {
        pool.install(|| {
            windows.par_iter().for_each(|_| {
                for weight in &linears {
                    let x = Tensor::full(1.0, (length, weight.dim(1).unwrap()), weight.device());
                    weight.device().linear(&x.unwrap(), weight, None).unwrap();
                }
            });
        });
    });
    let nll = measures[0].iter().map(|measure| measure.nll).sum::<f64>() / measures[0].len() as f64;
    let peak: serde_json::Map<String, serde_json::Value> = [(4096, 576, 1536), (2048, 2048, 2048)]
        .map(|shape| peak(shape, threads, &pool))
        .into_iter()
        .collect();
    let report = json!({
        "tokens_per_second": tokens as f64 / seconds,
        "seconds": seconds,
        "flops": 2 * weights * tokens + attention_flops(&walk, &windows),
        "matmul_seconds": matmul_seconds,
        "matmul_share": matmul_seconds / seconds,
        "peak_gflops_faer": peak,
        "first_window_nll": nll,
        "threads": threads,
        "kernels": mlx_format::simd_name(),
    });
    println!("{report}");
}

/// Every matrix that a token passes, the head in its tiles of the vocabulary.
fn linears(walk: &Walk<'_>) -> Vec<Tensor> {
    let mut linears = Vec::new();
    for (index, block) in walk.decoder.blocks.iter().enumerate() {
        let parameters = walk.block(index).unwrap();
        for site in block.sites() {
            for linear in site.readers {
                linears.push(parameters.tensor(&format!("{}.weight", linear.path)).unwrap().clone());
            }
        }
    }
    let path = walk.decoder.head.linear.as_ref().map_or(&walk.decoder.embedding.path, |linear| &linear.path);
    let head = walk.weights.module(path, &walk.device).unwrap();
    let head = head.tensor(&format!("{path}.weight")).unwrap();
    let rows = head.dim(0).unwrap();
    linears
        .extend((0..rows).step_by(2048).map(|start| head.narrow(0, start, 2048.min(rows - start)).unwrap()));
    linears
}

/// Scores and values, without the masked half.
fn attention_flops(walk: &Walk<'_>, windows: &[&[u32]]) -> usize {
    use mlx_quant::model::decoder::Layer;
    let pairs: usize = windows.iter().map(|window| window.len() * (window.len() + 1) / 2).sum();
    let layers = walk.decoder.blocks.iter().flat_map(mlx_quant::model::decoder::Block::layers);
    let width = layers.map(|layer| match layer {
        Layer::Attention(attention) => attention.heads * (attention.head_dim + attention.value_dim),
        _ => 0,
    });
    2 * pairs * width.sum::<usize>()
}

/// faer's best rate for `[m, k] @ [n, k]^T`, in GFLOP/s: its own parallel product, or a product for each thread.
fn peak(
    (m, k, n): (usize, usize, usize),
    threads: usize,
    pool: &rayon::ThreadPool,
) -> (String, serde_json::Value) {
    let fill = |length: usize| (0..length).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
    let (x, w) = (fill(threads * m * k), fill(n * k));
    let mut y = vec![0f32; threads * m * n];
    let product = |x: &[f32], y: &mut [f32], par: Par| {
        let weight = MatRef::from_row_major_slice(&w, n, k).transpose();
        matmul(
            MatMut::from_row_major_slice_mut(y, m, n),
            Accum::Replace,
            MatRef::from_row_major_slice(x, m, k),
            weight,
            1.0,
            par,
        );
    };
    let operations = (2 * m * k * n) as f64 / 1e9;
    let mut best = 0f64;
    for _ in 0..12 {
        let start = Instant::now();
        pool.install(|| product(&x[..m * k], &mut y[..m * n], Par::rayon(threads)));
        best = best.max(operations / start.elapsed().as_secs_f64());
        let start = Instant::now();
        pool.install(|| {
            x.par_chunks(m * k).zip(y.par_chunks_mut(m * n)).for_each(|(x, y)| product(x, y, Par::Seq));
        });
        best = best.max(operations * threads as f64 / start.elapsed().as_secs_f64());
    }
    (format!("{m}x{k}x{n}"), json!(best))
}
