//! The second shard of the demo model that is built into mlx-quant; `mlx-quant-demo` is the crate to use.

/// `model-00002-of-00002.safetensors`.
pub const SHARD: &[u8] = include_bytes!("../files/model-00002-of-00002.safetensors");
