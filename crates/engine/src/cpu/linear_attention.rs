//! Linear attention with a decay.
//!
//! Columns of the state never meet, so [`COLUMNS`] of them go through all tokens together: what is worked on stays in the
//! first-level cache. Gradients are further ways through the tokens, so that no state is kept.

use super::made::buffer;
use crate::Tensor;
use crate::error::Result;
use crate::exp::vectorised;
use crate::plain::{Way, check_linear_attention, linear_attention_gradients};

/// Columns of the state that go through the tokens together.
const COLUMNS: usize = 32;

pub(super) fn linear_attention(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
    check_linear_attention(q, k, v, log_decay)?;
    let decay = &log_decay.detach().exp()?;
    let out = through(&Way { q, k, v, decay, backwards: false })?;
    let inputs = [q, k, v, log_decay];
    Ok(Tensor::made(v.device(), v.dims().to_vec(), buffer(out), "linear attention", &inputs, |pull| {
        let inputs = [0, 1, 2, 3].map(|at| &pull.inputs[at]);
        linear_attention_gradients(inputs, pull.grad, pull.wanted, |way| {
            let (batch, tokens, heads) = way.decay.dims3()?;
            Tensor::from_vec(through(way)?, (batch, tokens, heads, way.v.dim(3)?), way.v.device())
        })
    }))
}

fn through(way: &Way<'_>) -> Result<Vec<f32>> {
    let (batch, tokens, heads) = way.decay.dims3()?;
    let [q, k, v] = [Rows::of(way.q, heads)?, Rows::of(way.k, heads)?, Rows::of(way.v, heads)?];
    let source = Source { q, k, v, decay: way.decay.host()?, tokens, heads, backwards: way.backwards };
    let mut out = vec![0f32; batch * tokens * heads * v.width];
    let mut state = vec![[0f32; COLUMNS]; k.width];
    vectorised(
        #[inline(always)]
        || {
            for window in 0..batch {
                for head in 0..heads {
                    for first in (0..v.width).step_by(COLUMNS) {
                        state.fill([0.0; COLUMNS]);
                        source.columns(window, head, first, &mut state, &mut out);
                    }
                }
            }
        },
    );
    Ok(out)
}

/// Vectors of tokens and heads, some heads of which share one.
#[derive(Clone, Copy)]
struct Rows<'s> {
    values: &'s [f32],
    /// Heads that share a vector.
    served: usize,
    width: usize,
}

impl<'s> Rows<'s> {
    /// Of a tensor `[batch, tokens, heads / served, width]`.
    fn of(x: &'s Tensor, heads: usize) -> Result<Self> {
        let (_, _, own, width) = x.dims4()?;
        Ok(Self { values: x.host()?, served: heads / own.max(1), width })
    }

    /// The vector of head `head` of the token at `row` among all windows' tokens.
    #[inline(always)]
    fn at(&self, row: usize, head: usize, heads: usize) -> &'s [f32] {
        let place = row * (heads / self.served) + head / self.served;
        &self.values[place * self.width..][..self.width]
    }
}

/// The arguments as slices, row-major, and their sizes.
struct Source<'s> {
    q: Rows<'s>,
    k: Rows<'s>,
    v: Rows<'s>,
    decay: &'s [f32],
    tokens: usize,
    heads: usize,
    backwards: bool,
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
        let count = COLUMNS.min(self.v.width - first);
        for step in 0..self.tokens {
            let token = if self.backwards { self.tokens - 1 - step } else { step };
            let row = window * self.tokens + token;
            let fading = row + usize::from(self.backwards);
            // In front of the first step the state is zero.
            let decay = if step == 0 { 1.0 } else { self.decay[fading * self.heads + head] };
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|rows| rows.at(row, head, self.heads));
            let mut value = [0f32; COLUMNS];
            value[..count].copy_from_slice(&v[first..][..count]);
            let mut output = [0f32; COLUMNS];
            for ((own, key), query) in state.iter_mut().zip(k).zip(q) {
                for ((element, value), sum) in own.iter_mut().zip(&value).zip(&mut output) {
                    *element = *element * decay + key * value;
                    *sum += *element * query;
                }
            }
            out[(row * self.heads + head) * self.v.width + first..][..count]
                .copy_from_slice(&output[..count]);
        }
    }
}
