//! Norms over the last axis in one pass over memory.

use super::made::{buffer, tensor};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::exp::{sum_of, sum_of_pairs, vectorised};

/// The length of the last axis.
fn last_axis(x: &Tensor) -> Result<usize> {
    match x.dims() {
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

pub(super) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let d = last_axis(x)?;
    let out = normalise(x.host()?, d, weight.map(Tensor::host).transpose()?, None, false, eps);
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(weight).collect();
    Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(out), "rms norm", &inputs, move |pull| {
        let (x, weight) = (&pull.inputs[0], pull.inputs.get(1));
        let weights = weight.map_or(Ok(vec![1.0; d]), Tensor::to_vec)?;
        let (for_x, for_weight) = rms_backward(x.host()?, &weights, pull.grad.host()?, d, eps);
        let mut all = vec![Some(tensor(for_x, x.dims(), x)?)];
        if let Some(weight) = weight {
            all.push(Some(tensor(for_weight, weight.dims(), x)?));
        }
        Ok(all)
    }))
}

/// With `f = 1 / sqrt(mean(x^2) + eps)`: `f * g * w - x * f^3 * mean(g * w * x)`, and `g * x * f` for the weight.
fn rms_backward(x: &[f32], weights: &[f32], grads: &[f32], d: usize, eps: f64) -> (Vec<f32>, Vec<f32>) {
    let parameters = (weights.len() / d).max(1);
    let mut for_x = Vec::with_capacity(x.len());
    let mut for_weight = vec![0.0; weights.len()];
    let mut weighted = vec![0.0; d];
    vectorised(
        #[inline(always)]
        || {
            for (i, (row, grad)) in x.chunks_exact(d).zip(grads.chunks_exact(d)).enumerate() {
                let own = (i % parameters) * d..(i % parameters + 1) * d;
                let factor = 1.0 / (sum_of(row, |x| x * x) / d as f32 + eps as f32).sqrt();
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
    (for_x, for_weight)
}

pub(super) fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let d = last_axis(x)?;
    let Some(bias) = bias else { return centred(x, weight, None, d, eps) };
    if weight.is_some_and(|weight| weight.dims() == bias.dims()) {
        return centred(x, weight, Some(bias), d, eps);
    }
    centred(x, weight, None, d, eps)?.broadcast_add(bias)
}

/// A layer norm; a bias only with a weight of its shape.
fn centred(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, d: usize, eps: f64) -> Result<Tensor> {
    let values = |parameter: Option<&'_ Tensor>| parameter.map(Tensor::to_vec).transpose();
    let (weights, biases) = (values(weight)?, values(bias)?);
    let out = normalise(x.host()?, d, weights.as_deref(), biases.as_deref(), true, eps);
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(weight).chain(bias).collect();
    Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(out), "layer norm", &inputs, move |pull| {
        let x = &pull.inputs[0];
        let weights = pull.inputs.get(1).map_or(Ok(vec![1.0; d]), Tensor::to_vec)?;
        let (for_x, parameters) = layer_backward(x.host()?, &weights, pull.grad.host()?, d, eps);
        let mut all = vec![Some(tensor(for_x, x.dims(), x)?)];
        for (parameter, values) in pull.inputs[1..].iter().zip(parameters) {
            all.push(Some(tensor(values, parameter.dims(), x)?));
        }
        Ok(all)
    }))
}

/// With `y = (x - mean) * f` and `v = g * w`: `f * (v - mean(v) - y * mean(v * y))`, `g * y` for the weight, `g` for
/// the bias.
fn layer_backward(
    x: &[f32],
    weights: &[f32],
    grads: &[f32],
    d: usize,
    eps: f64,
) -> (Vec<f32>, [Vec<f32>; 2]) {
    let rows = (weights.len() / d).max(1);
    let mut for_x = Vec::with_capacity(x.len());
    let [mut for_weight, mut for_bias] = [0, 1].map(|_| vec![0.0; weights.len()]);
    let [mut normed, mut weighted] = [0, 1].map(|_| vec![0.0; d]);
    vectorised(
        #[inline(always)]
        || {
            for (i, (row, grad)) in x.chunks_exact(d).zip(grads.chunks_exact(d)).enumerate() {
                let own = (i % rows) * d..(i % rows + 1) * d;
                let mean = sum_of(row, |x| x) / d as f32;
                let square = sum_of(row, |x| (x - mean) * (x - mean)) / d as f32;
                let factor = 1.0 / (square + eps as f32).sqrt();
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
    (for_x, [for_weight, for_bias])
}
