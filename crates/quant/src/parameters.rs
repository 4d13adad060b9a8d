//! Parameters as mlx-lm counts them, so that bits per weight compare: those of innermost modules only
//! (`mlx_lm/utils.py`, `get_total_parameters`), and of packed weights the codes, not scales and biases.

use std::collections::BTreeSet;

/// Modules that hold other modules.
#[derive(Debug)]
pub(crate) struct OuterModules(BTreeSet<String>);

impl OuterModules {
    /// Of a model with tensors of these names.
    pub(crate) fn of<'n>(names: impl Iterator<Item = &'n str>) -> Self {
        let mut outer = BTreeSet::new();
        for name in names {
            // The module that holds the tensor is itself held by all modules above it.
            let mut path = name.rsplit_once('.').map_or("", |(module, _)| module);
            while let Some((above, _)) = path.rsplit_once('.') {
                if !outer.insert(above.to_owned()) {
                    break;
                }
                path = above;
            }
        }
        Self(outer)
    }

    /// Parameters that a tensor stored plainly counts for.
    pub(crate) fn plain(&self, name: &str, elements: usize) -> u64 {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        if self.0.contains(module) { 0 } else { elements as u64 }
    }

    /// Parameters that a packed weight counts for, by its shape after decoding.
    pub(crate) fn packed(shape: &[usize]) -> u64 {
        shape.iter().map(|axis| *axis as u64).product()
    }
}

/// Stored bits per weight of a whole model.
pub(crate) fn bits_per_weight(tensor_bytes: u64, parameters: u64) -> f64 {
    tensor_bytes as f64 * 8.0 / parameters.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_innermost_modules_count() {
        let names = ["model.layers.0.self_attn.sinks", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"];
        let modules = OuterModules::of(names.into_iter());
        assert_eq!(names.map(|name| modules.plain(name, 3)), [0, 3, 3]);
    }
}
