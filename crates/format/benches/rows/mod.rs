//! Rows spread over the threads of a pool, as a program that uses the crate does it.

use mlx_format::{FloatType, NonFinite, PackedMut, Scheme};
use rayon::prelude::*;

/// Bytes of input that one task takes.
const TASK_BYTES: usize = 256 << 10;

/// [`mlx_format::quantize`] on all threads of the current pool.
///
/// # Errors
/// NaN or infinity; the element is counted from the beginning of its task.
pub(crate) fn quantize(
    scheme: Scheme,
    float: FloatType,
    columns: usize,
    weights: &[u8],
    out: PackedMut<'_>,
) -> Result<(), NonFinite> {
    let rows = (TASK_BYTES / (columns * float.size())).max(1);
    let scale_bytes = rows * scheme.scale_bytes(columns, float);
    // Empty biases (fp modes) cannot be cut alongside.
    let mut biases: Vec<&mut [u8]> =
        if scheme.has_biases() { out.biases.chunks_mut(scale_bytes).collect() } else { Vec::new() };
    biases.resize_with(out.scales.len().div_ceil(scale_bytes), Default::default);
    weights
        .par_chunks(rows * columns * float.size())
        .zip(out.weight.par_chunks_mut(rows * scheme.words(columns) * 4))
        .zip(out.scales.par_chunks_mut(scale_bytes))
        .zip(biases)
        .try_for_each(|(((weights, weight), scales), biases)| {
            mlx_format::quantize(scheme, float, columns, weights, PackedMut { weight, scales, biases }, false)
        })
}
