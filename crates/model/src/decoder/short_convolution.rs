//! LFM2's gated short convolution: `output(c * convolution(b * x))` with b, c, x from one projection.

use super::Linear;

/// A gated short convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct ShortConvolution {
    /// `hidden -> 3 * hidden`: b, c, x.
    pub input: Linear,
    /// Module of the kernel, `[hidden, kernel, 1]`.
    pub convolution: String,
    /// `hidden -> hidden`.
    pub output: Linear,
}
