//! What is asked of a plan.

use std::collections::BTreeMap;

use mlx_format::{FloatType, Scheme};

use super::{MixedRecipe, Overrides};

/// What becomes of layers that another quantizer has packed and MLX holds exactly, where a model is quantized; without a scheme they
/// are taken over, unless they are to be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PackedSource {
    /// Decoded, and rounded as all others.
    #[default]
    Decode,
    /// Taken over where the scheme that is asked for is their own; decoded and rounded elsewhere.
    Match,
    /// Taken over, whatever the scheme of the others.
    Keep,
}

/// What is to be done with a model.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices")]
pub struct Settings {
    /// Quantize with this scheme.
    pub quantize: Option<Scheme>,
    /// With a mixed-bit recipe (affine; its bits replace those of the scheme).
    pub mixed: Option<MixedRecipe>,
    /// Per-layer settings.
    pub overrides: Option<Overrides>,
    /// Schemes of single modules by path, below those of `overrides`.
    pub schemes: BTreeMap<String, Scheme>,
    /// Keep at 8 bits, in groups of the scheme's size, what no window of text reaches (indexers): nothing would tell how to
    /// round it. For calibrated methods; mlx-lm's own `quantize` rounds it as all others.
    pub keep_unreached: bool,
    /// Search scales and biases instead of taking them from each group's extremes; same format, same size.
    pub search: bool,
    /// With nvfp4: a float32 for each of stacked experts, over which its scales are spread (`global_scale` of mlx_lm's
    /// `quantize_model`, read by mlx_lm 0.32.2 and later).
    pub global_scale: bool,
    /// What becomes of layers that another quantizer has packed.
    pub packed: PackedSource,
    /// Decode a quantized model.
    pub dequantize: bool,
    /// dtype of what is not quantized, and of scales and biases; default: config.json's `torch_dtype`.
    pub dtype: Option<FloatType>,
    /// Every tensor in the dtype that it has, whatever config.json says.
    pub keep_dtypes: bool,
    /// Store NaN and infinity as MLX does instead of refusing them.
    pub allow_nonfinite: bool,
    /// Carry tensors along that no part of the model reads instead of refusing them.
    pub allow_unread: bool,
    /// Leave out what sees and hears, and the files that only that needs.
    pub text_only: bool,
    /// Keep multi-token-prediction heads, as a drafter beside the output, at 8 bits where the model is quantized: plan it
    /// (`Plan::drafter`), for [`crate::drafter::write()`] to write.
    pub mtp: bool,
    /// Take end-of-turn tokens as mlx-lm does, from generation_config.json alone or else from config.json.
    pub keep_eos: bool,
}
