//! Numbers that config.json may leave out.

/// What transformers takes where config.json says nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    /// `rms_norm_eps`.
    pub(super) rms_norm_eps: f64,
    /// `rope_theta`.
    pub(super) rope_theta: f64,
}

impl Defaults {
    /// Those of Llama, and of most others.
    pub(super) const LLAMA: Self = Self { rms_norm_eps: 1e-6, rope_theta: 10_000.0 };
}
