//! IBM Granite: the Llama shape; mlx-lm keeps output projections and the head at 8 bits, because their small
//! values underflow the scales of the fp modes.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, llama};

pub(super) fn granite(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = llama::llama(source)?.protect(&["self_attn.o_proj", "mlp.down_proj", "lm_head"]);
    architecture.family = "granite";
    Ok(architecture)
}
