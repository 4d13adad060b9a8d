//! The demo model that is built into mlx-quant, as files in memory.
//!
//! A llama of 7.9 million weights in bfloat16, trained on public-domain and permissively licensed text (see
//! SOURCES.md in this crate), perplexity about 15 on held-out text. It is cut into two shards in two crates,
//! because a published crate may hold 10 MB.

/// File names and contents of the model directory, sorted.
pub const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../files/config.json")),
    ("generation_config.json", include_bytes!("../files/generation_config.json")),
    ("model-00001-of-00002.safetensors", include_bytes!("../files/model-00001-of-00002.safetensors")),
    ("model-00002-of-00002.safetensors", mlx_quant_demo_blocks::SHARD),
    ("model.safetensors.index.json", include_bytes!("../files/model.safetensors.index.json")),
    ("special_tokens_map.json", include_bytes!("../files/special_tokens_map.json")),
    ("tokenizer.json", include_bytes!("../files/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../files/tokenizer_config.json")),
];
