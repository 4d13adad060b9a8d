//! Tensors that a forward pass computes with.

use std::collections::BTreeMap;
use std::sync::Arc;

use mlx_quant_engine::{Result, Tensor};

/// A linear that computes in its own way, in the place of a plain product: observed, or trained.
pub trait Reader: Send + Sync + std::fmt::Debug {
    /// `[.., out]` of `x [.., in]`; of stacked weights that of one expert. `bias` is `[out]`.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    fn read(&self, x: &Tensor, expert: Option<usize>, bias: Option<&Tensor>) -> Result<Tensor>;
}

/// Float32 tensors by full name, and readers by module path, which stand above the tensors.
#[derive(Clone, Debug, Default)]
pub struct Parameters(BTreeMap<String, Tensor>, BTreeMap<String, Arc<dyn Reader>>);

impl Parameters {
    /// A tensor, if there is one of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// A tensor.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.get(name).ok_or_else(|| mlx_quant_engine::Error::msg(format!("tensor {name} is missing")))
    }

    /// Adds those of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
        self.1.extend(other.1);
    }

    /// Lets the linear at `path` be computed by `reader`.
    pub fn set_reader(&mut self, path: &str, reader: Arc<dyn Reader>) {
        self.1.insert(path.to_owned(), reader);
    }

    /// What computes the linear at `path`, if not its weight.
    pub fn reader(&self, path: &str) -> Option<&dyn Reader> {
        self.1.get(path).map(|reader| &**reader)
    }

    /// Sets or replaces a tensor.
    pub fn insert(&mut self, name: String, tensor: Tensor) {
        self.0.insert(name, tensor);
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }
}
