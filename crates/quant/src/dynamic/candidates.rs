//! What each candidate of each layer costs, by its sensitivities: with the scales that will be used (searched under the layer's own column
//! weights), on enough of its rows.

use mlx_format::{FloatType, Scheme};
use mlx_quant_model::WeightsError;
use rayon::prelude::*;

use super::{Cost, Layer};
use crate::Error;
use crate::methods::{How, round};
use crate::observer::{Event, Observer, Unit};
use crate::walks::Walk;

/// Widths that are tried.
pub(super) const BITS: [u32; 6] = [2, 3, 4, 5, 6, 8];
/// Group sizes that are tried.
pub(super) const GROUP_SIZES: [usize; 3] = [32, 64, 128];
/// Elements of a layer (of an expert) on which a candidate is judged; of larger ones, rows are taken at equal distances.
pub(super) const ELEMENTS: usize = 1 << 18;

/// Rows of a matrix that stand for all, with what they are worth.
struct Sample {
    /// `[rows, columns]`, in the stored dtype.
    values: Vec<f32>,
    /// Of each row.
    worth: Vec<f32>,
    /// All rows' worth together by that of these.
    share: f64,
    /// Of the loss, `[columns]`.
    columns: Vec<f32>,
    /// Of the search, `[columns]`.
    search: Vec<f32>,
}

/// Fills in the costs of all layers.
pub(super) fn judge(
    walk: &Walk<'_>,
    layers: &mut [Layer],
    dtype: Option<FloatType>,
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<(), Error> {
    let total = layers.len() as u64;
    observer.event(Event::Phase { name: "candidates", unit: Unit::Layers, total, tokens: 0 });
    for (at, layer) in layers.iter_mut().enumerate() {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        observer.event(Event::Working { name: &layer.path });
        let float = dtype.unwrap_or_else(|| own_dtype(walk, &layer.path));
        layer.costs = pool.install(|| costs(walk, layer, float))?;
        observer.event(Event::Progress { done: at as u64 + 1 });
    }
    Ok(())
}

/// The dtype that a layer's weight has in the source.
fn own_dtype(walk: &Walk<'_>, path: &str) -> FloatType {
    let name = format!("{path}.weight");
    let view = walk.weights.named.tensors.iter().find(|(found, _)| *found == name);
    view.and_then(|(_, view)| FloatType::from_dtype(view.dtype)).unwrap_or(FloatType::F32)
}

/// Every candidate that fits so many columns.
pub(super) fn all(columns: usize) -> impl Iterator<Item = Scheme> {
    let every = BITS.into_iter().flat_map(|bits| GROUP_SIZES.map(|group_size| (bits, group_size)));
    let every = every.filter_map(|(bits, group_size)| Scheme::affine(bits, group_size).ok());
    every.filter(move |scheme| scheme.divides(columns))
}

fn costs(walk: &Walk<'_>, layer: &Layer, float: FloatType) -> Result<Vec<Cost>, Error> {
    walk.device.leave("errors of the candidate schemes", "they are those of samples of rows, soon rounded");
    let samples = samples(walk, layer, float)?;
    let columns = layer.shape.last().copied().unwrap_or(0);
    let cost = |scheme: Scheme| -> Result<Cost, WeightsError> {
        let costs = samples.iter().map(|sample| sample.cost(columns, scheme, float));
        let kl = costs.sum::<mlx_quant_engine::Result<f64>>()?;
        Ok(Cost {
            bits: scheme.bits(),
            group_size: scheme.group_size(),
            kl: f64::from(super::layer::short(kl)),
        })
    };
    // A sample has too few rows for all threads.
    Ok(all(columns).collect::<Vec<_>>().into_par_iter().map(cost).collect::<Result<_, _>>()?)
}

impl Sample {
    /// Half of the sum of `worth * columns * dW^2`.
    fn cost(&self, columns: usize, scheme: Scheme, float: FloatType) -> mlx_quant_engine::Result<f64> {
        let how = How::Nearest { weights: &self.search };
        let decoded = round(&self.values, columns, scheme, float, how)?.decoded();
        let rows = self.values.chunks_exact(columns).zip(decoded.chunks_exact(columns)).zip(&self.worth);
        let sum: f64 = rows
            .map(|((values, decoded), worth)| {
                let errors = values.iter().zip(decoded).zip(&self.columns);
                let error: f64 = errors.map(|((a, b), weight)| f64::from(weight * (a - b) * (a - b))).sum();
                f64::from(*worth) * error
            })
            .sum();
        Ok(0.5 * sum * self.share)
    }
}

/// Every `total / count`-th of so many rows.
fn spread(total: usize, columns: usize) -> Vec<usize> {
    let count = (ELEMENTS / columns.max(1)).clamp(64, total.max(64)).min(total);
    (0..count).map(|at| at * total / count.max(1)).collect()
}

fn samples(walk: &Walk<'_>, layer: &Layer, float: FloatType) -> Result<Vec<Sample>, Error> {
    let [rows, columns] = [1, 0].map(|at| layer.shape.iter().rev().nth(at).copied().unwrap_or(0));
    let read = |ids: &[u32]| -> Result<Vec<f32>, Error> {
        let rows = walk.weights.rows(&layer.path, ids, &walk.device)?;
        let values = rows.to_vec().map_err(WeightsError::from)?;
        walk.weights.release();
        Ok(values.into_iter().map(|value| float.round(value)).collect())
    };
    let mut samples = Vec::new();
    let search = layer.column_weights();
    for (expert, seen) in layer.seen.iter().enumerate() {
        let own = spread(rows, columns);
        let worth: Vec<f32> = own.iter().map(|row| seen.gradients[*row]).collect();
        let ids: Vec<u32> = own.iter().map(|row| (expert * rows + row) as u32).collect();
        let search = if layer.table.is_some() { &search[..] } else { &seen.inputs };
        samples.push(Sample {
            values: read(&ids)?,
            share: share(&seen.gradients, &worth),
            worth,
            columns: seen.inputs.clone(),
            search: search.to_vec(),
        });
    }
    if let Some(table) = &layer.table {
        let all: Vec<f32> = table.rows.iter().map(|row| row.1).collect();
        let own = spread(all.len(), columns);
        let worth: Vec<f32> = own.iter().map(|at| all[*at]).collect();
        let ids: Vec<u32> = own.iter().map(|at| table.rows[*at].0).collect();
        samples.push(Sample {
            values: read(&ids)?,
            share: share(&all, &worth),
            worth,
            columns: table.features.clone(),
            search,
        });
    }
    Ok(samples)
}

fn share(all: &[f32], sample: &[f32]) -> f64 {
    let sum = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
    let part = sum(sample);
    if part > 0.0 { sum(all) / part } else { 0.0 }
}
