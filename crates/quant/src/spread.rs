//! nvfp4 whose scales are spread over a float32 for each of stacked experts: `global_scale` of mlx_lm's `quantize_model`
//! (`mlx_lm/models/switch_layers.py`, `_quantize_experts`).
//!
//! Scales of nvfp4 are e4m3, which has its full precision from 2^-6 to 448 alone. With `g`, the largest magnitude of an
//! expert, the stored scale is `scale * 2688 / g`, so that the group of the largest magnitude has 448.

use mlx_format::{FloatType, NonFinite, PackedMut, fp};
use rayon::prelude::*;

use crate::Model;
use crate::plan::{Item, Job};

/// Bytes of rows that are looked at together.
const CHUNK_BYTES: usize = 1 << 20;

/// The largest magnitude of each expert of a stacked layer, in the dtype that is quantized, on the current rayon pool:
/// `[experts]`. 1 for an expert of zeros, where MLX's own 0 would make its scales NaN. What is not finite is left to
/// whoever rounds it.
pub(crate) fn globals(model: &Model, item: &Item) -> Vec<f32> {
    let Job::Quantize { view, float, .. } = &item.job else { return Vec::new() };
    let experts = view.shape()[0];
    let height = view.rows() / experts.max(1);
    let step = (CHUNK_BYTES / view.row_bytes().max(1)).max(1);
    let from = FloatType::from_dtype(view.dtype).unwrap_or(*float);
    let of_expert = |expert: usize| {
        let (mut values, mut most) = (Vec::new(), 0f32);
        let end = (expert + 1) * height;
        for start in (expert * height..end).step_by(step) {
            let bytes = view.rows_of(&model.checkpoint, start..end.min(start + step));
            values.resize(bytes.len() / from.size(), 0.0);
            from.widen(&bytes, &mut values);
            if let Some(change) = &view.change {
                change.apply(&mut values, start, view.columns(), Some(from));
            }
            most = values.iter().fold(most, |most, value| most.max(value.abs()));
        }
        // Rounding keeps order: the largest of the rounded is the largest, rounded.
        let most = float.round(most);
        if most > 0.0 { most } else { 1.0 }
    };
    let globals = (0..experts).into_par_iter().map(of_expert).collect();
    model.checkpoint.release();
    globals
}

/// Rows from `first` on of a stacked layer, `[rows, columns]` in dtype `float`, each expert of `height` rows by its own
/// number of `globals`.
///
/// # Errors
/// [`NonFinite`] at the first NaN or infinity.
pub(crate) fn quantize(
    float: FloatType,
    columns: usize,
    bytes: &[u8],
    (globals, height): (&[f32], usize),
    first: usize,
    out: PackedMut<'_>,
) -> Result<(), NonFinite> {
    let row = columns * float.size();
    let count = bytes.len() / row;
    let (words, scales) = (out.weight.len() / count.max(1), out.scales.len() / count.max(1));
    let mut start = 0;
    while start < count {
        let expert = (first + start) / height;
        let end = count.min((expert + 1) * height - first);
        let own = PackedMut {
            weight: &mut out.weight[start * words..end * words],
            scales: &mut out.scales[start * scales..end * scales],
            biases: &mut [],
        };
        let rows = &bytes[start * row..end * row];
        fp::quantize_nvfp4_global(float, rows, globals[expert], own)
            .map_err(|found| NonFinite { element: found.element + start * columns, ..found })?;
        start = end;
    }
    Ok(())
}
