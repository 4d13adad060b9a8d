//! Linear attention with a decay, token by token, and its gradients in terms of itself.

use crate::Tensor;
use crate::error::{Result, bail};
use crate::tensor::Pulled;

/// Refuses inputs of linear attention that do not fit together.
pub(crate) fn check_linear_attention(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<()> {
    let fits = match (k.dims(), v.dims()) {
        ([batch, tokens, groups, _], [.., heads, _]) => {
            q.dims() == k.dims()
                && v.dims()[..v.rank() - 1] == [*batch, *tokens, *heads]
                && log_decay.dims() == [*batch, *tokens, *heads]
                && *groups > 0
                && heads.is_multiple_of(*groups)
        }
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let [q, k, v, log_decay] = [q, k, v, log_decay].map(Tensor::dims);
    bail!("linear_attention: q {q:?}, k {k:?}, v {v:?} and log_decay {log_decay:?} do not fit together")
}

pub(crate) fn linear_attention(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
    check_linear_attention(q, k, v, log_decay)?;
    let (batch, tokens, groups, key_dim) = k.dims4()?;
    let (heads, value_dim) = (v.dim(2)?, v.dim(3)?);
    let decay = log_decay.exp()?;
    let mut state = Tensor::full(0.0, (batch, heads, key_dim, value_dim), v.device())?;
    let mut outputs = Vec::with_capacity(tokens);
    for token in 0..tokens {
        let at = |x: &Tensor| x.narrow(1, token, 1)?.squeeze(1);
        // [b, h, k, 1], a group's features for each of its heads.
        let column = |x: &Tensor| {
            let shape = [batch, groups, heads / groups, key_dim];
            at(x)?.unsqueeze(2)?.broadcast_as(shape)?.reshape((batch, heads, key_dim, 1))
        };
        let decay = at(&decay)?.reshape((batch, heads, 1, 1))?;
        state = (state.broadcast_mul(&decay)? + column(k)?.broadcast_mul(&at(v)?.unsqueeze(2)?)?)?;
        outputs.push(state.broadcast_mul(&column(q)?)?.sum(2)?);
    }
    Tensor::stack(&outputs, 1)
}

/// One way through all tokens: `S = decay * S + k v^T`, `o = S^T q`. Backwards it begins at the last token, and the decay
/// is that of the token behind. `q`, `k` and `v` may each have fewer heads than `decay`, which then share them.
pub(crate) struct Way<'w> {
    pub(crate) q: &'w Tensor,
    pub(crate) k: &'w Tensor,
    pub(crate) v: &'w Tensor,
    pub(crate) decay: &'w Tensor,
    pub(crate) backwards: bool,
}

/// Gradients of linear attention by an engine's own way through the tokens, which gives `[batch, tokens, heads, values]`.
///
/// With `d` the gradient of `o`, the gradient of the state is `G = q d^T + decay of the next token * G of it`: a state of
/// its own, on the way back. So for q `S d`, for k `G v` and for v `G^T k` are linear attention with other names. For the
/// logarithm of the decay it is the sum of `q . (S d) - k . (G v)` over this token and all later ones: what of a token's
/// state was there before it (the gradient of gated linear attention, arXiv 2312.06635, section 4.4).
pub(crate) fn linear_attention_gradients(
    [q, k, v, log_decay]: [&Tensor; 4],
    grad: &Tensor,
    wanted: &[bool],
    run: impl Fn(&Way<'_>) -> Result<Tensor>,
) -> Pulled {
    let decay = &log_decay.exp()?;
    let for_q = run(&Way { q: grad, k: v, v: k, decay, backwards: false })?;
    let for_k = run(&Way { q: v, k: grad, v: q, decay, backwards: true })?;
    let for_v = run(&Way { q: k, k: q, v: grad, decay, backwards: true })?;
    let (batch, tokens, groups, key_dim) = k.dims4()?;
    let heads = v.dim(2)?;
    let by_group = |x: &Tensor| x.reshape([batch, tokens, groups, heads / groups, key_dim]);
    let for_decay = if wanted[3] {
        let along =
            |x: &Tensor, gradient: &Tensor| by_group(gradient)?.broadcast_mul(&x.unsqueeze(3)?)?.sum(4);
        let own = (along(q, &for_q)? - along(k, &for_k)?)?.reshape((batch, tokens, 1, heads))?;
        // A state of one row that nothing fades.
        let one = &Tensor::full(1.0, (batch, tokens, 1, 1), v.device())?;
        let same = &Tensor::full(1.0, (batch, tokens, 1), v.device())?;
        let sums = run(&Way { q: one, k: one, v: &own, decay: same, backwards: true })?;
        Some(sums.reshape((batch, tokens, heads))?)
    } else {
        None
    };
    let summed = |x: &Tensor| by_group(x)?.sum(3);
    Ok(vec![Some(summed(&for_q)?), Some(summed(&for_k)?), Some(for_v), for_decay])
}
