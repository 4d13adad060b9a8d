//! Throughput of the kernels in bytes of input: `cargo bench -p mlx-format`; a filter such as
//! `-- "quantize/bfloat16/4 bits"` narrows it. A memcpy of the same bytes on as many threads stands beside.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

mod rows;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mlx_format::{FloatType, Mode, PackedMut, PackedRef, Scheme};
use rayon::prelude::*;

const ROWS: usize = 1024;
const COLUMNS: usize = 4096;
const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

fn schemes() -> Vec<Scheme> {
    let affine = [2, 3, 4, 5, 6, 8]
        .into_iter()
        .flat_map(|bits| [32, 64, 128].map(|group| Scheme::affine(bits, group)));
    let fp = Mode::ALL[1..].iter().map(|mode| Scheme::new(*mode, None, None));
    affine.chain(fp).map(Result::unwrap).collect()
}

fn input(float: FloatType) -> Vec<u8> {
    let values: Vec<f32> =
        (0..ROWS * COLUMNS).map(|i| ((i as f32 * 0.618).sin() + (i as f32 * 0.07).cos()) * 0.02).collect();
    let mut bytes = vec![0u8; values.len() * float.size()];
    float.narrow(&values, &mut bytes);
    bytes
}

fn packed(scheme: Scheme, float: FloatType) -> [Vec<u8>; 3] {
    let scales = ROWS * scheme.scale_bytes(COLUMNS, float);
    let biases = if scheme.has_biases() { scales } else { 0 };
    [vec![0; ROWS * scheme.words(COLUMNS) * 4], vec![0; scales], vec![0; biases]]
}

fn kernels(criterion: &mut Criterion) {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for float in FLOATS {
            let input = input(float);
            let mut group = criterion.benchmark_group(format!("quantize/{}", float.name()));
            group.throughput(Throughput::Bytes(input.len() as u64));
            let mut copy = vec![0u8; input.len()];
            group.bench_function(format!("memcpy/{threads} threads"), |bencher| {
                bencher.iter(|| {
                    pool.install(|| {
                        let parts = copy.par_chunks_mut(1 << 20).zip(input.par_chunks(1 << 20));
                        parts.for_each(|(to, from)| to.copy_from_slice(from));
                    });
                });
            });
            for scheme in schemes() {
                let [mut weight, mut scales, mut biases] = packed(scheme, float);
                group.bench_function(format!("{scheme}/{threads} threads"), |bencher| {
                    bencher.iter(|| {
                        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
                        pool.install(|| rows::quantize(scheme, float, COLUMNS, &input, out)).unwrap();
                    });
                });
            }
            group.finish();
        }
    }
    let float = FloatType::Bf16;
    let mut group = criterion.benchmark_group("dequantize/bfloat16");
    let input = input(float);
    group.throughput(Throughput::Bytes(input.len() as u64));
    for scheme in schemes() {
        let [mut weight, mut scales, mut biases] = packed(scheme, float);
        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
        mlx_format::quantize(scheme, float, COLUMNS, &input, out, false).unwrap();
        let mut decoded = vec![0u8; input.len()];
        group.bench_function(format!("{scheme}/1 threads"), |bencher| {
            bencher.iter(|| {
                let packed = PackedRef { weight: &weight, scales: &scales, biases: &biases };
                mlx_format::dequantize(scheme, float, COLUMNS, packed, &mut decoded);
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = kernels
}
criterion_main!(benches);
