//! What a batch of windows takes from block to block.

use std::collections::BTreeMap;

use mlx_quant_engine::Tensor;

/// What goes from block to block, for a batch of windows.
#[derive(Clone, Debug)]
pub struct State {
    /// Residual stream `[batch, tokens, hidden]`; where there are several `[batch, tokens, streams, hidden]`.
    pub hidden: Tensor,
    /// Inputs of every block beside it, `[batch, tokens, blocks, width]`.
    pub(super) per_layer: Option<Tensor>,
    /// Keys and values that later blocks use, by block.
    pub(super) keys: Keys,
}

impl State {
    /// All its tensors under names, from which [`State::from_tensors`] makes it again.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("hidden".to_owned(), self.hidden.clone())];
        tensors.extend(self.per_layer.iter().map(|all| ("per_layer".to_owned(), all.clone())));
        for (block, (k, v)) in &self.keys {
            tensors.push((format!("keys.{block}"), k.clone()));
            tensors.push((format!("values.{block}"), v.clone()));
        }
        tensors
    }

    /// The inverse of [`State::tensors`]; `None` if something is missing.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Option<Self> {
        let mut all: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        let (hidden, per_layer) = (all.remove("hidden")?, all.remove("per_layer"));
        let blocks: Vec<usize> =
            all.keys().filter_map(|name| name.strip_prefix("keys.")?.parse().ok()).collect();
        let mut keys = Keys::new();
        for block in blocks {
            let pair = (all.remove(&format!("keys.{block}"))?, all.remove(&format!("values.{block}"))?);
            keys.insert(block, pair);
        }
        Some(Self { hidden, per_layer, keys })
    }

    /// Bytes of its tensors in float32.
    pub fn bytes(&self) -> usize {
        self.tensors().iter().map(|(_, tensor)| tensor.elem_count() * 4).sum()
    }
}

/// Keys `[batch, tokens, kv_heads, head_dim]` and values, by block.
pub(super) type Keys = BTreeMap<usize, (Tensor, Tensor)>;
