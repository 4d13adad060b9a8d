//! Causal attention in tiles of queries: the scores of a tile with its keys are all that is ever in memory.

mod backward;
mod tiles;

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use self::tiles::{Attention, Strided, TILE_ROWS};
use super::made::{buffer, tensor};
use crate::Tensor;
use crate::error::Result;
use crate::exp::{exp, exponentials, largest, map_in_place, tanh, vectorised};
use crate::plain::Shapes;
use crate::settings::AttentionSettings;

pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
    let shapes = Shapes::of(q, k, v, settings)?;
    let own = Attention { window: settings.window, scale: settings.scale, softcap: settings.softcap };
    let sinks = settings.sinks.as_ref();
    let (keys, all_values) = (Strided::all(k)?, Strided::all(v)?);
    let out = own.forward(shapes, q.host()?, keys, all_values, sinks.map(Tensor::host).transpose()?);
    let shape = vec![shapes.batch, shapes.tokens, shapes.heads, v.dim(3)?];
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(sinks).collect();
    Ok(Tensor::made(q.device(), shape, buffer(out), "attention", &inputs, move |pull| {
        let (keys, all_values) = (Strided::all(&pull.inputs[1])?, Strided::all(&pull.inputs[2])?);
        let sinks = pull.inputs.get(3).map(Tensor::host).transpose()?;
        let gradients =
            own.backward(shapes, pull.inputs[0].host()?, keys, all_values, sinks, pull.grad.host()?);
        let all = [gradients.q, gradients.k, gradients.v, gradients.sinks];
        let like = |(values, input): (Vec<f32>, &Tensor)| tensor(values, input.dims(), input).map(Some);
        all.into_iter().zip(pull.inputs).map(like).collect()
    }))
}

impl Attention {
    fn forward(
        &self,
        shapes: Shapes,
        q: &[f32],
        keys: Strided<'_>,
        all_values: Strided<'_>,
        sinks: Option<&[f32]>,
    ) -> Vec<f32> {
        let Shapes { batch, tokens, heads, kv_heads } = shapes;
        let (d, dv, group) = (keys.features, all_values.features, heads / kv_heads);
        let window = self.window.unwrap_or(tokens);
        let tile = (TILE_ROWS / group).clamp(1, tokens.max(1));
        let mut out = vec![0.0; batch * tokens * heads * dv];
        let mut queries = vec![0.0; group * tile * d];
        let mut scores = vec![0.0; group * tile * tokens.min(window.saturating_add(tile))];
        let mut sums = vec![0.0; group * tile];
        let mut result = vec![0.0; group * tile * dv];
        for row in 0..batch * kv_heads {
            let (start, kv_head) = (row / kv_heads * tokens, row % kv_heads);
            for first in (0..tokens).step_by(tile) {
                let length = tile.min(tokens - first);
                let rows = group * length;
                let first_key = (first + 1).saturating_sub(window);
                let key_count = first + length - first_key;
                // Rows of a tile: head of the group, then token.
                for (i, to) in queries[..rows * d].chunks_exact_mut(d.max(1)).enumerate() {
                    let head = kv_head * group + i / length;
                    let from = ((start + first + i % length) * heads + head) * d;
                    for (to, from) in to.iter_mut().zip(&q[from..from + d]) {
                        *to = from * self.scale;
                    }
                }
                let scores = &mut scores[..rows * key_count];
                matmul(
                    MatMut::from_row_major_slice_mut(scores, rows, key_count),
                    Accum::Replace,
                    MatRef::from_row_major_slice(&queries[..rows * d], rows, d),
                    keys.of(kv_head, start + first_key, key_count).transpose(),
                    1.0,
                    Par::Seq,
                );
                vectorised(
                    #[inline(always)]
                    || {
                        for (i, row) in scores.chunks_exact_mut(key_count).enumerate() {
                            let token = first + i % length;
                            let seen = (token + 1).saturating_sub(window) - first_key..token + 1 - first_key;
                            let sink = sinks.map(|sinks| sinks[kv_head * group + i / length]);
                            sums[i] = self.weigh(row, seen, sink);
                        }
                    },
                );
                matmul(
                    MatMut::from_row_major_slice_mut(&mut result[..rows * dv], rows, dv),
                    Accum::Replace,
                    MatRef::from_row_major_slice(scores, rows, key_count),
                    all_values.of(kv_head, start + first_key, key_count),
                    1.0,
                    Par::Seq,
                );
                for (i, from) in result[..rows * dv].chunks_exact(dv.max(1)).enumerate() {
                    let head = kv_head * group + i / length;
                    let to = ((start + first + i % length) * heads + head) * dv;
                    let factor = 1.0 / sums[i];
                    for (to, from) in out[to..to + dv].iter_mut().zip(from) {
                        *to = from * factor;
                    }
                }
            }
        }
        out
    }

    /// Turns the scores that are seen into exponentials, the others into 0; returns the sum.
    #[inline(always)]
    fn weigh(&self, row: &mut [f32], seen: Range<usize>, sink: Option<f32>) -> f32 {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        let row = &mut row[seen];
        if let Some(cap) = self.softcap {
            map_in_place(
                row,
                #[inline(always)]
                |score| cap * tanh(score * (1.0 / cap)),
            );
        }
        let most = largest(row);
        match sink {
            Some(sink) => {
                let most = if sink > most { sink } else { most };
                exponentials(row, most) + exp(sink - most)
            }
            None => exponentials(row, most),
        }
    }
}
