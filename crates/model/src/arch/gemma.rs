//! Gemma 1 to 3, text: the Llama shape with tied heads.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Source, drop, drop_inv_freq, llama::LINEARS};

/// Gemma 1 and 2 have no head.
pub(super) fn always_tied(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, "gemma", &LINEARS)?.rules([drop(r"^lm_head\.weight$"), drop_inv_freq()]))
}

/// Gemma 3 is tied when the checkpoint has no head, whatever the config says.
pub(super) fn tied_if_missing(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "gemma3", &LINEARS)
}
