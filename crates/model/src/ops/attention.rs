//! Causal attention in tiles of queries: the scores of a tile with its keys are all that is ever in memory.

mod backward;

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::exp::{exp, exponentials, largest, map_in_place, tanh, vectorised};
use super::slices::{Held, values};
use backward::Gradients;

/// What an attention layer does besides the scaled dot product.
#[derive(Clone, Debug)]
pub struct AttentionSettings {
    /// Factor of the scores.
    pub scale: f32,
    /// Each token sees itself and `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(scores / cap)` before masking.
    pub softcap: Option<f32>,
    /// A logit for each head, `[heads]`, that takes part in the softmax and has no value (gpt-oss).
    pub sinks: Option<Tensor>,
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shapes {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
}

impl Shapes {
    pub(super) fn of(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Self> {
        let shapes = match (q.dims(), k.dims(), v.dims()) {
            (&[batch, tokens, heads, d], &[kb, kt, kv_heads, kd], &[vb, vt, vh, dv])
                if (kb, kt, kd) == (batch, tokens, d)
                    && (vb, vt, vh) == (batch, tokens, kv_heads)
                    && [heads, kv_heads, d, dv].iter().all(|size| *size > 0)
                    && heads.is_multiple_of(kv_heads) =>
            {
                Self { batch, tokens, heads, kv_heads }
            }
            (q, k, v) => bail!("attention: q {q:?}, k {k:?} and v {v:?} do not fit together"),
        };
        if let Some(sinks) = &settings.sinks
            && sinks.dims() != [shapes.heads]
        {
            bail!("attention: sinks {:?} for {} heads", sinks.dims(), shapes.heads);
        }
        if settings.window == Some(0) {
            bail!("attention: a window of no tokens");
        }
        Ok(shapes)
    }
}

/// 0 where a token sees another, minus infinity elsewhere: `[tokens, tokens]`.
fn mask(tokens: usize, window: Option<usize>, like: &Tensor) -> Result<Tensor> {
    let window = window.unwrap_or(tokens);
    let sees = |to: usize, from: usize| from <= to && to - from < window;
    let values: Vec<f32> = (0..tokens * tokens)
        .map(|i| if sees(i / tokens, i % tokens) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(values, (tokens, tokens), like.device())
}

pub(super) fn plain(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
    let Shapes { batch, tokens, heads, kv_heads } = Shapes::of(q, k, v, settings)?;
    let (d, dv, group) = (q.dim(3)?, v.dim(3)?, heads / kv_heads);
    let q = q.transpose(1, 2)?.contiguous()?.reshape((batch * kv_heads, group * tokens, d))?;
    let k = k.transpose(1, 2)?.contiguous()?.reshape((batch * kv_heads, tokens, d))?;
    let v = v.transpose(1, 2)?.contiguous()?.reshape((batch * kv_heads, tokens, dv))?;
    let scores = (q.matmul(&k.t()?)? * f64::from(settings.scale))?.reshape((batch, heads, tokens, tokens))?;
    let scores = match settings.softcap.map(f64::from) {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let mut scores = scores.broadcast_add(&mask(tokens, settings.window, &scores)?)?;
    if let Some(sinks) = &settings.sinks {
        let sinks = sinks.reshape((1, heads, 1, 1))?.broadcast_as((batch, heads, tokens, 1))?;
        scores = Tensor::cat(&[scores, sinks], 3)?;
    }
    let weights = super::loss::softmax_plain(&scores)?.narrow(D::Minus1, 0, tokens)?.contiguous()?;
    let weights = weights.reshape((batch * kv_heads, group * tokens, tokens))?;
    weights.matmul(&v)?.reshape((batch, heads, tokens, dv))?.transpose(1, 2)?.contiguous()
}

pub(super) fn fused(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
    let q = q.contiguous()?;
    let without_sinks = AttentionSettings { sinks: None, ..*settings };
    let op = Attention { settings: without_sinks, key_features: k.dim(3)? };
    match &settings.sinks {
        None => q.apply_op3(&k.contiguous()?, &v.contiguous()?, op),
        // An operation of candle has three inputs at most.
        Some(sinks) => q.apply_op3(&Tensor::cat(&[k, v], 3)?.contiguous()?, &sinks.contiguous()?, op),
    }
}

/// Of `q, k, v`, or of `q`, `k` and `v` side by side, and sinks.
struct Attention {
    settings: AttentionSettings,
    key_features: usize,
}

/// Keys or values: those of a token lie `token` apart, those of a head `head`.
#[derive(Clone, Copy)]
struct Strided<'a> {
    values: &'a [f32],
    token: usize,
    head: usize,
    features: usize,
}

impl<'a> Strided<'a> {
    /// `[tokens, features]` of one head of one batch row, `first` being counted through the batch.
    fn of(self, head: usize, first: usize, tokens: usize) -> MatRef<'a, f32> {
        let start = first * self.token + head * self.head;
        let end = start + (tokens - 1) * self.token + self.features;
        MatRef::from_row_major_slice_with_stride(&self.values[start..end], tokens, self.features, self.token)
    }
}

/// About as many rows of queries as the matmul needs to be fast; more would meet more masked keys.
const TILE_ROWS: usize = 128;

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
        let window = self.settings.window.unwrap_or(tokens);
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
                        *to = from * self.settings.scale;
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
        if let Some(cap) = self.settings.softcap {
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

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, tokens, heads, d) = ql.shape().dims4()?;
        let (_, _, kv_heads, width) = kl.shape().dims4()?;
        let shapes = Shapes { batch, tokens, heads, kv_heads };
        let (q, k, v) = (values(q, ql)?, values(k, kl)?, values(v, vl)?);
        let keys = Strided { values: k, token: kv_heads * width, head: width, features: d };
        let (out, dv) = if vl.dims().len() == 1 {
            let dv = width - self.key_features;
            let all_values = Strided { values: k.get(d..).unwrap_or(&[]), features: dv, ..keys };
            (self.forward(shapes, q, keys, all_values, Some(v)), dv)
        } else {
            let dv = vl.shape().dims4()?.3;
            let all_values = Strided { values: v, token: kv_heads * dv, head: dv, features: dv };
            (self.forward(shapes, q, keys, all_values, None), dv)
        };
        Ok((CpuStorage::F32(out), (batch, tokens, heads, dv).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (batch, tokens, heads, d) = q.dims4()?;
        let (_, _, kv_heads, width) = k.dims4()?;
        let shapes = Shapes { batch, tokens, heads, kv_heads };
        let held = [q, k, v, &grad].map(Held::new);
        let [q_values, k_values, v_values, grads] = [0, 1, 2, 3].map(|at| held[at].values());
        let (q_values, k_values, v_values, grads) = (q_values?, k_values?, v_values?, grads?);
        let keys = Strided { values: k_values, token: kv_heads * width, head: width, features: d };
        let gradients = if v.rank() == 1 {
            let dv = width - self.key_features;
            let all_values = Strided { values: k_values.get(d..).unwrap_or(&[]), features: dv, ..keys };
            self.backward(shapes, q_values, keys, all_values, Some(v_values), grads)
        } else {
            let dv = v.dim(3)?;
            let all_values = Strided { values: v_values, token: kv_heads * dv, head: dv, features: dv };
            self.backward(shapes, q_values, keys, all_values, None, grads)
        };
        let Gradients { q: for_q, k: for_k, v: for_v, sinks } = gradients;
        let dv = grad.dim(3)?;
        let like = |values: Vec<f32>, shape: (usize, usize, usize, usize)| {
            Tensor::from_vec(values, shape, q.device())
        };
        let for_q = like(for_q, (batch, tokens, heads, d))?;
        let for_k = like(for_k, (batch, tokens, kv_heads, d))?;
        let for_v = like(for_v, (batch, tokens, kv_heads, dv))?;
        if v.rank() == 1 {
            let sinks = Tensor::from_vec(sinks, heads, q.device())?;
            return Ok((Some(for_q), Some(Tensor::cat(&[for_k, for_v], 3)?), Some(sinks)));
        }
        Ok((Some(for_q), Some(for_k), Some(for_v)))
    }
}
