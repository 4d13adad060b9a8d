//! Softmax and the divergence of two rows of logits.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

use super::exp::{exp, exponentials, largest, vectorised};
use super::rows::{divergence, log_sum_exp};
use super::slices::{Held, map_pairs, values};

pub(super) fn check(reference: &Tensor, logits: &Tensor) -> Result<()> {
    if reference.dims() == logits.dims() && logits.rank() == 2 {
        return Ok(());
    }
    bail!("kl_divergence: reference {:?} and logits {:?}", reference.dims(), logits.dims())
}

/// `x` less its largest of each row, which takes no part in the gradient.
fn below_largest(x: &Tensor) -> Result<Tensor> {
    x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)
}

pub(super) fn softmax_plain(x: &Tensor) -> Result<Tensor> {
    let exponentials = below_largest(x)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

fn log_softmax_plain(x: &Tensor) -> Result<Tensor> {
    let x = below_largest(x)?;
    x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

pub(super) fn kl_plain(reference: &Tensor, logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let reference = log_softmax_plain(&(reference.detach() / temperature)?)?;
    let logits = log_softmax_plain(&(logits / temperature)?)?;
    (reference.exp()? * (reference - logits)?)?.sum(D::Minus1)
}

pub(super) fn softmax_fused(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Softmax)
}

pub(super) fn kl_fused(reference: &Tensor, logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let reference = reference.detach().contiguous()?;
    logits.contiguous()?.apply_op2(&reference, Divergence { factor: 1.0 / temperature })
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some(d) = layout.dims().last() else { bail!("softmax of a scalar") };
        let mut out = values(x, layout)?.to_vec();
        vectorised(
            #[inline(always)]
            || {
                for row in out.chunks_exact_mut((*d).max(1)) {
                    let factor = 1.0 / exponentials(row, largest(row));
                    for value in row {
                        *value *= factor;
                    }
                }
            },
        );
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    /// `y * (g - sum(g * y))`.
    fn bwd(&self, _: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let y = y.detach();
        let weighted = (&y * grad)?;
        let sum = weighted.sum_keepdim(D::Minus1)?;
        Ok(Some((weighted - y.broadcast_mul(&sum)?)?))
    }
}

/// Of logits and their reference, both times `factor`.
struct Divergence {
    factor: f64,
}

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "kl-divergence"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, vocabulary) = xl.shape().dims2()?;
        let (x, r) = (values(x, xl)?, values(r, rl)?);
        let row = |(x, r): (&[f32], &[f32])| {
            let [reference_lse, lse] = [r, x].map(|row| log_sum_exp(row, self.factor));
            divergence(r, reference_lse, x, lse, self.factor) as f32
        };
        let mut out: Vec<f32> =
            x.chunks_exact(vocabulary.max(1)).zip(r.chunks_exact(vocabulary.max(1))).map(row).collect();
        out.resize(n, 0.0);
        Ok((CpuStorage::F32(out), n.into()))
    }

    /// `g / temperature * (softmax(logits / temperature) - softmax(reference / temperature))`.
    fn bwd(
        &self,
        x: &Tensor,
        r: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let vocabulary = x.dim(1)?.max(1);
        let grads = grad.to_vec1::<f32>()?;
        let held = (Held::new(x), Held::new(r));
        let (x_values, r_values) = (held.0.values()?, held.1.values()?);
        let mut out = Vec::with_capacity(x_values.len());
        for ((x, r), grad) in
            x_values.chunks_exact(vocabulary).zip(r_values.chunks_exact(vocabulary)).zip(grads)
        {
            let [reference_lse, lse] = [r, x].map(|row| log_sum_exp(row, self.factor));
            let scale = grad * self.factor as f32;
            out.extend(map_pairs(
                x,
                r,
                #[inline(always)]
                |x, r| {
                    let logarithm = (f64::from(x) * self.factor - lse) as f32;
                    let reference = (f64::from(r) * self.factor - reference_lse) as f32;
                    scale * (exp(logarithm) - exp(reference))
                },
            ));
        }
        Ok((Some(Tensor::from_vec(out, x.shape(), x.device())?), None))
    }
}
