//! What loads the models that are written.

/// A library that loads models from their files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// mlx-lm, the language model alone.
    MlxLm,
    /// mlx-vlm, with what sees and hears.
    MlxVlm,
}

impl Loader {
    /// Its name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Self::MlxLm => "mlx_lm",
            Self::MlxVlm => "mlx_vlm",
        }
    }
}
