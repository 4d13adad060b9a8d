//! Settings of the coarse operations.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::elementary::Opaque;
use crate::error::{Error, Result, bail};
use crate::exp::{LANES, tree, vectorised};
use crate::shape::REST;

/// How exactly a card computes products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In float32.
    #[default]
    Float32,
    /// By matrix units, in two float16 for each operand and sums in float32, where a product is a linear layer's, a Gram
    /// matrix or carries errors of rounding: about 22 bits instead of 24.
    Fast,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Fast => "fast",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "float32" => Ok(Self::Float32),
            "fast" => Ok(Self::Fast),
            _ => bail!("{text:?} is no precision; hint: float32 or fast"),
        }
    }
}

/// An elementwise function of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x` times the normal distribution function of `x`.
    Gelu,
    /// The approximation of [`Activation::Gelu`] with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x`.
    Identity,
    /// gpt-oss, of a gate and an up: `gate * sigmoid(alpha * gate) * (up + 1)`, with the gate clamped to at most
    /// `limit` and up to `-limit..=limit`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of the inputs.
        limit: f32,
    },
}

/// Which features of a head form the pairs that are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Feature `i` with `i + r`.
    Halves,
    /// Feature `2 * i` with `2 * i + 1`; they stay there.
    Interleaved,
}

/// What an attention layer does besides the scaled dot product.
#[derive(Clone, Debug)]
pub struct AttentionSettings {
    /// Factor of the scores.
    pub scale: f32,
    /// Each token sees itself and `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(scores / cap)` before masking.
    pub softcap: Option<f32>,
    /// A logit for each head, `[heads]`, that takes part in the softmax and has no value (gpt-oss).
    pub sinks: Option<Tensor>,
}

/// Sums over the tokens that passed an observed linear.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Tokens.
    pub tokens: u64,
    /// `[in]`: squares of the inputs.
    pub inputs: Vec<f64>,
    /// `[out]`: squares of the loss's gradients with respect to the outputs.
    pub gradients: Vec<f64>,
}

impl Observed {
    /// Adds what another saw.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        for (own, other) in [(&mut self.inputs, &other.inputs), (&mut self.gradients, &other.gradients)] {
            own.resize(own.len().max(other.len()), 0.0);
            own.iter_mut().zip(other).for_each(|(own, other)| *own += other);
        }
    }
}

/// Where an observed linear leaves its sums. Each window has its own: threads would add to a shared one in any order.
#[derive(Clone, Debug, Default)]
pub struct Notebook(Arc<Mutex<Notes>>);

/// What stands in a notebook.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) seen: Observed,
    /// Sums that stayed where the engine made them, to be added to `seen`: of inputs and of gradients, `[2, features]`,
    /// each the sum of two numbers.
    pub(crate) held: [Option<Tensor>; 2],
}

impl Notebook {
    pub(crate) fn open(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in notebooks of one engine, in their order, and empties them. What an engine holds comes all at once.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn take(notebooks: &[Self]) -> Result<Vec<Observed>> {
        let notes = notebooks.iter().map(|notebook| std::mem::take(&mut *notebook.open()));
        let (mut all, held): (Vec<_>, Vec<_>) = notes.map(|Notes { seen, held }| (seen, held)).unzip();
        let flat: Vec<Tensor> =
            held.iter().flatten().flatten().map(|sums| sums.reshape(REST)).collect::<Result<_>>()?;
        if flat.is_empty() {
            return Ok(all);
        }
        Tensor::cat(&flat, 0)?.read(|mut numbers| {
            for (seen, held) in all.iter_mut().zip(&held) {
                for (to, sums) in [&mut seen.inputs, &mut seen.gradients].into_iter().zip(held) {
                    let features = sums.as_ref().map_or(0, |sums| sums.elem_count() / 2);
                    let (own, rest) = numbers.split_at(2 * features);
                    numbers = rest;
                    to.resize(to.len().max(features), 0.0);
                    for (to, (first, second)) in to.iter_mut().zip(own.iter().zip(&own[features..])) {
                        *to += f64::from(*first) + f64::from(*second);
                    }
                }
            }
        })?;
        Ok(all)
    }
}

/// Codes where an engine wants them.
#[derive(Clone, Debug)]
pub enum Held {
    /// In this process's memory.
    Host(Arc<Vec<u8>>),
    /// Somewhere that only its engine knows.
    Device(Arc<dyn Opaque>),
}

impl Held {
    /// # Errors
    /// Codes that another engine has.
    pub fn host(&self) -> Result<&[u8]> {
        match self {
            Self::Host(codes) => Ok(codes),
            Self::Device(_) => bail!("codes that lie on a device"),
        }
    }
}

/// A weight `[rows, columns]` in codes, whose grids are trained: `(code - middle) * scale + center` for each group.
#[derive(Clone, Debug)]
pub struct Codes {
    /// `[rows, columns]`.
    pub codes: Held,
    /// Columns that share a scale.
    pub group_size: usize,
    /// The code that decodes to the center.
    pub middle: f32,
    /// `[rows, columns]`: what codes and stored scales and biases decode to.
    pub weight: Tensor,
}

/// What a number is measured in that belongs to a group: `|scale| * factor / divisor`, in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the formula says it")]
pub struct Unit {
    pub factor: f32,
    pub divisor: f32,
}

impl Unit {
    /// Of a group with this scale.
    pub fn of(self, scale: f32) -> f32 {
        scale.abs() * self.factor / self.divisor
    }
}

/// Gradients of one grid, all of the shape `[rows, groups]`.
#[derive(Clone, Copy, Debug)]
pub struct GridSlopes<'g> {
    /// Scales of the groups, which give the units.
    pub scales: &'g Tensor,
    /// With respect to scales and to centers.
    pub slopes: [&'g Tensor; 2],
    /// Of scales and of centers.
    pub units: [Unit; 2],
}

/// A step of Adam (arXiv 1412.6980) without weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// How much of the first and of the second moment stays.
    pub betas: [f32; 2],
    /// What moments that began as zeros are divided by: `1 - beta^steps`, this step among them.
    pub corrections: [f32; 2],
    /// Factor of the gradient.
    pub clip: f32,
    /// How far a number goes, as a part of its unit.
    pub rate: f32,
    /// `None`: 1 for all.
    pub unit: Option<Unit>,
}

/// What a step of Adam is made of, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct AdamInputs<'a> {
    /// The numbers that are trained.
    pub values: &'a Tensor,
    /// First and second moment of their gradient so far.
    pub moments: [&'a Tensor; 2],
    /// Their gradient now.
    pub slopes: &'a Tensor,
    /// Scales of their groups, which give the units.
    pub scales: &'a Tensor,
}

/// Gradients with respect to the scale and the center of each group, from that with respect to the weight.
pub fn by_group(gradient: &[f32], codes: &[u8], group_size: usize, middle: f32) -> (Vec<f32>, Vec<f32>) {
    let groups = gradient.len() / group_size.max(1);
    let (mut scales, mut centers) = (Vec::with_capacity(groups), Vec::with_capacity(groups));
    vectorised(
        #[inline(always)]
        || {
            for (gradient, codes) in gradient.chunks_exact(group_size).zip(codes.chunks_exact(group_size)) {
                let [mut scale, mut center] = [[0f32; LANES]; 2];
                let gradient = gradient.as_chunks::<LANES>().0.iter();
                for (gradient, codes) in gradient.zip(codes.as_chunks::<LANES>().0) {
                    for lane in 0..LANES {
                        scale[lane] += gradient[lane] * (f32::from(codes[lane]) - middle);
                        center[lane] += gradient[lane];
                    }
                }
                scales.push(tree(scale));
                centers.push(tree(center));
            }
        },
    );
    (scales, centers)
}
