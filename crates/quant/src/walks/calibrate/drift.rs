//! How far the quantized stream is from the full-precision one at a site, as far as the site's inputs tell it.
//!
//! Beside windows that pass what was quantized, the same windows pass the block in full precision. With `x` and `x~` what
//! stands at a site on either, and `r` and `r~` the residual streams beside it, means of `(x - x~) x~^T` and `(r - r~) x~^T`
//! over tokens are what a correction by least squares needs ([`crate::session`]).

use std::sync::Mutex;

use mlx_quant_engine::{REST, Result, Tensor};
use mlx_quant_model::{Parameters, State};

use crate::reduce::{InOrder, Sum};

/// Means over all tokens that came to a site.
#[derive(Clone, Debug)]
pub(crate) struct Drift {
    /// Of `(x - x~) x~^T`, `[in, in]`.
    pub(crate) inputs: Tensor,
    /// Of `(r - r~) x~^T`, `[hidden, in]`, times what turns a change of the residual stream into one of the reader's output; where
    /// the site's reader writes to the stream.
    pub(crate) stream: Option<Tensor>,
}

/// What stands at a site of one batch of windows, `[tokens, ..]`.
pub(super) struct Pair {
    /// On the quantized stream.
    pub(super) own: Tensor,
    /// On the full-precision one.
    pub(super) full: Tensor,
    /// The residual stream in full precision and the quantized one, where the reader writes to it.
    pub(super) streams: Option<(Tensor, Tensor)>,
}

/// Sums over windows.
pub(super) struct DriftSum {
    tokens: usize,
    inputs: Tensor,
    stream: Option<Tensor>,
}

/// The tree over sums.
pub(super) type DriftTree = InOrder<Result<DriftSum>>;

/// Rows of a tensor of any rank.
pub(super) fn flat(tensor: &Tensor) -> Result<Tensor> {
    tensor.reshape((REST, tensor.dims().last().copied().unwrap_or(1)))
}

impl DriftSum {
    fn of(pair: &Pair) -> Result<Self> {
        let inputs = (&pair.full - &pair.own)?.t()?.matmul(&pair.own)?;
        let stream = pair.streams.as_ref().map(|(full, own)| (full - own)?.t()?.matmul(&pair.own));
        Ok(Self { tokens: pair.own.dim(0)?, inputs, stream: stream.transpose()? })
    }

    fn plus(&self, right: &Self) -> Result<Self> {
        let stream = match (&self.stream, &right.stream) {
            (Some(left), Some(right)) => Some((left + right)?),
            _ => None,
        };
        let inputs = (&self.inputs + &right.inputs)?;
        Ok(Self { tokens: self.tokens + right.tokens, inputs, stream })
    }
}

impl Sum for Result<DriftSum> {
    fn add(&mut self, right: Self) {
        if let Ok(left) = &*self {
            *self = right.and_then(|right| left.plus(&right));
        }
    }
}

/// Adds what stands at a site of a batch of windows, the first of which is `window`.
pub(super) fn add_drift(tree: &mut DriftTree, window: usize, pair: Result<Pair>) {
    tree.add(window, pair.and_then(|pair| DriftSum::of(&pair)));
}

/// The means; the stream's over `multiplier`, by which a reader's output is multiplied before it is added to it.
pub(super) fn finish(tree: DriftTree, multiplier: Option<f64>) -> Result<Option<Drift>> {
    let Some(sum) = tree.finish() else { return Ok(None) };
    let DriftSum { tokens, inputs, stream } = sum?;
    let mean = 1.0 / tokens.max(1) as f64;
    let stream = match (stream, multiplier) {
        (Some(stream), Some(multiplier)) => Some(stream.affine(mean / multiplier, 0.0)?),
        _ => None,
    };
    Ok(Some(Drift { inputs: inputs.affine(mean, 0.0)?, stream }))
}

/// The same windows in full precision, in front of a block and then behind it.
pub(crate) struct Second<'p> {
    /// The block's weights as the source has them.
    pub(crate) parameters: &'p Parameters,
    /// Batch by batch.
    pub(crate) states: Mutex<Vec<State>>,
    /// For each site whose reader writes to the residual stream, what its output is multiplied by before.
    pub(crate) writes: Vec<Option<f64>>,
}
