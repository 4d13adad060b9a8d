//! How a weight is rounded, in the words of a caller.

use super::way::{Held, Way};
use crate::error::Result;
use crate::gram::Factor;

/// How codes, scales and biases are chosen.
#[derive(Clone, Copy, Debug)]
pub enum How<'h> {
    /// Each group's extremes as in `mx.quantize`, nearest codes to the stored numbers.
    Plain,
    /// Searched grid without data, nearest codes: large weights weigh more, `mean square + square`, because they tend
    /// to meet loud inputs; clipping them is what hurts.
    Blind {
        /// `[columns]`, not negative.
        weights: &'h [f32],
    },
    /// Searched grid without data that stays near that of `mx.quantize`, nearest codes: an edge and zero stay exact,
    /// and edges move a quarter as far. For inputs some of which may be far louder than `weights` say.
    Careful {
        /// `[columns]`, not negative.
        weights: &'h [f32],
        /// Large weights weigh more, as in [`How::Blind`].
        blind: bool,
    },
    /// Searched grid, nearest codes; a weight for each column.
    Nearest {
        /// `[columns]`, not negative.
        weights: &'h [f32],
    },
    /// Searched grid, nearest codes, then sweeps of coordinate descent over scales, biases and codes.
    Refined {
        /// Of the site's Hessian.
        factor: &'h Factor,
        /// Columns between updates of all columns after them.
        block_size: usize,
        /// Sweeps.
        sweeps: usize,
    },
    /// Searched grid, later columns make up for errors of earlier ones.
    Compensated {
        /// Of the site's Hessian.
        factor: &'h Factor,
        /// Columns between updates of all columns after them.
        block_size: usize,
        /// Sweeps of coordinate descent afterwards.
        sweeps: usize,
    },
}

impl<'h> How<'h> {
    /// With upper factor and Hessian as `moved` has them, if it does.
    ///
    /// # Errors
    /// A factor of another engine's that was not moved.
    pub(crate) fn at_hand(self, moved: Option<(&'h [f32], &'h [f32])>) -> Result<Way<'h>> {
        let held = |factor: &'h Factor| {
            let (upper, hessian) = match moved {
                Some(moved) => moved,
                None => (factor.upper.host()?, factor.hessian.host()?),
            };
            Ok(Held { order: &factor.order, upper, hessian })
        };
        Ok(match self {
            Self::Plain => Way::Plain,
            Self::Blind { weights } => Way::Blind { weights },
            Self::Careful { weights, blind } => Way::Careful { weights, blind },
            Self::Nearest { weights } => Way::Nearest { weights },
            Self::Refined { factor, block_size, sweeps } => {
                Way::Refined { factor: held(factor)?, block_size, sweeps }
            }
            Self::Compensated { factor, block_size, sweeps } => {
                Way::Compensated { factor: held(factor)?, block_size, sweeps }
            }
        })
    }
}
