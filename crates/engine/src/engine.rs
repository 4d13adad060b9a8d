//! The trait that an engine implements, and what passes between it and tensors.

use std::any::Any;
use std::ops::Deref;
use std::sync::Arc;

use mlx_format::{FloatType, Scheme};

use crate::error::Result;
use crate::rounding::{How, Rounded};
use crate::routing::Selection;
use crate::settings::{Activation, AttentionSettings, Codes, Notebook, Pairing};
use crate::shape::View;
use crate::{Tensor, plain};

/// Where a tensor's float32 numbers lie.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// In this process's memory.
    Host(Arc<Vec<f32>>),
    /// Somewhere that only its engine knows.
    Device(Arc<dyn Opaque>),
}

/// A buffer of an engine's own.
pub trait Opaque: Any + std::fmt::Debug + Send + Sync {}

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Map {
    Exp,
    Log,
    Sqrt,
    Tanh,
    /// `2 / sqrt(pi)` times the integral of `exp(-t^2)` from 0 to `x`.
    Erf,
    Reciprocal,
    Absolute,
    /// -1, 0 or 1.
    Sign,
    /// `factor * x + offset`.
    Affine {
        factor: f64,
        offset: f64,
    },
    /// `x` within bounds.
    Clamp {
        low: f32,
        high: f32,
    },
    /// The nearest number of a dtype.
    Rounded(FloatType),
    /// 1 strictly within bounds, 0 elsewhere.
    Within {
        low: f32,
        high: f32,
    },
}

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Combine {
    Add,
    Subtract,
    Multiply,
    Divide,
}

/// What the numbers along an axis become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Reduce {
    Sum,
    Largest,
}

/// Something that computes with tensors.
///
/// Elementary operations are required. They give a buffer in row-major order and know nothing of gradients, which
/// [`Tensor`]'s methods add for all engines. Coarse operations are provided, made of elementary ones; an override gives
/// a tensor that knows how gradients pass it.
///
/// On one adapter and driver an engine gives the same bits on every run, for any number of threads; and for a batch of
/// windows, the bits that each window gives alone.
pub trait Engine: std::fmt::Debug + Send + Sync + 'static {
    /// A name that changes whenever the bits of results may: `cpu x86-v4`. It stands in identities of runs and on model
    /// cards.
    fn name(&self) -> String;

    /// Brings numbers to where the engine computes.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload(&self, values: Vec<f32>) -> Result<Buffer>;

    /// Calls `to` once, with all numbers of a tensor in row-major order.
    ///
    /// # Errors
    /// If the device does not answer.
    fn read(&self, x: &Tensor, to: &mut dyn FnMut(&[f32])) -> Result<()>;

    /// `function` of each element.
    ///
    /// # Errors
    /// If the device has no room. The other elementary operations fail in the same case.
    fn map(&self, x: &Tensor, function: Map) -> Result<Buffer>;

    /// `function` of each pair, both repeated to `shape` ([`View::broadcast`]).
    fn combine(&self, x: &Tensor, y: &Tensor, shape: &[usize], function: Combine) -> Result<Buffer>;

    /// The elements that `view` selects, in its order.
    fn arrange(&self, x: &Tensor, view: &View) -> Result<Buffer>;

    /// The transpose of [`Engine::arrange`]: `count` zeros, to which each element of `x` is added at the place that
    /// `view` gives it.
    fn scatter(&self, x: &Tensor, view: &View, count: usize) -> Result<Buffer>;

    /// Parts side by side: row `i` of the result is row `i` of each part, one after the other. `widths` are the lengths
    /// of the parts' rows.
    fn join(&self, parts: &[&Tensor], widths: &[usize]) -> Result<Buffer>;

    /// Sums or largest elements along the middle axis of `x`, seen as `[outer, count, inner]` (`sizes`):
    /// `[outer, inner]`.
    fn reduce(&self, x: &Tensor, sizes: [usize; 3], how: Reduce) -> Result<Buffer>;

    /// `x [batch, m, k] @ y [batch, k, n]`, `sizes` being `[batch, m, k, n]`.
    fn multiply(&self, x: &Tensor, y: &Tensor, sizes: [usize; 4]) -> Result<Buffer>;

    /// Rows `ids` of `x`, seen as rows of `width` elements.
    fn rows(&self, x: &Tensor, width: usize, ids: &[u32]) -> Result<Buffer>;

    /// The transpose of [`Engine::rows`]: `count` rows of zeros, to which row `i` of `x` is added at `ids[i]`, in their
    /// order.
    fn add_rows(&self, x: &Tensor, width: usize, ids: &[u32], count: usize) -> Result<Buffer>;

    /// `x [.., k] @ weight [n, k]^T (+ bias [n])`, as `[.., n]`.
    ///
    /// # Errors
    /// Shapes that do not fit together. The other coarse operations fail in the same case.
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        plain::linear(x, weight, bias)
    }

    /// [`Engine::linear`] that adds squares of its inputs to `notebook` now, and squares of output gradients when
    /// gradients are taken. No gradient reaches weight or bias.
    fn observed_linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        notebook: &Notebook,
    ) -> Result<Tensor> {
        plain::observed_linear(x, weight, bias, notebook)
    }

    /// `x [.., columns] @ weight^T (+ bias)`; gradients go to `scales` and `centers`, both `[rows, groups]`, as if the
    /// weight were `(code - middle) * scale + center`, whatever rounding the stored weight has seen (a straight-through
    /// estimate, arXiv 1308.3432).
    fn packed_linear(
        &self,
        x: &Tensor,
        codes: &Arc<Codes>,
        scales: &Tensor,
        centers: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        plain::packed_linear(x, codes, scales, centers, bias)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    ///
    /// `weight` is `[d]`, or `[h, d]` for `x [.., h, d]`: a weight for each head.
    fn rms_norm(&self, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        plain::rms_norm(x, weight, eps)
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, weight and bias as in
    /// [`Engine::rms_norm`].
    fn layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        plain::layer_norm(x, weight, bias, eps)
    }

    /// `x + factor * y`, tensors of one shape.
    fn add(&self, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
        plain::add(x, y, factor)
    }

    /// Rotates the first `2 * r` features of each head of `x [batch, tokens, heads, d]` by the angles whose cosines and
    /// sines are `cos` and `sin`, both `[tokens, r]`; the other features pass unchanged. No gradient reaches the
    /// angles.
    fn rotary(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
        plain::rotary(x, cos, sin, pairing)
    }

    /// Causal attention: `q [batch, tokens, heads, d]`, `k [batch, tokens, kv_heads, d]`,
    /// `v [batch, tokens, kv_heads, dv]` give `[batch, tokens, heads, dv]`.
    ///
    /// Head `h` reads key and value head `h / (heads / kv_heads)`.
    ///
    /// # Errors
    /// Shapes that do not fit together; a window of no tokens.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
        plain::attention(q, k, v, settings)
    }

    /// The gated delta rule over the tokens of each head (arXiv 2412.06464), whose state `S [key_dim, value_dim]`
    /// begins as zeros: `S = decay * S`, `S = S + k (beta * (v - S^T k))^T`, `o = S^T q`.
    ///
    /// `q` and `k` `[batch, tokens, heads, key_dim]`, `v [batch, tokens, heads, value_dim]`, `decay` and `beta`
    /// `[batch, tokens, heads]` give `o [batch, tokens, heads, value_dim]`.
    fn gated_delta(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        beta: &Tensor,
    ) -> Result<Tensor> {
        plain::gated_delta(q, k, v, decay, beta)
    }

    /// `activation(x)`, element by element.
    ///
    /// # Errors
    /// [`Activation::ClampedSwiglu`], which needs two inputs.
    fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        plain::activate(x, activation)
    }

    /// `glu(gate) * up`, element by element; for [`Activation::ClampedSwiglu`] as said there.
    ///
    /// # Errors
    /// `gate` and `up` of different shapes.
    fn glu(&self, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
        plain::glu(gate, up, glu)
    }

    /// Softmax over the last axis.
    ///
    /// # Errors
    /// A scalar.
    fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        plain::softmax(x)
    }

    /// Adds `x^T x` of inputs `x [.., size]` to the lower triangle of `sum [size, size]`; in place if no other tensor
    /// has its buffer.
    ///
    /// # Errors
    /// If the device has no room. The other operations on Gram matrices fail in the same case.
    fn gram_add(&self, sum: &mut Tensor, x: &Tensor) -> Result<()> {
        plain::gram_add(sum, x)
    }

    /// The symmetric matrix whose lower triangle is that of `sum [size, size]` times `factor`.
    fn gram_finish(&self, sum: Tensor, factor: f32) -> Result<Tensor> {
        plain::gram_finish(&sum, factor)
    }

    /// Each element of a Gram matrix `[size, size]` divided by the factors of its row and its column: the Gram matrix
    /// of the inputs divided by `factors`.
    fn gram_scaled(&self, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
        plain::gram_scaled(gram, factors)
    }

    /// `tr(D H D^T)` of a Gram matrix `H [size, size]` and changes `D [rows, size]`.
    fn quadratic(&self, gram: &Tensor, changes: &Tensor) -> Result<f64> {
        plain::quadratic(gram, changes)
    }

    /// Rows and columns of a Gram matrix in `order`, with off-diagonal elements times `kept`.
    fn permuted(&self, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
        plain::permuted(gram, order, kept)
    }

    /// `U` with `(H + added)^-1 = U^T U`, upper triangular, and `H + added`, where `added` goes to the diagonal of
    /// `H [size, size]`; `None` if that is not positive definite.
    fn factor(&self, hessian: &Tensor, added: f32) -> Result<Option<(Tensor, Tensor)>> {
        plain::factor(hessian, added)
    }

    /// Codes, scales and biases of a weight `[rows, columns]` at an affine scheme, and the weight that they decode to.
    /// Without an override they are chosen on the processor.
    ///
    /// # Errors
    /// A weight that is no matrix, or that the scheme does not divide.
    fn round(
        &self,
        weight: &Tensor,
        scheme: Scheme,
        float: FloatType,
        how: How<'_>,
    ) -> Result<(Rounded, Tensor)> {
        plain::round(weight, scheme, float, how)
    }

    /// Which experts each token goes to: of each row of `scores [tokens, experts]` the `top_k` best, best first.
    ///
    /// # Errors
    /// Scores that are no matrix.
    fn route(&self, scores: &Tensor, selection: &Selection) -> Result<Vec<Vec<u32>>> {
        plain::route(scores, selection)
    }
}

/// An engine, shared by the tensors that it made.
#[derive(Clone, Debug)]
pub struct Device(Arc<dyn Engine>);

impl Device {
    /// Shares an engine.
    pub fn new(engine: impl Engine) -> Self {
        Self(Arc::new(engine))
    }
}

impl Deref for Device {
    type Target = dyn Engine;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
