//! What an engine is.

use std::ops::Deref;
use std::sync::Arc;

use mlx_format::FloatType;

use crate::Tensor;
use crate::elementary::{Buffer, Combine, Map, Reduce};
use crate::error::Result;
use crate::learning::Learning;
use crate::losses::{Candidates, Labels, Likeliest};
use crate::routing::Selection;
use crate::running::{RunningDivergence, RunningScore};
use crate::second_order::SecondOrder;
use crate::settings::{
    Activation, AdamInputs, AdamStep, AttentionSettings, Codes, GridSlopes, Held, Notebook, Pairing,
};
use crate::shape::View;
use crate::usage::{Capacity, MemoryUse, Spent};

/// Something that computes with tensors.
///
/// Elementary operations give a buffer in row-major order; their gradients are written once, for all engines, in
/// [`Tensor`]'s methods. Coarse operations give a tensor that remembers how gradients pass it. Without an override they
/// are what [`plain`](crate::plain) makes of elementary ones.
///
/// What one engine, adapter and driver computes is the same bits on every run, whatever the number of threads, and for
/// each window of a batch what it is for that window alone.
pub trait Engine: Learning + SecondOrder + std::fmt::Debug + Send + Sync + 'static {
    /// A name that changes whenever the bits of results may: `cpu x86-v4`. It stands in identities of runs and on model
    /// cards.
    fn name(&self) -> String;

    /// How many windows a walk hands over as one tensor, a divisor of 16: sums over windows are made in chunks of 16, which
    /// hold whole batches. The processor takes one at a time, each on a thread of its own.
    fn batch(&self) -> usize {
        1
    }

    /// How many experts of a layer a forward pass takes at once, for [`Engine::linears`].
    fn experts_at_once(&self) -> usize {
        1
    }

    /// What its tensors take of a memory that is not this process's; `None` where there is no such memory.
    fn memory(&self) -> Option<MemoryUse> {
        None
    }

    /// Notes that an operation is left to the processor, and why, if the engine computes elsewhere. Whoever computes
    /// beside the engine says so here, so that nothing does in silence.
    fn leave(&self, _operation: &'static str, _why: &'static str) {}

    /// What was left to the processor so far, and why: each operation once, by name.
    fn left(&self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }

    /// Lets the peak of [`Engine::memory`] begin anew.
    fn reset_peak(&self) {}

    /// Notes from now on what time is spent on, for [`Engine::profile`]; whether the engine can. It takes some time itself.
    fn note_times(&self) -> bool {
        false
    }

    /// What time was spent on since [`Engine::note_times`], the most first; nothing where an engine does not know.
    ///
    /// # Errors
    /// If the device does not answer.
    fn profile(&self) -> Result<Vec<Spent>> {
        Ok(Vec::new())
    }

    /// How much that memory holds; `None` where there is no such memory.
    fn capacity(&self) -> Option<Capacity> {
        None
    }

    /// Brings numbers to where the engine computes.
    ///
    /// # Errors
    /// If the device has no room.
    fn upload(&self, values: Vec<f32>) -> Result<Buffer>;

    /// Numbers of a tensor of another device.
    ///
    /// # Errors
    /// If either device has no room or does not answer.
    fn adopt(&self, x: &Tensor) -> Result<Buffer> {
        self.upload(x.to_vec()?)
    }

    /// One number, `count` times.
    ///
    /// # Errors
    /// If the device has no room.
    fn fill(&self, value: f32, count: usize) -> Result<Buffer> {
        self.upload(vec![value; count])
    }

    /// Lends out all numbers of a tensor.
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

    /// The elements that `view` sees.
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
        crate::plain::linear(x, weight, bias)
    }

    /// [`Engine::linear`] of several experts: rows of `x [tokens, k]`, the first `rows[0]` by `weights[0] [n, k]`, those behind
    /// them by the next one, as `[tokens, n]`. A card takes them in one launch.
    fn linears(&self, x: &Tensor, rows: &[usize], weights: &[Tensor]) -> Result<Tensor> {
        crate::plain::linears(x, rows, weights)
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
        crate::plain::observed_linear(x, weight, bias, notebook)
    }

    /// Codes where [`Engine::decode`] wants them.
    ///
    /// # Errors
    /// If the device has no room.
    fn hold(&self, codes: Vec<u8>) -> Result<Held> {
        Ok(Held::Host(Arc::new(codes)))
    }

    /// Codes `[rows, columns]` with what they decode to: `code * scale + bias`, a product that is rounded and then a sum.
    /// `scales` and `biases` are `[rows, groups]`, of `group_size` columns; `middle` is the code that decodes to a group's
    /// center.
    ///
    /// # Errors
    /// Scales and biases of different shapes, codes that are fewer, or another engine's.
    fn decode(
        &self,
        codes: &Held,
        (group_size, middle): (usize, f32),
        scales: &Tensor,
        biases: &Tensor,
    ) -> Result<Arc<Codes>> {
        crate::plain::decode(codes, (group_size, middle), scales, biases)
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
        crate::plain::packed_linear(x, codes, scales, centers, bias)
    }

    /// Scales and biases of groups as a file holds them, from scales and centers of one shape: `round(scale)` and
    /// `round(center - round(scale) * middle)`, a product that is rounded and then a difference. No gradient passes.
    ///
    /// # Errors
    /// Scales and centers of different shapes.
    fn stored_grid(
        &self,
        scales: &Tensor,
        centers: &Tensor,
        middle: f32,
        float: FloatType,
    ) -> Result<[Tensor; 2]> {
        crate::plain::stored_grid(scales, centers, middle, float)
    }

    /// The sum of squares of each grid's gradients in their units, nearly as exact as in float64. All grids come in one
    /// call, so that a device is waited for once.
    ///
    /// # Errors
    /// Scales and gradients of different shapes.
    fn grid_squares(&self, grids: &[GridSlopes<'_>]) -> Result<Vec<f64>> {
        crate::plain::grid_squares(grids)
    }

    /// One step of Adam: the numbers behind it, and first and second moments of their gradient.
    ///
    /// # Errors
    /// Inputs of different shapes.
    fn adam(&self, step: &AdamStep, inputs: AdamInputs<'_>) -> Result<[Tensor; 3]> {
        crate::plain::adam(step, inputs)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    ///
    /// `weight` is `[d]`, or `[h, d]` for `x [.., h, d]`: a weight for each head.
    fn rms_norm(&self, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        crate::plain::rms_norm(x, weight, eps)
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
        crate::plain::layer_norm(x, weight, bias, eps)
    }

    /// `x + factor * y`, tensors of one shape.
    fn add(&self, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
        crate::plain::add(x, y, factor)
    }

    /// Rotates the first `2 * r` features of each head of `x [batch, tokens, heads, d]` by the angles whose cosines and
    /// sines are `cos` and `sin`, both `[tokens, r]`; the other features pass unchanged. No gradient reaches the
    /// angles.
    fn rotary(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
        crate::plain::rotary(x, cos, sin, pairing)
    }

    /// Causal attention: `q [batch, tokens, heads, d]`, `k [batch, tokens, kv_heads, d]`,
    /// `v [batch, tokens, kv_heads, dv]` give `[batch, tokens, heads, dv]`.
    ///
    /// Head `h` reads key and value head `h / (heads / kv_heads)`.
    ///
    /// # Errors
    /// Shapes that do not fit together; a window of no tokens.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
        crate::plain::attention(q, k, v, settings)
    }

    /// The gated delta rule over the tokens of each head (arXiv 2412.06464), whose state `S [key_dim, value_dim]`
    /// begins as zeros: `S = decay * S`, `S = S + k (beta * (v - S^T k))^T`, `o = S^T q`.
    ///
    /// `q` and `k` `[batch, tokens, heads, key_dim]`, `v [batch, tokens, heads, value_dim]` and `beta [batch, tokens,
    /// heads]` give `o [batch, tokens, heads, value_dim]`. `decay` is one for each head, `[batch, tokens, heads]`, or one
    /// for each row of its state, `[batch, tokens, heads, key_dim]` (Kimi delta attention, arXiv 2510.26692).
    ///
    /// # Errors
    /// Shapes that do not fit together.
    fn gated_delta(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        beta: &Tensor,
    ) -> Result<Tensor> {
        crate::plain::gated_delta(q, k, v, decay, beta)
    }

    /// Linear attention with a decay over the tokens of each head (arXiv 2405.21060), whose state `S [key_dim, value_dim]`
    /// begins as zeros: `S = exp(log_decay) * S + k v^T`, `o = S^T q`.
    ///
    /// `q` and `k` `[batch, tokens, groups, key_dim]`, `v [batch, tokens, heads, value_dim]` and `log_decay [batch, tokens,
    /// heads]` give `o [batch, tokens, heads, value_dim]`. Head `h` reads query and key `h / (heads / groups)`.
    fn linear_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        crate::plain::linear_attention(q, k, v, log_decay)
    }

    /// `activation(x)`, element by element.
    ///
    /// # Errors
    /// [`Activation::ClampedSwiglu`], which needs two inputs.
    fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        crate::plain::activate(x, activation)
    }

    /// `glu(gate) * up`, element by element; for [`Activation::ClampedSwiglu`] as said there.
    ///
    /// # Errors
    /// `gate` and `up` of different shapes.
    fn glu(&self, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
        crate::plain::glu(gate, up, glu)
    }

    /// Softmax over the last axis.
    ///
    /// # Errors
    /// A scalar.
    fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        crate::plain::softmax(x)
    }

    /// Which experts each token goes to: of each row of `scores [tokens, experts]` the `top_k` best, best first.
    ///
    /// # Errors
    /// Scores that are no matrix.
    fn route(&self, scores: &Tensor, selection: &Selection) -> Result<Vec<Vec<u32>>> {
        crate::plain::route(scores, selection)
    }

    /// Adds a tile of logits `[tokens, width]`, of tokens `first..first + width` of the vocabulary, to each token's score.
    /// `targets` are the tokens that followed; none where nobody asks.
    ///
    /// # Errors
    /// Another number of tokens than is kept. The other losses fail in the same case.
    fn score(
        &self,
        logits: &Tensor,
        first: u32,
        targets: &[u32],
        running: &mut [RunningScore],
    ) -> Result<()> {
        crate::plain::score(logits, first, targets, running)
    }

    /// As [`Engine::score`], for the logits of a reference and of a model beside it.
    fn compare(
        &self,
        reference: &Tensor,
        logits: &Tensor,
        first: u32,
        targets: &[u32],
        running: &mut [RunningDivergence],
    ) -> Result<()> {
        crate::plain::compare(reference, logits, first, targets, running)
    }

    /// As [`Engine::score`], and keeps the `kept` largest logits of each token with their ids.
    fn keep_likeliest(
        &self,
        logits: &Tensor,
        first: u32,
        kept: usize,
        candidates: &mut [Candidates],
    ) -> Result<()> {
        crate::plain::keep_likeliest(logits, first, kept, candidates)
    }

    /// The gradient of the negative log probability of a label that is drawn for each token, with respect to a tile of
    /// logits `[tokens, width]`; `lse` are log-sum-exps of whole rows. Tiles come in their order, and `last` says that
    /// this is the last. Beside it expected squares of the gradient, summed over tokens, `[width]`, in front of a softcap
    /// (`cap * tanh(x / cap)`) if there is one behind which the logits lie.
    fn label_slopes(
        &self,
        logits: &Tensor,
        lse: &[f64],
        softcap: Option<f64>,
        last: bool,
        labels: &mut Labels,
    ) -> Result<(Tensor, Vec<f64>)> {
        crate::plain::label_slopes(logits, lse, softcap, last, labels)
    }

    /// `(q - p) * scale` for a tile of a reference's logits (p) and of a model's (q), both `[tokens, width]` and times
    /// `factor` before the softmax: the gradient of `KL(p || q)` with respect to `factor` times the logits. `lses` are
    /// log-sum-exps of the whole rows' products. Adds the tile's part of the divergences to `loss`.
    fn divergence_slopes(
        &self,
        reference: &Tensor,
        logits: &Tensor,
        lses: (&[f64], &[f64]),
        factors: (f64, f32),
        loss: &mut f64,
    ) -> Result<Tensor> {
        crate::plain::divergence_slopes(reference, logits, lses, factors, loss)
    }

    /// As [`Engine::divergence_slopes`] where of the reference only the likeliest tokens are known, and of the others what
    /// they have together: `rest` are the factors of these tokens' gradients. `(lse, rest)`, `(factor, scale)`.
    fn likeliest_slopes(
        &self,
        logits: &Tensor,
        first: u32,
        likeliest: &[Likeliest<'_>],
        tokens: (&[f64], &[f32]),
        factors: (f64, f32),
        loss: &mut f64,
    ) -> Result<Tensor> {
        crate::plain::likeliest_slopes(logits, first, likeliest, tokens, factors, loss)
    }

    /// Adds to `known` the probability that a model gives to a reference's likeliest tokens. `(lse, factor)` as in
    /// [`Engine::divergence_slopes`].
    fn likeliest_probability(
        &self,
        logits: &Tensor,
        first: u32,
        likeliest: &[Likeliest<'_>],
        rows: (&[f64], f64),
        known: &mut [f64],
    ) -> Result<()> {
        crate::plain::likeliest_probability(logits, first, likeliest, rows, known)
    }
}

/// An engine, shared by the tensors that it made.
#[derive(Clone, Debug)]
pub struct Device(Arc<dyn Engine>);

impl Device {
    /// Of an engine.
    pub fn new(engine: impl Engine) -> Self {
        Self(Arc::new(engine))
    }

    /// Whether another handle is of the same engine.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether it has a memory of its own.
    pub fn is_card(&self) -> bool {
        self.memory().is_some()
    }
}

impl Deref for Device {
    type Target = dyn Engine;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
