//! What learned rounding asks of an engine: a part of what every engine is.

use mlx_format::{FloatType, Scheme};

use crate::Tensor;
use crate::error::Result;
use crate::settings::Held;

/// Where the rounding of a weight `[rows, columns]` begins, in the affine mode: what steps do not change.
#[derive(Clone, Debug)]
pub struct LearningStart {
    /// Bits and group size.
    pub scheme: Scheme,
    /// dtype of stored scales and biases.
    pub float: FloatType,
    /// Codes, `[rows, columns]`.
    pub codes: Held,
    /// Scales, `[rows, groups]`.
    pub scales: Tensor,
    /// What the lowest and the highest code decode to, as `scales`.
    pub ranges: [Tensor; 2],
}

impl LearningStart {
    /// The largest code.
    pub fn most(&self) -> f32 {
        ((1u32 << self.scheme.bits()) - 1) as f32
    }
}

/// What steps of learned rounding change.
#[derive(Clone, Debug)]
pub struct LearningState {
    /// Where each weight stands on its group's grid, in steps between codes, `[rows, columns]`: the nearest code is its
    /// code.
    pub positions: Tensor,
    /// What the ends of each group's range are multiplied by, as [`LearningStart::ranges`].
    pub factors: [Tensor; 2],
}

/// Rounding that is learned by steps against a gradient (SignRound, arXiv 2309.05516), and what its loss leaves out.
///
/// No gradient passes these operations. They fail where shapes do not fit together, where codes are another engine's,
/// and if the device has no room. What an engine gives for a grid, a weight or codes is the same to the bit everywhere.
pub trait Learning {
    /// Scales and biases of groups as a file holds them, `[rows, groups]` each. With `low` and `high` what the ends of
    /// a range have gained, `end * (factor - 1)`, they are `round(scale + (high - low) / most)` and
    /// `round(lowest + low)`, one operation after the other.
    ///
    /// # Errors
    /// As said of all.
    fn learned_grid(&self, start: &LearningStart, factors: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        crate::plain::learned_grid(start, factors)
    }

    /// What a weight decodes to now, `[rows, columns]`: `code * scale + bias`, a product that is rounded and then a
    /// sum, of codes that are positions rounded, halves away from zero.
    ///
    /// # Errors
    /// As said of all.
    fn learned_weight(&self, start: &LearningStart, state: &LearningState) -> Result<Tensor> {
        crate::plain::learned_weight(start, state)
    }

    /// The codes of positions `[rows, columns]`.
    ///
    /// # Errors
    /// As said of all.
    fn learned_codes(&self, scheme: Scheme, positions: &Tensor) -> Result<Held> {
        crate::plain::learned_codes(scheme, positions)
    }

    /// So many codes as numbers of this process.
    ///
    /// # Errors
    /// As said of all; if the device does not answer.
    fn fetch_codes(&self, codes: &Held, count: usize) -> Result<Vec<u8>> {
        crate::plain::fetch_codes(codes, count)
    }

    /// A step against a loss's `gradient [rows, columns]` with respect to what a weight decodes to: positions move by
    /// `rate` on the mean over a group, each in proportion to its gradient, by `4 * rate` at most and no farther than
    /// one from the code that they began with; ends of ranges by `rate` as a part of them, against the sign of their
    /// gradient. In place if no other tensor has the state's buffers.
    ///
    /// # Errors
    /// As said of all; the state may be half changed then.
    fn learning_step(
        &self,
        start: &LearningStart,
        state: &mut LearningState,
        gradient: &Tensor,
        rate: f32,
    ) -> Result<()> {
        crate::plain::learning_step(start, state, gradient, rate)
    }

    /// `x` with zeros in the places of its `count` largest sizes, and of all that are as large as the least of these.
    ///
    /// # Errors
    /// As said of all; more than there are.
    fn without_largest(&self, x: &Tensor, count: usize) -> Result<Tensor> {
        crate::plain::without_largest(x, count)
    }
}
