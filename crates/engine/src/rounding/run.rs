//! All rows of a weight, a task for every few of them.

use mlx_format::fp::scale_of;
use mlx_format::{FloatType, PackedMut, Scheme};
use rayon::prelude::*;

use super::rounded::Rounded;
use super::task::Task;
use super::way::{ROWS, Way};

/// Rounds a weight `[rows, columns]` on the current rayon pool.
///
/// # Panics
/// If the lengths do not fit together.
pub(crate) fn run(values: &[f32], columns: usize, scheme: Scheme, float: FloatType, way: Way<'_>) -> Rounded {
    assert!(scheme.divides(columns), "{columns} columns at {scheme}");
    if let (Way::Plain, false) = (way, scheme.has_biases()) {
        return plain(values, columns, scheme, float);
    }
    let groups = columns / scheme.group_size();
    let rows = values.len() / columns;
    let mut rounded = Rounded {
        scheme,
        columns,
        codes: vec![0; rows * columns],
        scales: vec![0.0; rows * groups],
        biases: vec![0.0; rows * groups],
    };
    let codes = rounded.codes.par_chunks_mut(ROWS * columns);
    let scales = rounded.scales.par_chunks_mut(ROWS * groups);
    let biases = rounded.biases.par_chunks_mut(ROWS * groups);
    values.par_chunks(ROWS * columns).zip(codes).zip(scales.zip(biases)).for_each(
        |((values, codes), (scales, biases))| {
            let mut task = Task::new(values, columns, scheme, float, way);
            task.run(way);
            task.give(way, codes, scales, biases);
        },
    );
    if !scheme.has_biases() {
        rounded.biases = Vec::new();
    }
    rounded
}

/// An fp mode as `mx.quantize` rounds weights of dtype `float`: the same bytes.
fn plain(values: &[f32], columns: usize, scheme: Scheme, float: FloatType) -> Rounded {
    let (rows, groups) = (values.len() / columns, columns / scheme.group_size());
    let mut rounded = Rounded {
        scheme,
        columns,
        codes: vec![0; rows * columns],
        scales: vec![0.0; rows * groups],
        biases: Vec::new(),
    };
    let codes = rounded.codes.par_chunks_mut(ROWS * columns);
    let scales = rounded.scales.par_chunks_mut(ROWS * groups);
    values.par_chunks(ROWS * columns).zip(codes).zip(scales).for_each(|((values, codes), scales)| {
        let mut wide = vec![0u8; values.len() * float.size()];
        float.narrow(values, &mut wide);
        let mut weight = vec![0u8; values.len() / columns * scheme.words(columns) * 4];
        let mut bytes = vec![0u8; scales.len()];
        let out = PackedMut { weight: &mut weight, scales: &mut bytes, biases: &mut [] };
        // What is not finite is stored as MLX stores it; sources are checked when they are read.
        let _ = mlx_format::quantize(scheme, float, columns, &wide, out, true);
        mlx_format::unpack(scheme, &weight, codes);
        scales.iter_mut().zip(&bytes).for_each(|(scale, byte)| *scale = scale_of(scheme.mode(), *byte));
    });
    rounded
}
