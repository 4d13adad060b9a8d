//! StarCoder 2: the Llama attention with GPT-2's MLP names.

use mlx_format::checkpoint::ConfigError;

use super::{ATTENTION, Architecture, Source, drop_inv_freq, drop_tied_head};

pub(super) fn starcoder2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &["embed_tokens", "mlp.c_fc", "mlp.c_proj", "lm_head"]].concat();
    Ok(Architecture::plain(source, "starcoder2", &linears)?
        .rules([drop_inv_freq()])
        .rules(drop_tied_head(source, true)))
}
