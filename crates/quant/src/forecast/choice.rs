//! One method at one size, with what it would need and is expected to lose.

use serde::Serialize;

use super::curves::Expected;
use super::{Forecast, Peer};

/// A method, and what it would need.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// As in mlx-lm's guide, or a recipe.
    pub method: String,
    /// KL to the original, in nats per token: an estimate from measured curves; `None` where it cannot be told.
    pub expected_kl: Option<Expected>,
    /// The recipe.
    #[serde(serialize_with = "as_text")]
    pub recipe: crate::Recipe,
    /// Bits of a code, where they are not allocated.
    pub bits: u32,
    /// Bits per weight that are allocated.
    pub target_bpw: Option<f64>,
    /// Calibration windows that are asked for; `None`: as many as are usual.
    pub windows: Option<usize>,
    /// What it needs; `None` if it cannot reach the size.
    pub forecast: Option<Forecast>,
    /// What is compared with the memory that may be used, bytes: the forecast, and as much as it may be too low by.
    pub memory_at_most: Option<u64>,
    /// Why it is out of the question.
    pub obstacle: Option<String>,
    /// mlx-lm's method of the same name.
    pub mlx_lm: Option<Peer>,
}

fn as_text<S: serde::Serializer>(recipe: &crate::Recipe, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(recipe)
}
