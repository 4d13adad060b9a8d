//! The Llama shape: separate q, k, v, o and a gated or plain MLP. Most dense models are this one under names
//! of their own, with other norms, rotations and biases that do not matter to the names of their weights.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, NETWORK, OTHERS, OUT, QKV};
use super::defaults::Defaults;
use super::family::Family;
use super::rules::{ATTENTION, MLP, drop_tied_head};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Layer};

const SEED_BIASES: &[BiasRule] = &[
    (QKV, Bias::If("attention_bias")),
    (OUT, Bias::If("attention_out_bias")),
    (NETWORK, Bias::If("mlp_bias")),
    (OTHERS, Bias::Never),
];

const ERNIE_BIASES: &[BiasRule] = &[
    (QKV, Bias::If("use_bias")),
    (OUT, Bias::If("use_bias")),
    (NETWORK, Bias::If("use_bias")),
    (OTHERS, Bias::Never),
];

const HELIUM_BIASES: &[BiasRule] =
    &[(QKV, Bias::If("attention_bias")), (NETWORK, Bias::If("mlp_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[
    Family {
        biases: biases::ATTENTION_AND_NETWORK,
        ..Family::new(&["llama", "iquestcoder", "xverse"], llama, decoder)
    },
    Family { biases: biases::ATTENTION_AND_NETWORK, ..Family::new(&["mistral"], llama, mistral) },
    Family { biases: SEED_BIASES, ..Family::new(&["seed_oss"], llama, decoder) },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, ..Defaults::LLAMA },
        biases: ERNIE_BIASES,
        ..Family::new(&["ernie4_5"], untied_by_default, ernie)
    },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-8, rope_theta: 100_000.0, ..Defaults::LLAMA },
        biases: HELIUM_BIASES,
        ..Family::new(&["helium"], separate_head, ernie)
    },
];

/// Linear and embedding layers of the Llama shape.
pub(super) fn linears() -> Vec<&'static str> {
    [&["embed_tokens", "lm_head"][..], &ATTENTION, &MLP].concat()
}

/// Types whose mlx-lm model ties the head unless the config says otherwise.
pub(super) fn llama(source: Source<'_>) -> Result<Architecture, ConfigError> {
    with_head(source, true)
}

/// Types whose mlx-lm model has a head of its own unless the config says otherwise.
pub(super) fn untied_by_default(source: Source<'_>) -> Result<Architecture, ConfigError> {
    with_head(source, false)
}

/// Types that always have a head of their own.
pub(super) fn separate_head(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "llama", &linears())
}

fn with_head(source: Source<'_>, tied_by_default: bool) -> Result<Architecture, ConfigError> {
    Ok(separate_head(source)?.rules(drop_tied_head(source, tied_by_default)))
}

/// Llama, and Mistral with its sliding window.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    plain(sketch, None)
}

/// Where config.json says nothing, Mistral's window is 4096.
fn mistral(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    plain(sketch, sketch.window_or(Some(4096)))
}

fn plain(sketch: Sketch<'_>, window: Option<usize>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let attention = Attention { window, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}

/// ERNIE 4.5, Helium: pairs of neighbours turn.
fn ernie(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let mut decoder = plain(sketch, None)?;
    decoder.ropes = vec![sketch.rope()?.interleaved()];
    Ok(decoder)
}
