//! All rows of a weight, a task for every few of them.

use mlx_format::{FloatType, Scheme};
use rayon::prelude::*;

use super::rounded::Rounded;
use super::task::Task;
use super::way::{ROWS, Way};

/// Rounds a weight `[rows, columns]` on the current rayon pool.
///
/// # Panics
/// If the scheme is not affine or the lengths do not fit together.
pub(crate) fn run(values: &[f32], columns: usize, scheme: Scheme, float: FloatType, way: Way<'_>) -> Rounded {
    assert!(scheme.has_biases() && scheme.divides(columns), "{columns} columns at {scheme}");
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
    rounded
}
