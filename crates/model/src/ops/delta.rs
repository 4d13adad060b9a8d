//! The gated delta rule: linear attention whose state is corrected towards each new value.
//!
//! Candle's own operations pass over the whole state six times a token, each time in new memory. Columns of
//! the state never meet: the fused form takes [`COLUMNS`] of them through all tokens, so that what it works
//! on stays in the first-level cache.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

use super::exp::vectorised;
use super::slices::{through_plain, values};

/// Columns of the state that go through the tokens together.
const COLUMNS: usize = 32;

pub(super) fn check(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Tensor, beta: &Tensor) -> Result<()> {
    let fits = match (k.dims(), v.dims()) {
        ([batch, tokens, heads, _], [.., value_dim]) => {
            q.dims() == k.dims()
                && v.dims() == [*batch, *tokens, *heads, *value_dim]
                && decay.dims() == [*batch, *tokens, *heads]
                && beta.dims() == decay.dims()
        }
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let [q, k, v, decay, beta] = [q, k, v, decay, beta].map(Tensor::dims);
    bail!("gated_delta: q {q:?}, k {k:?}, v {v:?}, decay {decay:?} and beta {beta:?} do not fit together")
}

pub(super) fn plain(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Tensor, beta: &Tensor) -> Result<Tensor> {
    let (batch, tokens, heads, key_dim) = k.dims4()?;
    let value_dim = v.dim(3)?;
    let mut state = Tensor::zeros((batch, heads, key_dim, value_dim), v.dtype(), v.device())?;
    let mut outputs = Vec::with_capacity(tokens);
    for token in 0..tokens {
        let at = |x: &Tensor| x.narrow(1, token, 1)?.squeeze(1);
        let column = |x: &Tensor| at(x)?.unsqueeze(3); // [b, h, k, 1]
        let scalar = |x: &Tensor| at(x)?.unsqueeze(2); // [b, h, 1]
        state = state.broadcast_mul(&scalar(decay)?.unsqueeze(3)?)?;
        let key = column(k)?;
        let remembered = state.broadcast_mul(&key)?.sum(2)?; // [b, h, v]
        let change = (at(v)? - remembered)?.broadcast_mul(&scalar(beta)?)?;
        state = (state + key.broadcast_mul(&change.unsqueeze(2)?)?)?;
        outputs.push(state.broadcast_mul(&column(q)?)?.sum(2)?);
    }
    Tensor::stack(&outputs, 1)
}

/// An operation of candle's takes three tensors at most.
pub(super) fn fused(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Tensor, beta: &Tensor) -> Result<Tensor> {
    let queries_and_keys = Tensor::cat(&[q, k], 3)?.contiguous()?; // [b, t, h, 2 * key_dim]
    let gates = Tensor::stack(&[decay, beta], 3)?.contiguous()?; // [b, t, h, 2]
    queries_and_keys.apply_op3(&v.contiguous()?, &gates, GatedDelta)
}

/// Of `[q, k]` on the last axis, v, and `[decay, beta]` on a new last axis.
struct GatedDelta;

impl CustomOp3 for GatedDelta {
    fn name(&self) -> &'static str {
        "gated-delta"
    }

    fn cpu_fwd(
        &self,
        queries_and_keys: &CpuStorage,
        layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
        gates: &CpuStorage,
        gates_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, tokens, heads, both) = layout.shape().dims4()?;
        let value_dim = v_layout.shape().dims4()?.3;
        let source = Source {
            queries_and_keys: values(queries_and_keys, layout)?,
            v: values(v, v_layout)?,
            gates: values(gates, gates_layout)?,
            tokens,
            heads,
            key_dim: both / 2,
            value_dim,
        };
        let mut out = vec![0f32; batch * tokens * heads * value_dim];
        let mut state = vec![[0f32; COLUMNS]; both / 2];
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
        Ok((CpuStorage::F32(out), v_layout.shape().clone()))
    }

    /// Through [`plain`], computed anew.
    fn bwd(
        &self,
        queries_and_keys: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let plain = |inputs: &[Tensor]| {
            let [both, v, gates] = inputs else { bail!("gated_delta has three inputs") };
            let key_dim = both.dim(D::Minus1)? / 2;
            let (q, k) = (both.narrow(3, 0, key_dim)?, both.narrow(3, key_dim, key_dim)?);
            let gate = |index| gates.narrow(3, index, 1)?.squeeze(3);
            plain(&q, &k, v, &gate(0)?, &gate(1)?)
        };
        let mut grads = through_plain(&[queries_and_keys, v, gates], grad, plain)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// The arguments as slices, row-major, and their sizes.
struct Source<'s> {
    queries_and_keys: &'s [f32],
    v: &'s [f32],
    gates: &'s [f32],
    tokens: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
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
            let (q, k) =
                self.queries_and_keys[at * 2 * self.key_dim..][..2 * self.key_dim].split_at(self.key_dim);
            let (decay, beta) = (self.gates[at * 2], self.gates[at * 2 + 1]);
            let place = at * self.value_dim + first;
            let mut change = [0f32; COLUMNS];
            change[..count].copy_from_slice(&self.v[place..][..count]);
            let mut remembered = [0f32; COLUMNS];
            for (row, key) in state.iter_mut().zip(k) {
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use crate::ops::Kernels;

    /// q, k, v, decay, beta of seeded numbers, scaled as a model's are.
    fn arguments(batch: usize, tokens: usize, heads: usize, key_dim: usize, value_dim: usize) -> [Tensor; 5] {
        let mut seed = 7u64;
        let mut tensor = |shape: &[usize], low: f32, high: f32| {
            let mut next = || {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                low + (high - low) * ((seed >> 40) as f32 / (1u64 << 24) as f32)
            };
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let unit = 1.7 / (key_dim as f32).sqrt();
        [
            tensor(&[batch, tokens, heads, key_dim], -unit, unit),
            tensor(&[batch, tokens, heads, key_dim], -unit, unit),
            tensor(&[batch, tokens, heads, value_dim], -1.0, 1.0),
            tensor(&[batch, tokens, heads], 0.5, 1.0),
            tensor(&[batch, tokens, heads], 0.0, 1.0),
        ]
    }

    fn run(kernels: Kernels, arguments: &[Tensor; 5]) -> Tensor {
        let [q, k, v, decay, beta] = arguments;
        kernels.gated_delta(q, k, v, decay, beta).unwrap()
    }

    /// Largest difference over the largest element of `a`.
    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let largest =
            |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        largest((a - b).unwrap()) / largest(a.clone())
    }

    #[test]
    fn fused_equals_plain() {
        for (batch, tokens, heads, key_dim, value_dim) in
            [(2, 9, 3, 16, 32), (1, 40, 2, 8, 5), (1, 1, 1, 1, 1), (2, 7, 1, 33, 70)]
        {
            let arguments = arguments(batch, tokens, heads, key_dim, value_dim);
            let (plain, fused) = (run(Kernels::Plain, &arguments), run(Kernels::Fused, &arguments));
            assert_eq!(plain.dims(), fused.dims());
            assert!(difference(&plain, &fused) < 1e-5, "{}", difference(&plain, &fused));
        }
    }

    #[test]
    fn strided_arguments_are_read_right() {
        let [q, k, v, decay, beta] = arguments(2, 6, 4, 8, 12);
        let turned = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
        let strided = [turned(&q), turned(&k), turned(&v), turned(&decay), turned(&beta)];
        let (plain, fused) = (run(Kernels::Plain, &[q, k, v, decay, beta]), run(Kernels::Fused, &strided));
        assert!(difference(&plain, &fused) < 1e-5);
    }

    #[test]
    fn gradients_equal_plain() {
        let variables = arguments(2, 5, 2, 6, 7).map(|tensor| Var::from_tensor(&tensor).unwrap());
        let tensors: [Tensor; 5] = std::array::from_fn(|i| variables[i].as_tensor().clone());
        let grads = [Kernels::Plain, Kernels::Fused]
            .map(|kernels| run(kernels, &tensors).sqr().unwrap().sum_all().unwrap().backward().unwrap());
        for tensor in &tensors {
            let [plain, fused] = [&grads[0], &grads[1]].map(|grads| grads.get(tensor).unwrap());
            assert!(difference(plain, fused) < 1e-5);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let [q, k, v, decay, beta] = arguments(2, 6, 4, 8, 12);
        let short = beta.narrow(1, 0, 5).unwrap();
        for kernels in [Kernels::Plain, Kernels::Fused] {
            assert!(kernels.gated_delta(&q, &k, &v, &decay, &short).is_err());
            assert!(kernels.gated_delta(&v, &k, &v, &decay, &beta).is_err());
            assert!(kernels.gated_delta(&q, &k, &decay, &decay, &beta).is_err());
        }
    }
}
