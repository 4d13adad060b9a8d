//! Gradients of attention, in the tiles of the forward pass: scores are computed anew and never kept.
//!
//! With probabilities `P` and the gradient `G` of the output: `dV = P^T G`, `dP = G V^T`, `dS = P (dP - sum of P dP)`
//! row by row (a soft cap multiplies by `1 - (S / cap)^2`), `dQ = scale dS K`, `dK = scale dS^T Q` (Dao 2023,
//! arXiv 2307.08691, section 3.1).

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::tiles::{Attention, Strided, TILE_ROWS};
use crate::exp::{exp, exponentials, largest, sum_of_pairs, tanh, vectorised};
use crate::plain::Shapes;

/// With respect to everything that attention reads.
pub(super) struct Gradients {
    /// `[batch, tokens, heads, d]`.
    pub(super) q: Vec<f32>,
    /// `[batch, tokens, kv_heads, d]`.
    pub(super) k: Vec<f32>,
    /// `[batch, tokens, kv_heads, dv]`.
    pub(super) v: Vec<f32>,
    /// `[heads]`.
    pub(super) sinks: Vec<f32>,
}

/// `[rows, columns]` of one head from token `first` on, in memory `[tokens, heads, columns]`.
fn head_of(
    all: &mut [f32],
    (first, rows): (usize, usize),
    (head, heads): (usize, usize),
    columns: usize,
) -> MatMut<'_, f32> {
    let start = (first * heads + head) * columns;
    let end = start + (rows - 1) * heads * columns + columns;
    // faer 0.24's own row-major form of this swaps the strides.
    MatMut::from_column_major_slice_with_stride_mut(&mut all[start..end], columns, rows, heads * columns)
        .transpose_mut()
}

impl Attention {
    pub(super) fn backward(
        &self,
        shapes: Shapes,
        q: &[f32],
        keys: Strided<'_>,
        all_values: Strided<'_>,
        sinks: Option<&[f32]>,
        grad: &[f32],
    ) -> Gradients {
        let Shapes { batch, tokens, heads, kv_heads } = shapes;
        let (d, dv, group) = (keys.features, all_values.features, heads / kv_heads);
        let window = self.window.unwrap_or(tokens);
        let tile = (TILE_ROWS / group).clamp(1, tokens.max(1));
        let mut out = Gradients {
            q: vec![0.0; q.len()],
            k: vec![0.0; batch * tokens * kv_heads * d],
            v: vec![0.0; batch * tokens * kv_heads * dv],
            sinks: vec![0.0; if sinks.is_some() { heads } else { 0 }],
        };
        let most = group * tile * tokens.min(window.saturating_add(tile));
        let [mut scores, mut slopes] = [0, 1].map(|_| vec![0.0; most]);
        let [mut queries, mut for_queries] = [0, 1].map(|_| vec![0.0; group * tile * d]);
        let mut gradients = vec![0.0; group * tile * dv];
        for row in 0..batch * kv_heads {
            let (start, kv_head) = (row / kv_heads * tokens, row % kv_heads);
            for first in (0..tokens).step_by(tile) {
                let length = tile.min(tokens - first);
                let rows = group * length;
                let first_key = (first + 1).saturating_sub(window);
                let key_count = first + length - first_key;
                let place = |i: usize| (start + first + i % length) * heads + kv_head * group + i / length;
                for (i, to) in queries[..rows * d].chunks_exact_mut(d.max(1)).enumerate() {
                    for (to, from) in to.iter_mut().zip(&q[place(i) * d..][..d]) {
                        *to = from * self.scale;
                    }
                }
                for (i, to) in gradients[..rows * dv].chunks_exact_mut(dv.max(1)).enumerate() {
                    to.copy_from_slice(&grad[place(i) * dv..][..dv]);
                }
                let (scores, slopes) = (&mut scores[..rows * key_count], &mut slopes[..rows * key_count]);
                let query_rows = MatRef::from_row_major_slice(&queries[..rows * d], rows, d);
                let gradient_rows = MatRef::from_row_major_slice(&gradients[..rows * dv], rows, dv);
                let own_keys = keys.of(kv_head, start + first_key, key_count);
                let own_values = all_values.of(kv_head, start + first_key, key_count);
                multiply(scores, (rows, key_count), query_rows, own_keys.transpose());
                multiply(slopes, (rows, key_count), gradient_rows, own_values.transpose());
                vectorised(
                    #[inline(always)]
                    || {
                        let both = scores.chunks_exact_mut(key_count).zip(slopes.chunks_exact_mut(key_count));
                        for (i, (scores, slopes)) in both.enumerate() {
                            let token = first + i % length;
                            let seen = (token + 1).saturating_sub(window) - first_key..token + 1 - first_key;
                            let head = kv_head * group + i / length;
                            for row in [&mut *scores, &mut *slopes] {
                                row[..seen.start].fill(0.0);
                                row[seen.end..].fill(0.0);
                            }
                            let (scores, slopes) = (&mut scores[seen.clone()], &mut slopes[seen]);
                            let for_sink = self.turn(scores, slopes, sinks.map(|sinks| sinks[head]));
                            if let Some(sum) = out.sinks.get_mut(head) {
                                *sum += for_sink;
                            }
                        }
                    },
                );
                // Scores are probabilities now, slopes the gradient with respect to the scores.
                let probabilities = MatRef::from_row_major_slice(scores, rows, key_count);
                let slopes = MatRef::from_row_major_slice(slopes, rows, key_count);
                let at = (start + first_key, key_count);
                let for_v = head_of(&mut out.v, at, (kv_head, kv_heads), dv);
                matmul(for_v, Accum::Add, probabilities.transpose(), gradient_rows, 1.0, Par::Seq);
                let for_k = head_of(&mut out.k, at, (kv_head, kv_heads), d);
                matmul(for_k, Accum::Add, slopes.transpose(), query_rows, 1.0, Par::Seq);
                multiply(&mut for_queries[..rows * d], (rows, d), slopes, own_keys);
                for (i, from) in for_queries[..rows * d].chunks_exact(d.max(1)).enumerate() {
                    for (to, from) in out.q[place(i) * d..][..d].iter_mut().zip(from) {
                        *to = from * self.scale;
                    }
                }
            }
        }
        out
    }

    /// Of one row's seen keys: scores become probabilities, gradients of probabilities those of scores. Gives the
    /// sink's gradient.
    #[inline(always)]
    fn turn(&self, scores: &mut [f32], slopes: &mut [f32], sink: Option<f32>) -> f32 {
        if let Some(cap) = self.softcap {
            for score in &mut *scores {
                *score = cap * tanh(*score * (1.0 / cap));
            }
        }
        // The cap's slope is needed after the scores are gone.
        let caps: Vec<f32> = match self.softcap {
            Some(cap) => scores.iter().map(|score| 1.0 - (score / cap) * (score / cap)).collect(),
            None => Vec::new(),
        };
        let most = largest(scores);
        let most = sink.map_or(most, |sink| if sink > most { sink } else { most });
        let held = sink.map_or(0.0, |sink| exp(sink - most));
        let factor = 1.0 / (exponentials(scores, most) + held);
        for score in &mut *scores {
            *score *= factor;
        }
        let mean = sum_of_pairs(scores, slopes, |p, g| p * g);
        for (score, slope) in scores.iter().zip(&mut *slopes) {
            *slope = score * (*slope - mean);
        }
        for (slope, cap) in slopes.iter_mut().zip(&caps) {
            *slope *= cap;
        }
        -held * factor * mean
    }
}

fn multiply(out: &mut [f32], (m, n): (usize, usize), x: MatRef<'_, f32>, y: MatRef<'_, f32>) {
    matmul(MatMut::from_row_major_slice_mut(out, m, n), Accum::Replace, x, y, 1.0, Par::Seq);
}
