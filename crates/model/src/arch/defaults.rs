//! Numbers that config.json may leave out.

/// What transformers takes where config.json says nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    /// `rms_norm_eps`.
    pub(super) rms_norm_eps: f64,
    /// `rope_theta`.
    pub(super) rope_theta: f64,
    /// `head_dim`; where there is none, the hidden size is shared out to the heads.
    pub(super) head_dim: Option<usize>,
    /// `first_k_dense_replace`: dense layers below those with experts.
    pub(super) dense_layers: usize,
}

impl Defaults {
    /// Those of Llama, and of most others.
    pub(super) const LLAMA: Self =
        Self { rms_norm_eps: 1e-6, rope_theta: 10_000.0, head_dim: None, dense_layers: 0 };
}
