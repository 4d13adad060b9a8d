//! The CPU engine: each coarse operation in one pass over memory, products by faer.
//!
//! An operation runs on its caller's thread and sums in a fixed order, so callers may spread windows over threads as
//! they like: the result for a batch is, bit for bit, that of each of its rows alone. This holds on one machine; on
//! another instruction set (AVX2, AVX-512, NEON) faer multiplies in another order.

mod activation;
mod attention;
mod delta;
mod elementary;
mod linear;
mod linear_attention;
mod made;
mod norm;
mod rotary;
mod second_order;
mod softmax;

use std::sync::Arc;

pub use self::made::PARTS;
use self::made::{buffer, map_pairs, tensor};
use crate::elementary::{Buffer, Combine, Map, Reduce};
use crate::engine::Engine;
use crate::error::Result;
use crate::learning::Learning;
use crate::plain::{check_norm, check_rotary, check_same};
use crate::second_order::SecondOrder;
use crate::settings::{Activation, AttentionSettings, Codes, Notebook, Pairing};
use crate::shape::View;
use crate::{LAST, Tensor};

/// The CPU engine.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    batch: usize,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::in_batches(1)
    }
}

impl Cpu {
    /// Asks for so many windows as one tensor ([`Engine::batch`]), as an engine on a card does: for tests of that.
    pub const fn in_batches(batch: usize) -> Self {
        Self { batch }
    }
}

impl Learning for Cpu {}

impl Engine for Cpu {
    fn name(&self) -> String {
        let batches = if self.batch == 1 { String::new() } else { format!(" in batches of {}", self.batch) };
        format!("cpu {}{batches}", mlx_format::simd_name())
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        Ok(buffer(values))
    }

    fn read(&self, x: &Tensor, to: &mut dyn FnMut(&[f32])) -> Result<()> {
        to(x.host()?);
        Ok(())
    }

    fn map(&self, x: &Tensor, function: Map) -> Result<Buffer> {
        Ok(buffer(elementary::map(x.host()?, function)))
    }

    fn combine(&self, x: &Tensor, y: &Tensor, shape: &[usize], function: Combine) -> Result<Buffer> {
        Ok(buffer(elementary::combine(x, y, shape, function)?))
    }

    fn arrange(&self, x: &Tensor, view: &View) -> Result<Buffer> {
        Ok(buffer(elementary::arrange(x.host()?, view)))
    }

    fn scatter(&self, x: &Tensor, view: &View, count: usize) -> Result<Buffer> {
        Ok(buffer(elementary::scatter(x.host()?, view, count)))
    }

    fn join(&self, parts: &[&Tensor], widths: &[usize]) -> Result<Buffer> {
        let parts = parts.iter().map(|part| part.host()).collect::<Result<Vec<_>>>()?;
        Ok(buffer(elementary::join(&parts, widths)))
    }

    fn reduce(&self, x: &Tensor, sizes: [usize; 3], how: Reduce) -> Result<Buffer> {
        Ok(buffer(elementary::reduce(x.host()?, sizes, how)))
    }

    fn multiply(&self, x: &Tensor, y: &Tensor, sizes: [usize; 4]) -> Result<Buffer> {
        Ok(buffer(linear::multiply(x.host()?, y.host()?, sizes)))
    }

    fn rows(&self, x: &Tensor, width: usize, ids: &[u32]) -> Result<Buffer> {
        Ok(buffer(elementary::rows(x.host()?, width, ids)))
    }

    fn add_rows(&self, x: &Tensor, width: usize, ids: &[u32], count: usize) -> Result<Buffer> {
        Ok(buffer(elementary::add_rows(x.host()?, width, ids, count)))
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        linear::linear(x, weight, bias)
    }

    fn observed_linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        notebook: &Notebook,
    ) -> Result<Tensor> {
        linear::observed_linear(x, weight, bias, notebook)
    }

    fn packed_linear(
        &self,
        x: &Tensor,
        codes: &Arc<Codes>,
        scales: &Tensor,
        centers: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        linear::packed_linear(x, codes, scales, centers, bias)
    }

    fn rms_norm(&self, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        check_norm(x, weight, "weight of rms_norm")?;
        norm::rms_norm(x, weight, eps)
    }

    fn layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        check_norm(x, weight, "weight of layer_norm")?;
        check_norm(x, bias, "bias of layer_norm")?;
        norm::layer_norm(x, weight, bias, eps)
    }

    fn add(&self, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
        check_same(x, y, "add")?;
        let small = factor as f32;
        let sum = map_pairs(x.host()?, y.host()?, |x, y| x + small * y);
        Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(sum), "add", &[x, y], move |pull| {
            Ok(vec![
                Some(pull.grad.clone()),
                Some(if factor == 1.0 { pull.grad.clone() } else { (pull.grad * factor)? }),
            ])
        }))
    }

    fn rotary(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
        check_rotary(x, cos, sin)?;
        rotary::rotary(x, cos, sin, pairing)
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
        attention::attention(q, k, v, settings)
    }

    fn gated_delta(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        beta: &Tensor,
    ) -> Result<Tensor> {
        delta::gated_delta(q, k, v, decay, beta)
    }

    fn linear_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        linear_attention::linear_attention(q, k, v, log_decay)
    }

    fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        activation::activate(x, activation)
    }

    fn glu(&self, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
        check_same(gate, up, "glu: gate and up")?;
        activation::glu(gate, up, glu)
    }

    fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        softmax::softmax(x)
    }
}

impl SecondOrder for Cpu {
    fn gram_add(&self, sum: &mut Tensor, x: &Tensor) -> Result<()> {
        let size = x.dim(LAST)?;
        if sum.dims() != [size, size] {
            return crate::plain::gram_add(sum, x);
        }
        let values = x.host()?;
        second_order::gram_add(sum.host_mut()?, values, size);
        Ok(())
    }

    fn gram_finish(&self, mut sum: Tensor, factor: f32) -> Result<Tensor> {
        let size = sum.dim(0)?;
        second_order::gram_finish(sum.host_mut()?, size, factor);
        Ok(sum)
    }

    fn gram_scaled(&self, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
        tensor(second_order::gram_scaled(gram.host()?, factors), gram.dims(), gram)
    }

    fn quadratic(&self, gram: &Tensor, changes: &Tensor) -> Result<f64> {
        Ok(second_order::quadratic(gram.host()?, changes.host()?, gram.dim(0)?))
    }

    fn permuted(&self, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
        tensor(second_order::permuted(gram.host()?, order, kept), gram.dims(), gram)
    }

    fn factor(&self, hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
        let size = hessian.dim(0)?;
        let Some(upper) = second_order::inverse_factor(hessian.host()?, size, added) else { return Ok(None) };
        hessian.host_mut()?.iter_mut().step_by(size + 1).for_each(|value| *value += added);
        Ok(Some(tensor(upper, hessian.dims(), hessian)?))
    }
}
