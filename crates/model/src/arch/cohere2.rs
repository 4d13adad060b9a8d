//! Cohere Command: parallel blocks in the Llama shape, always tied.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, drop, drop_inv_freq, llama::LINEARS};

pub(super) fn cohere2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, "cohere", &LINEARS)?.rules([drop(r"^lm_head\.weight$"), drop_inv_freq()]))
}
