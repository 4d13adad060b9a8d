//! Rounding a weight to codes, scales and biases: to nearest on a searched grid, or with GPTQ's compensation.
//!
//! Rows of a weight are independent of each other, so a task takes 64 of them through all columns. They lie transposed,
//! a column's 64 values side by side, so that every step is the same arithmetic in every lane.
//!
//! GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds column by column and lets later columns make up for each error.
//! Beyond mlx-lm's: scale and bias of a group are searched on the values as they are when the group's turn comes and
//! are rounded to the stored dtype *before* its codes are chosen, so that later columns also make up for that; and
//! sweeps of coordinate descent over groups (scale and bias by least squares) and codes follow, every step of which
//! lowers the error under the full Hessian.
//!
//! The fp modes (mxfp4, mxfp8, nvfp4) go the same way: elements are small floats instead of whole numbers, a group's
//! scale is one of the bytes that are stored, and there is no bias (`elements`, `float_grid`).

mod elements;
mod float_grid;
mod grid;
mod how;
mod pending;
mod rounded;
mod run;
mod task;
mod way;

use mlx_format::{FloatType, Scheme};

#[cfg(feature = "gpu")]
pub(crate) use self::grid::{CAREFUL, Search, reach};
pub use self::how::How;
pub use self::pending::Pending;
pub use self::rounded::Rounded;
pub(crate) use self::run::run;
pub use self::way::ROWS;
use crate::error::Result;

/// Rounds a weight `[rows, columns]` on the processor, on the current rayon pool; the same result for any number of
/// threads.
///
/// # Errors
/// A factor that is not in this process's memory.
///
/// # Panics
/// If the lengths do not fit together.
pub fn round(
    values: &[f32],
    columns: usize,
    scheme: Scheme,
    float: FloatType,
    how: How<'_>,
) -> Result<Rounded> {
    Ok(run(values, columns, scheme, float, how.at_hand(None)?))
}

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test shows its figures")]
mod tests {
    use super::*;
    use crate::gram::{Factor, Gram, GramSum};
    use crate::{Tensor, cpu};

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // Roughly normal, so that edges are rare.
        (0..count).map(|_| next() + next() + next() + next()).collect()
    }

    /// Correlated inputs with some loud features.
    fn gram(size: usize, tokens: usize) -> Gram {
        let (mix, noise) = (numbers(8 * size, 3), numbers(tokens * (size + 8), 5));
        let mut x = Vec::new();
        for token in noise.chunks_exact(size + 8) {
            for at in 0..size {
                let shared: f32 = (0..8).map(|k| token[size + k] * mix[k * size + at]).sum();
                x.push((token[at] + 2.0 * shared) * if at % 37 == 5 { 6.0 } else { 1.0 });
            }
        }
        let mut sum = GramSum::new(size, &cpu()).unwrap();
        sum.add(&Tensor::from_vec(x, (1, tokens, size), &cpu()).unwrap()).unwrap();
        sum.finish().unwrap()
    }

    fn plain(values: &[f32], columns: usize, scheme: Scheme, float: FloatType) -> Vec<f32> {
        use mlx_format::{PackedMut, PackedRef};
        let mut bytes = vec![0u8; values.len() * 4];
        FloatType::F32.narrow(values, &mut bytes);
        let rows = values.len() / columns;
        let scale_bytes = rows * scheme.scale_bytes(columns, FloatType::F32);
        let (mut weight, mut scales, mut biases) =
            (vec![0; rows * scheme.words(columns) * 4], vec![0; scale_bytes], vec![0; scale_bytes]);
        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
        mlx_format::quantize(scheme, FloatType::F32, columns, &bytes, out, false).unwrap();
        for numbers in [&mut scales, &mut biases] {
            let mut wide = vec![0f32; numbers.len() / 4];
            FloatType::F32.widen(numbers, &mut wide);
            for value in &mut wide {
                *value = float.round(*value);
            }
            FloatType::F32.narrow(&wide, numbers);
        }
        let packed = PackedRef { weight: &weight, scales: &scales, biases: &biases };
        mlx_format::dequantize(scheme, FloatType::F32, columns, packed, &mut bytes);
        let mut out = vec![0f32; values.len()];
        FloatType::F32.widen(&bytes, &mut out);
        out
    }

    fn difference(a: &[f32], b: &[f32], columns: usize) -> Tensor {
        let values: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        Tensor::from_vec(values, (a.len() / columns, columns), &cpu()).unwrap()
    }

    /// Every step lowers the error, at every width, group size and dtype of the format.
    #[test]
    fn each_refinement_lowers_the_error() {
        let (rows, columns) = (70, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let factor = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap().unwrap();
        let weights = gram.diagonal().unwrap();
        for bits in [2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
                    let scheme = Scheme::affine(bits, group).unwrap();
                    let loss = |decoded: &[f32]| gram.loss(&difference(&values, decoded, columns)).unwrap();
                    let by = |how| loss(&round(&values, columns, scheme, float, how).unwrap().decoded());
                    let compensated = |sweeps| How::Compensated { factor: &factor, block_size: 128, sweeps };
                    let losses = [
                        loss(&plain(&values, columns, scheme, float)),
                        by(How::Nearest { weights: &weights }),
                        by(compensated(0)),
                        by(compensated(1)),
                        by(compensated(3)),
                    ];
                    println!("{bits} bits, groups of {group}, {}: {losses:.5?}", float.name());
                    assert!(losses.is_sorted_by(|a, b| a > b), "{bits} {group} {float:?} {losses:?}");
                }
            }
        }
    }

    #[test]
    fn order_block_size_and_threads() {
        let (rows, columns) = (130, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let scheme = Scheme::affine(3, 64).unwrap();
        let forward = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap().unwrap();
        let groups = [2usize, 0, 3, 1];
        let order: Vec<usize> =
            groups.iter().flat_map(|group| (0..64).rev().map(move |at| group * 64 + at)).collect();
        let turned = Factor::new(&gram, order, 0.01).unwrap().unwrap();
        let by = |factor, block_size, threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let how = How::Compensated { factor, block_size, sweeps: 1 };
            pool.install(|| round(&values, columns, scheme, FloatType::Bf16, how).unwrap())
        };
        let first = by(&forward, 128, 1);
        assert_eq!(first, by(&forward, 128, 3), "threads decide nothing");
        let loss = |rounded: &Rounded| gram.loss(&difference(&values, &rounded.decoded(), columns)).unwrap();
        let plain = loss(
            &round(
                &values,
                columns,
                scheme,
                FloatType::Bf16,
                How::Nearest { weights: &gram.diagonal().unwrap() },
            )
            .unwrap(),
        );
        for rounded in [by(&forward, 100, 1), by(&forward, 4096, 1), by(&turned, 128, 1)] {
            assert!((loss(&rounded) / loss(&first) - 1.0).abs() < 0.03 && loss(&rounded) < plain);
        }
    }

    /// What a factor of another engine's is rounded with is what was read from it.
    #[test]
    fn a_factor_that_was_moved_counts() {
        let (rows, columns) = (70, 128);
        let values = numbers(rows * columns, 1);
        let scheme = Scheme::affine(3, 64).unwrap();
        let of = |tokens| Factor::new(&gram(columns, tokens), (0..columns).collect(), 0.01).unwrap().unwrap();
        let (factor, other) = (of(700), of(64));
        let (upper, hessian) = (factor.upper.to_vec().unwrap(), factor.hessian.to_vec().unwrap());
        let how = |factor| How::Compensated { factor, block_size: 128, sweeps: 1 };
        let here = round(&values, columns, scheme, FloatType::Bf16, how(&factor)).unwrap();
        let moved = how(&other).at_hand(Some((&upper, &hessian))).unwrap();
        assert_eq!(here, run(&values, columns, scheme, FloatType::Bf16, moved));
        assert_ne!(here, round(&values, columns, scheme, FloatType::Bf16, how(&other)).unwrap());
    }

    #[test]
    fn groups_without_range_and_zeros() {
        let columns = 64;
        let mut values = vec![0.25f32; 3 * columns];
        values[columns..2 * columns].fill(0.0);
        values[2 * columns..].fill(-3.0);
        let scheme = Scheme::affine(4, 64).unwrap();
        for float in [FloatType::F16, FloatType::Bf16] {
            let rounded =
                round(&values, columns, scheme, float, How::Nearest { weights: &[1.0; 64] }).unwrap();
            assert_eq!(rounded.decoded(), values, "{float:?}");
        }
    }
}
