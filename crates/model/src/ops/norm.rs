//! Norms over the last axis in one pass over memory.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

use super::exp::{sum_of, sum_of_pairs, vectorised};
use super::slices::{Held, values};

pub(super) fn check(x: &Tensor, weight: Option<&Tensor>, what: &str) -> Result<()> {
    let Some(weight) = weight else {
        return if x.rank() == 0 { bail!("norm of a scalar") } else { Ok(()) };
    };
    let fits = (1..=2).contains(&weight.rank()) && x.dims().ends_with(weight.dims());
    if fits { Ok(()) } else { bail!("{what}: {:?} does not fit input {:?}", weight.dims(), x.dims()) }
}

pub(super) fn rms_plain(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
    let y = x.broadcast_div(&mean.sqrt()?)?;
    if let Some(weight) = weight { y.broadcast_mul(weight) } else { Ok(y) }
}

pub(super) fn layer_plain(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let y = rms_plain(&centred, weight, eps)?;
    if let Some(bias) = bias { y.broadcast_add(bias) } else { Ok(y) }
}

pub(super) fn rms_fused(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let x = x.contiguous()?;
    match weight {
        None => x.apply_op1(RmsNorm { eps }),
        Some(weight) => x.apply_op2(&weight.contiguous()?, RmsNorm { eps }),
    }
}

pub(super) fn layer_fused(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let x = x.contiguous()?;
    match (weight, bias) {
        (None, None) => x.apply_op1(LayerNorm { eps }),
        (Some(weight), None) => x.apply_op2(&weight.contiguous()?, LayerNorm { eps }),
        (None, Some(bias)) => x.apply_op1(LayerNorm { eps })?.broadcast_add(bias),
        (Some(weight), Some(bias)) if weight.dims() == bias.dims() => {
            x.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps })
        }
        (Some(weight), Some(bias)) => {
            x.apply_op2(&weight.contiguous()?, LayerNorm { eps })?.broadcast_add(bias)
        }
    }
}

/// The length of the last axis.
fn last_axis(layout: &Layout) -> Result<usize> {
    match layout.dims() {
        [.., d] => Ok((*d).max(1)),
        [] => bail!("norm of a scalar"),
    }
}

/// Each row less its mean (of a layer norm), over the root of its mean square, times its weight, plus its bias;
/// row `i` takes row `i` modulo their number of `weight` and `bias`.
fn normalise(
    x: &[f32],
    d: usize,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    centred: bool,
    eps: f64,
) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    let mut result = vec![0.0; d];
    let parameters = weight.map_or(1, |weight| weight.len() / d).max(1);
    vectorised(
        #[inline(always)]
        || {
            for (i, row) in x.chunks_exact(d).enumerate() {
                let mean = if centred { sum_of(row, |x| x) / d as f32 } else { 0.0 };
                let square = sum_of(row, |x| (x - mean) * (x - mean)) / d as f32;
                let factor = 1.0 / (square + eps as f32).sqrt();
                for (to, x) in result.iter_mut().zip(row) {
                    *to = (x - mean) * factor;
                }
                let own = (i % parameters) * d..(i % parameters + 1) * d;
                if let Some(weight) = weight {
                    for (to, weight) in result.iter_mut().zip(&weight[own.clone()]) {
                        *to *= weight;
                    }
                }
                if let Some(bias) = bias {
                    for (to, bias) in result.iter_mut().zip(&bias[own]) {
                        *to += bias;
                    }
                }
                out.extend_from_slice(&result);
            }
        },
    );
    out
}

struct RmsNorm {
    eps: f64,
}

impl RmsNorm {
    /// With `f = 1 / sqrt(mean(x^2) + eps)`: `f * g * w - x * f^3 * mean(g * w * x)`, and `g * x * f` for the weight.
    fn backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let d = last_axis(x.layout())?;
        let held = (Held::new(x), weight.map(Held::new), Held::new(&grad));
        let (x_values, grads) = (held.0.values()?, held.2.values()?);
        let ones;
        let weights = if let Some(weight) = &held.1 {
            weight.values()?
        } else {
            ones = vec![1.0; d];
            &ones[..]
        };
        let parameters = (weights.len() / d).max(1);
        let mut for_x = Vec::with_capacity(x_values.len());
        let mut for_weight = vec![0.0; weights.len()];
        let mut weighted = vec![0.0; d];
        vectorised(
            #[inline(always)]
            || {
                for (i, (row, grad)) in x_values.chunks_exact(d).zip(grads.chunks_exact(d)).enumerate() {
                    let own = (i % parameters) * d..(i % parameters + 1) * d;
                    let factor = 1.0 / (sum_of(row, |x| x * x) / d as f32 + self.eps as f32).sqrt();
                    for ((to, grad), weight) in weighted.iter_mut().zip(grad).zip(&weights[own.clone()]) {
                        *to = grad * weight;
                    }
                    let along = sum_of_pairs(&weighted, row, |g, x| g * x) / d as f32 * factor * factor;
                    for (to, x) in weighted.iter_mut().zip(row) {
                        *to = factor * (*to - x * along);
                    }
                    for_x.extend_from_slice(&weighted);
                    for ((to, grad), x) in for_weight[own].iter_mut().zip(grad).zip(row) {
                        *to += grad * x * factor;
                    }
                }
            },
        );
        let for_weight = weight.map(|weight| Tensor::from_vec(for_weight, weight.shape(), weight.device()));
        Ok((Tensor::from_vec(for_x, x.shape(), x.device())?, for_weight.transpose()?))
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = normalise(values(x, xl)?, last_axis(xl)?, None, None, false, self.eps);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.backward(x, None, grad)?.0))
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = normalise(values(x, xl)?, last_axis(xl)?, Some(values(w, wl)?), None, false, self.eps);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (for_x, for_weight) = self.backward(x, Some(weight), grad)?;
        Ok((Some(for_x), for_weight))
    }
}

struct LayerNorm {
    eps: f64,
}

impl LayerNorm {
    /// With `y = (x - mean) * f` and `v = g * w`: `f * (v - mean(v) - y * mean(v * y))`, `g * y` for the weight, `g` for the bias.
    fn backward(&self, inputs: &[&Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let grad = grad.contiguous()?;
        let (x, parameters) = (inputs[0], &inputs[1..]);
        let d = last_axis(x.layout())?;
        let held = (Held::new(x), parameters.first().map(|weight| Held::new(weight)), Held::new(&grad));
        let (x_values, grads) = (held.0.values()?, held.2.values()?);
        let ones;
        let weights = if let Some(weight) = &held.1 {
            weight.values()?
        } else {
            ones = vec![1.0; d];
            &ones[..]
        };
        let rows = (weights.len() / d).max(1);
        let mut for_x = Vec::with_capacity(x_values.len());
        let [mut for_weight, mut for_bias] = [0, 1].map(|_| vec![0.0; weights.len()]);
        let [mut normed, mut weighted] = [0, 1].map(|_| vec![0.0; d]);
        vectorised(
            #[inline(always)]
            || {
                for (i, (row, grad)) in x_values.chunks_exact(d).zip(grads.chunks_exact(d)).enumerate() {
                    let own = (i % rows) * d..(i % rows + 1) * d;
                    let mean = sum_of(row, |x| x) / d as f32;
                    let square = sum_of(row, |x| (x - mean) * (x - mean)) / d as f32;
                    let factor = 1.0 / (square + self.eps as f32).sqrt();
                    for (to, x) in normed.iter_mut().zip(row) {
                        *to = (x - mean) * factor;
                    }
                    for ((to, grad), weight) in weighted.iter_mut().zip(grad).zip(&weights[own.clone()]) {
                        *to = grad * weight;
                    }
                    let middle = sum_of(&weighted, |v| v) / d as f32;
                    let along = sum_of_pairs(&weighted, &normed, |v, y| v * y) / d as f32;
                    for (to, y) in weighted.iter_mut().zip(&normed) {
                        *to = factor * (*to - middle - y * along);
                    }
                    for_x.extend_from_slice(&weighted);
                    for ((to, grad), y) in for_weight[own.clone()].iter_mut().zip(grad).zip(&normed) {
                        *to += grad * y;
                    }
                    for (to, grad) in for_bias[own].iter_mut().zip(grad) {
                        *to += grad;
                    }
                }
            },
        );
        let mut gradients = vec![Some(Tensor::from_vec(for_x, x.shape(), x.device())?)];
        for (parameter, values) in parameters.iter().zip([for_weight, for_bias]) {
            gradients.push(Some(Tensor::from_vec(values, parameter.shape(), x.device())?));
        }
        Ok(gradients)
    }
}

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = normalise(values(x, xl)?, last_axis(xl)?, None, None, true, self.eps);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(&[x], grad)?.swap_remove(0))
    }
}

impl CustomOp2 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = normalise(values(x, xl)?, last_axis(xl)?, Some(values(w, wl)?), None, true, self.eps);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[x, weight], grad)?;
        let for_weight = grads.swap_remove(1);
        Ok((grads.swap_remove(0), for_weight))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (weight, bias) = (values(w, wl)?, values(b, bl)?);
        let out = normalise(values(x, xl)?, last_axis(xl)?, Some(weight), Some(bias), true, self.eps);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[x, weight, bias], grad)?;
        let (for_bias, for_weight) = (grads.swap_remove(2), grads.swap_remove(1));
        Ok((grads.swap_remove(0), for_weight, for_bias))
    }
}
