//! Causal attention in tiles of queries: the scores of a tile with its keys are all that is ever in memory.

use candle_core::{D, Result, Tensor, bail};

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
            (&[batch, tokens, heads, d], &[kb, kt, kv_heads, kd], &[vb, vt, vh, _])
                if (kb, kt, kd) == (batch, tokens, d)
                    && (vb, vt, vh) == (batch, tokens, kv_heads)
                    && kv_heads > 0
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
    plain(q, k, v, settings)
}
