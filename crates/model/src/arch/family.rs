//! Everything that is known of a family of model types. Its file fills this in; shared code asks it, and never asks
//! for a model type by name.

use mlx_format::checkpoint::{Config, ConfigError};

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule};
use super::defaults::Defaults;
use super::keys::{first_width, wrong};
use super::sketch::Sketch;
use crate::decoder::Decoder;

/// Keys of config.json that hold inner widths of experts; of each list the first that is there counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertWidths {
    /// Of a chosen expert; without one, that of dense networks.
    pub(crate) expert: &'static [&'static str],
    /// Of those that every token passes, together.
    pub(crate) shared: &'static [&'static str],
    /// Of one of them; without one, that of a chosen expert.
    pub(crate) of_shared: &'static [&'static str],
    /// How many of them there are; without one, 1.
    pub(crate) count: &'static [&'static str],
}

impl ExpertWidths {
    /// As nearly all have them.
    pub(super) const USUAL: Self = Self {
        expert: &["moe_intermediate_size"],
        shared: &["shared_expert_intermediate_size"],
        of_shared: &[],
        count: &["n_shared_experts", "num_shared_experts"],
    };
}

/// Model types that are described alike.
#[derive(Debug)]
pub(crate) struct Family {
    /// Their names, as `model_type` has them.
    pub(super) types: &'static [&'static str],
    /// What their checkpoints hold.
    pub(super) names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
    /// Builds their decoder; `None` where nobody described it.
    pub(super) decoder: Option<fn(Sketch<'_>) -> Result<Decoder, ConfigError>>,
    /// Numbers that config.json may leave out.
    pub(super) defaults: Defaults,
    /// When a linear has a bias.
    pub(super) biases: &'static [BiasRule],
    /// When a layer norm has a bias; RMS norms have none.
    pub(super) norm_bias: Bias,
    /// Inner width of dense networks.
    pub(super) inner_width: fn(&Config) -> Result<Option<usize>, ConfigError>,
    /// Inner widths of experts.
    pub(super) experts: ExpertWidths,
    /// Key that, where it is not false, makes some networks wider than `inner_width`, which only their tensors tell.
    pub(super) widened_by: Option<&'static str>,
    /// Lengths that the decoder leaves to the tensors: last segments of paths, and the keys of config.json that hold
    /// the length.
    pub(super) lengths: &'static [(&'static [&'static str], &'static [&'static str])],
}

impl Family {
    /// A family with Llama's defaults, of whose biases nothing is known.
    pub(super) const fn new(
        types: &'static [&'static str],
        names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
        decoder: fn(Sketch<'_>) -> Result<Decoder, ConfigError>,
    ) -> Self {
        Self {
            types,
            names,
            decoder: Some(decoder),
            defaults: Defaults::LLAMA,
            biases: &[],
            norm_bias: Bias::Unknown,
            inner_width: |config| first_width(config, &["intermediate_size"]),
            experts: ExpertWidths::USUAL,
            widened_by: None,
            lengths: &[],
        }
    }

    /// A family whose checkpoints are described, and whose decoder nobody described.
    pub(super) const fn rules_only(
        types: &'static [&'static str],
        names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
    ) -> Self {
        Self {
            types,
            names,
            decoder: None,
            defaults: Defaults::LLAMA,
            biases: &[],
            norm_bias: Bias::Unknown,
            inner_width: |config| first_width(config, &["intermediate_size"]),
            experts: ExpertWidths::USUAL,
            widened_by: None,
            lengths: &[],
        }
    }

    /// Whether the linear at `path` (or the layer norm, if it is a `norm`) has a bias; `None` where that is not known.
    pub(crate) fn has_bias(&self, config: &Config, path: &str, norm: bool) -> Option<bool> {
        match if norm { self.norm_bias } else { biases::of_linear(self.biases, path) } {
            Bias::Never => Some(false),
            Bias::Always => Some(true),
            Bias::If(key) => Some(config.bool(key, false)),
            Bias::Unless(key) => Some(config.bool(key, true)),
            Bias::Unknown => None,
        }
    }

    /// Inner width of dense networks; `None` if config.json does not say.
    ///
    /// # Errors
    /// If the key that says it holds no width.
    pub(crate) fn inner_width(&self, config: &Config) -> Result<Option<usize>, ConfigError> {
        (self.inner_width)(config)
    }

    /// Inner widths of chosen experts, and of those that every token passes together; `None` if config.json does not
    /// say.
    ///
    /// # Errors
    /// If a key that says it holds no width.
    pub(crate) fn expert_widths(&self, config: &Config) -> Result<Option<(usize, usize)>, ConfigError> {
        let ExpertWidths { expert, shared, of_shared, count } = self.experts;
        let Some(expert) =
            first_width(config, expert)?.map_or_else(|| self.inner_width(config), |width| Ok(Some(width)))?
        else {
            return Ok(None);
        };
        let together = if let Some(width) = first_width(config, shared)? {
            width
        } else {
            let one = first_width(config, of_shared)?.unwrap_or(expert);
            one.saturating_mul(first_width(config, count)?.unwrap_or(1))
        };
        Ok(Some((expert, together)))
    }

    /// Whether all dense networks have the width that config.json says. Where it is silent, they may not: mlx-lm and
    /// transformers suppose different things.
    pub(crate) fn has_even_widths(&self, config: &Config) -> bool {
        !self.widened_by.is_some_and(|key| config.bool(key, true))
    }

    /// A length of the tensor at `path` that its decoder leaves open.
    ///
    /// # Errors
    /// If config.json does not say it.
    pub(crate) fn length(&self, config: &Config, path: &str) -> Result<usize, ConfigError> {
        let last = path.rsplit('.').next().unwrap_or(path);
        let keys =
            self.lengths.iter().find(|(ends, _)| ends.contains(&last)).map_or(&[][..], |(_, keys)| keys);
        let found = keys.iter().find_map(|key| config.count(key).ok());
        found.ok_or_else(|| {
            let key = keys.first().copied().unwrap_or("config.json");
            wrong(key, &format!("does not say how large {path} is; its weights are needed"))
        })
    }
}
