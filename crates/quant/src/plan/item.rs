//! The steps of a plan: what is done to each tensor or layer.

use mlx_format::{FloatType, Scheme};
use mlx_quant_model::View;

/// What is done to one tensor or layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    /// Written as it is, or in another dtype.
    Copy {
        /// The tensor.
        view: View,
        /// Its dtype in the output where it changes (or 1 is added).
        float: Option<FloatType>,
    },
    /// Cast to `float`, then quantized; weight, scales and (affine) biases are written.
    Quantize {
        /// The weight, `[.., out, in]`.
        view: View,
        /// dtype of scales and biases.
        float: FloatType,
        /// How.
        scheme: Scheme,
    },
    /// Decoded from packed form.
    Dequantize {
        /// uint32 codes.
        weight: View,
        /// Scales.
        scales: View,
        /// Biases, affine only.
        biases: Option<View>,
        /// dtype of the result (affine scales and biases are cast to it first, as mlx-lm does).
        float: FloatType,
        /// How it is packed.
        scheme: Scheme,
    },
    /// Written once more under another name, when everything else is.
    Repeat {
        /// Index of the tensor in the layout.
        of: usize,
    },
}

/// One step of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Module path for layers, full name for other tensors.
    pub name: String,
    /// What is done.
    pub job: Job,
    /// Index of its first tensor in the layout; the others follow.
    pub first_output: usize,
}

impl Item {
    /// All views it reads.
    pub fn views(&self) -> impl Iterator<Item = &View> {
        let (first, second, third) = match &self.job {
            Job::Copy { view, .. } | Job::Quantize { view, .. } => (Some(view), None, None),
            Job::Dequantize { weight, scales, biases, .. } => (Some(weight), Some(scales), biases.as_ref()),
            Job::Repeat { .. } => (None, None, None),
        };
        first.into_iter().chain(second).chain(third)
    }
}
