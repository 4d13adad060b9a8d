//! Attention and the gated delta rule, all tokens of a window at once.

use crate::error::{Result, bail};
use crate::settings::AttentionSettings;
use crate::{LAST, Tensor};

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shapes {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
}

impl Shapes {
    pub(crate) fn of(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Self> {
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

pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
    let Shapes { batch, tokens, heads, kv_heads } = Shapes::of(q, k, v, settings)?;
    let (d, dv, group) = (q.dim(LAST)?, v.dim(LAST)?, heads / kv_heads);
    let q = q.transpose(1, 2)?.reshape((batch * kv_heads, group * tokens, d))?;
    let k = k.transpose(1, 2)?.reshape((batch * kv_heads, tokens, d))?;
    let v = v.transpose(1, 2)?.reshape((batch * kv_heads, tokens, dv))?;
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
    let weights = super::softmax(&scores)?.narrow(LAST, 0, tokens)?;
    let weights = weights.reshape((batch * kv_heads, group * tokens, tokens))?;
    weights.matmul(&v)?.reshape((batch, heads, tokens, dv))?.transpose(1, 2)
}

/// Refuses inputs of the gated delta rule that do not fit together.
pub(crate) fn check_delta(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Tensor, beta: &Tensor) -> Result<()> {
    let fits = match (k.dims(), v.dims()) {
        ([batch, tokens, heads, _], [.., value_dim]) => {
            q.dims() == k.dims()
                && v.dims() == [*batch, *tokens, *heads, *value_dim]
                && beta.dims() == [*batch, *tokens, *heads]
                && (decay.dims() == beta.dims() || decay.dims() == k.dims())
        }
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let [q, k, v, decay, beta] = [q, k, v, decay, beta].map(Tensor::dims);
    bail!("gated_delta: q {q:?}, k {k:?}, v {v:?}, decay {decay:?} and beta {beta:?} do not fit together")
}

pub(crate) fn gated_delta(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    decay: &Tensor,
    beta: &Tensor,
) -> Result<Tensor> {
    check_delta(q, k, v, decay, beta)?;
    let (batch, tokens, heads, key_dim) = k.dims4()?;
    let value_dim = v.dim(3)?;
    let decay = if decay.rank() == 3 { decay.unsqueeze(3)? } else { decay.clone() }; // [b, t, h, 1] or [b, t, h, k]
    let mut state = Tensor::full(0.0, (batch, heads, key_dim, value_dim), v.device())?;
    let mut outputs = Vec::with_capacity(tokens);
    for token in 0..tokens {
        let at = |x: &Tensor| x.narrow(1, token, 1)?.squeeze(1);
        let column = |x: &Tensor| at(x)?.unsqueeze(3); // [b, h, k, 1]
        let scalar = |x: &Tensor| at(x)?.unsqueeze(2); // [b, h, 1]
        state = state.broadcast_mul(&column(&decay)?)?;
        let key = column(k)?;
        let remembered = state.broadcast_mul(&key)?.sum(2)?; // [b, h, v]
        let change = (at(v)? - remembered)?.broadcast_mul(&scalar(beta)?)?;
        state = (state + key.broadcast_mul(&change.unsqueeze(2)?)?)?;
        outputs.push(state.broadcast_mul(&column(q)?)?.sum(2)?);
    }
    Tensor::stack(&outputs, 1)
}
