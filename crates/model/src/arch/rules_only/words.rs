//! What the types here share.

use mlx_format::checkpoint::ConfigError;

use crate::arch::architecture::{Architecture, Source};
use crate::arch::rules::{drop_inv_freq, drop_tied_head};

pub(super) const EMBEDDING_AND_HEAD: [&str; 2] = ["embed_tokens", "lm_head"];

/// A type whose names stay as they are: linears by groups.
pub(super) fn named(
    source: Source<'_>,
    family: &'static str,
    linears: &[&[&'static str]],
) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, family, &linears.concat())?.parameters(&[]))
}

/// The same for configs that count their layers under another key, or not at all.
pub(super) fn counted_by(
    source: Source<'_>,
    key: &str,
    family: &'static str,
    linears: &[&[&'static str]],
) -> Result<Architecture, ConfigError> {
    let layers = if source.config.get(key).is_some() { source.config.count(key)? } else { 0 };
    let architecture = Architecture::with_layers(family, layers, &linears.concat());
    Ok(architecture.rules([drop_inv_freq()]).parameters(&[]))
}

impl Architecture {
    /// The head may be the embedding's table; `default` is what mlx-lm's model supposes.
    pub(super) fn tied(self, source: Source<'_>, default: bool) -> Self {
        self.rules(drop_tied_head(source, default))
    }
}
