//! The matrix that a layer multiplies by.

/// A matrix `path.weight` `[out, in]`, with `path.bias` `[out]` where the checkpoint has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Linear {
    /// Module path.
    pub path: String,
}

impl Linear {
    /// The linear at a path.
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into() }
    }
}
