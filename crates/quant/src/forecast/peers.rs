//! What mlx-lm's method of the same name would need, by figures that were published or follow from its code.

use serde::Serialize;

use crate::methods::Method;
use crate::walks::Walk;
use crate::{Error, Model};

/// mlx-lm 0.32.2 beside a method of ours.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peer {
    /// Memory, bytes, where it does the model at all.
    pub memory: Option<u64>,
    /// Where the figure comes from, or why there is none.
    pub source: String,
}

/// Model types that `mlx_lm.awq` knows (`mlx_lm/quant/awq.py`, 0.32.2).
const AWQ_TYPES: [&str; 10] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gemma3",
    "deepseek_v2",
    "ministral3",
    "mistral3",
    "llava",
];

/// Bytes a weight: its guide's 6, 14 and 26 GB for 3, 7 and 13 billion weights.
const BASIC: f64 = 2.0;
/// Bytes a weight: its guide's 8, 18 and 32 GB ("advanced") for the same.
const ADVANCED: f64 = 2.55;
/// Bytes a weight: 88.2 GB for 8.03 billion weights.
const DYNAMIC: f64 = 88.2 / 8.03;
/// Bytes a weight: 115 GB for 30.5 billion weights.
const DWQ: f64 = 115.0 / 30.5;

/// Published figures are of models from here on.
const SMALLEST: u64 = 500_000_000;

/// What mlx-lm would need for `method` on a model of `parameters` weights; nothing for methods that it does not have, and for models
/// smaller than those of which figures are known.
///
/// # Errors
/// As [`Walk::open`].
pub fn mlx_lm(method: Method, model: &Model, parameters: u64, bits: u32) -> Result<Option<Peer>, Error> {
    // Activations, not weights, decide of smaller ones.
    if parameters < SMALLEST {
        return Ok(None);
    }
    let scaled = |bytes: f64| Some((parameters as f64 * bytes) as u64);
    let peer = |memory, source: &str| Some(Peer { memory, source: source.to_owned() });
    let model_type = model.config.model_type().unwrap_or_default();
    Ok(match method {
        Method::Rtn => peer(scaled(BASIC), "its guide: 6, 14, 26 GB for 3, 7, 13 billion weights"),
        Method::Awq if !AWQ_TYPES.contains(&model_type) => {
            peer(None, &format!("mlx_lm.awq does not know model type {model_type}"))
        }
        Method::Awq => peer(scaled(ADVANCED), "its guide: 8, 18, 32 GB for 3, 7, 13 billion weights"),
        Method::Gptq if ![2, 4, 8].contains(&bits) => {
            peer(None, &format!("mlx_lm.gptq knows 2, 4 and 8 bits, not {bits}"))
        }
        Method::Gptq => {
            let hessians = hessians(model)?;
            peer(
                scaled(BASIC).map(|weights| weights + hessians),
                "its code: the model, and Hessians of all layers at once",
            )
        }
        Method::Dynamic => peer(scaled(DYNAMIC), "88.2 GB for 8 billion weights (mlx-lm PR 280), by weights"),
        Method::Dwq => peer(scaled(DWQ), "115 GB for 30 billion weights (mlx-lm PR 280), by weights"),
        Method::Search | Method::Refine | Method::Learn => None,
    })
}

/// Bytes of the Hessians that mlx_lm.gptq holds together: one in float32 for each linear, one for all experts of a
/// stack.
fn hessians(model: &Model) -> Result<u64, Error> {
    let walk = Walk::open(model)?;
    let mut sum = 0;
    for block in &walk.decoder.blocks {
        for site in block.sites().iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)) {
            for reader in &site.readers {
                let shape = walk.weights.shape_of(&format!("{}.weight", reader.path))?;
                let size = shape.last().copied().unwrap_or(0) as u64;
                sum += size * size * 4;
            }
        }
    }
    Ok(sum)
}
