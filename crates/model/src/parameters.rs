//! Tensors that a forward pass computes with.

use std::collections::BTreeMap;

use candle_core::Tensor;

/// Float32 tensors by full name.
#[derive(Clone, Debug, Default)]
pub struct Parameters(BTreeMap<String, Tensor>);

impl Parameters {
    /// A tensor, if there is one of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// A tensor.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, name: &str) -> candle_core::Result<&Tensor> {
        self.get(name).ok_or_else(|| candle_core::Error::msg(format!("tensor {name} is missing")))
    }

    /// Adds those of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Sets or replaces a tensor.
    pub fn insert(&mut self, name: String, tensor: Tensor) {
        self.0.insert(name, tensor);
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Bytes of all tensors in float32.
    pub fn bytes(&self) -> usize {
        self.0.values().map(|tensor| tensor.elem_count() * 4).sum()
    }
}
