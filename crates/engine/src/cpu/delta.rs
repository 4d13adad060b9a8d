//! The gated delta rule: linear attention whose state is corrected towards each new value.
//!
//! Made of elementary operations it passes over the whole state six times a token, each time in new memory. Columns of
//! the state never meet, so here [`COLUMNS`] of them go through all tokens together: what is worked on stays in the
//! first-level cache.

use super::made::buffer;
use crate::Tensor;
use crate::error::Result;
use crate::exp::vectorised;

/// Columns of the state that go through the tokens together.
const COLUMNS: usize = 32;

pub(super) fn gated_delta(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    decay: &Tensor,
    beta: &Tensor,
) -> Result<Tensor> {
    crate::plain::check_delta(q, k, v, decay, beta)?;
    let (batch, tokens, heads, key_dim) = k.dims4()?;
    let value_dim = v.dim(3)?;
    let (q_values, k_values, decays, betas) = (q.host()?, k.host()?, decay.host()?, beta.host()?);
    let v_values = v.host()?;
    let source = Source {
        q: q_values,
        k: k_values,
        v: v_values,
        decay: decays,
        beta: betas,
        tokens,
        heads,
        key_dim,
        value_dim,
        decays: if decay.rank() == 4 { key_dim } else { 1 },
    };
    let mut out = vec![0f32; batch * tokens * heads * value_dim];
    let mut state = vec![[0f32; COLUMNS]; key_dim];
    vectorised(
        #[inline(always)]
        || {
            for window in 0..batch {
                for head in 0..heads {
                    for first in (0..value_dim).step_by(COLUMNS) {
                        state.fill([0.0; COLUMNS]);
                        source.columns(window, head, first, &mut state, &mut out);
                    }
                }
            }
        },
    );
    let inputs = [q, k, v, decay, beta];
    // Backwards through the elementary operations, computed anew.
    Ok(Tensor::made(v.device(), v.dims().to_vec(), buffer(out), "gated delta", &inputs, |pull| {
        let all: Vec<Tensor> = pull.inputs.iter().map(Tensor::variable).collect();
        let y = crate::plain::gated_delta(&all[0], &all[1], &all[2], &all[3], &all[4])?;
        let gradients = y.gradients(pull.grad)?;
        Ok(all.iter().map(|input| gradients.get(input).cloned()).collect())
    }))
}

/// The arguments as slices, row-major, and their sizes.
struct Source<'s> {
    q: &'s [f32],
    k: &'s [f32],
    v: &'s [f32],
    decay: &'s [f32],
    beta: &'s [f32],
    tokens: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// Of a head: 1, or `key_dim`.
    decays: usize,
}

impl Source<'_> {
    /// Columns `first..first + COLUMNS` of one head of one window, through all tokens. Those beyond the last
    /// column are zeros, which stay zeros.
    #[inline(always)]
    fn columns(
        &self,
        window: usize,
        head: usize,
        first: usize,
        state: &mut [[f32; COLUMNS]],
        out: &mut [f32],
    ) {
        let count = COLUMNS.min(self.value_dim - first);
        for token in 0..self.tokens {
            let at = (window * self.tokens + token) * self.heads + head;
            let [q, k] = [self.q, self.k].map(|all| &all[at * self.key_dim..][..self.key_dim]);
            let beta = self.beta[at];
            // Of a row of the state the one of its own, or the head's.
            let decays = &self.decay[at * self.decays..][..self.decays];
            let place = at * self.value_dim + first;
            let mut change = [0f32; COLUMNS];
            change[..count].copy_from_slice(&self.v[place..][..count]);
            let mut remembered = [0f32; COLUMNS];
            for (feature, (row, key)) in state.iter_mut().zip(k).enumerate() {
                let decay = decays[feature.min(decays.len() - 1)];
                for (element, sum) in row.iter_mut().zip(&mut remembered) {
                    *element *= decay;
                    *sum += *element * key;
                }
            }
            for (change, remembered) in change.iter_mut().zip(&remembered) {
                *change = (*change - remembered) * beta;
            }
            let mut output = [0f32; COLUMNS];
            for ((row, key), query) in state.iter_mut().zip(k).zip(q) {
                for ((element, change), sum) in row.iter_mut().zip(&change).zip(&mut output) {
                    *element += key * change;
                    *sum += *element * query;
                }
            }
            out[place..][..count].copy_from_slice(&output[..count]);
        }
    }
}
