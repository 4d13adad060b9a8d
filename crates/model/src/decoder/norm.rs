//! Norms.

/// What a norm computes over the last axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * w`.
    Rms,
    /// `(x - mean) / sqrt(var + eps) * w + b`; the bias where the checkpoint has one.
    Layer,
}

/// A norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Module path; `None` for one without a weight. With `{head}` in it, the weights of several norms
    /// (one per head) stand under numbered names.
    pub path: Option<String>,
    /// What it computes.
    pub kind: NormKind,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether the factor is `1 + w` (Gemma, Nemotron).
    pub plus_one: bool,
}

impl Norm {
    /// RMS norm.
    pub fn rms(path: impl Into<String>, epsilon: f64) -> Self {
        Self { path: Some(path.into()), kind: NormKind::Rms, epsilon, plus_one: false }
    }

    /// Layer norm.
    pub fn layer(path: impl Into<String>, epsilon: f64) -> Self {
        Self { kind: NormKind::Layer, ..Self::rms(path, epsilon) }
    }

    /// With the factor `1 + w`.
    #[must_use]
    pub fn plus_one(mut self) -> Self {
        self.plus_one = true;
        self
    }
}
