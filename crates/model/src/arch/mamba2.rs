//! Mamba 2: a stack of its mixers alone. What other families' mixers of this kind are drawn from stands here, too.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::rules::{drop_tied_head, turn_convolutions};
use super::sketch::{Sketch, linears};
use crate::decoder::{Block, Branch, Decoder, GroupNorm, Layer, Mamba, Norm, Stage};
use crate::ops::Activation;

const BIASES: &[BiasRule] =
    &[(&["in_proj", "out_proj"], Bias::If("use_bias")), (&["conv1d"], Bias::Unknown), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: BIASES,
    lengths: &[(&["conv1d"], &["conv_kernel"])],
    ..Family::new(&["mamba2"], mamba2, decoder)
}];

const EMBEDDING: &str = "embeddings";
const MIXER: [&str; 2] = ["mixer.in_proj", "mixer.out_proj"];

fn mamba2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&MIXER[..], &[EMBEDDING, "lm_head"]].concat();
    Ok(Architecture::plain(source, "mamba2", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .rules(drop_tied_head(source, true)))
}

/// Under which keys config.json has the sizes of a mixer: heads, features of one, groups, features of B and C.
pub(super) type SizeKeys = [&'static str; 4];

const SIZES: SizeKeys = ["num_heads", "head_dim", "n_groups", "state_size"];

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    silu(sketch, "hidden_act")?;
    let epsilon = sketch.float_or("layer_norm_epsilon", 1e-5);
    let block = |index| {
        let layer = format!("backbone.layers.{index}.");
        let norm = Norm::rms(format!("{layer}mixer.norm"), epsilon);
        let mixer = mixer(sketch, &format!("{layer}mixer."), SIZES)?.normed(norm);
        let mixer = Mamba { step_limits: step_limits(sketch)?, ..mixer };
        let stage = Stage::new(Branch::pre(Norm::rms(format!("{layer}norm"), epsilon), Layer::Mamba(mixer)));
        Ok(Block::new(layer, vec![stage]))
    };
    let blocks = (0..sketch.layers()?).map(block).collect::<Result<_, ConfigError>>()?;
    backbone(sketch, blocks, epsilon)
}

/// A decoder whose embedding and last norm stand in a `backbone`.
pub(super) fn backbone(sketch: Sketch<'_>, blocks: Vec<Block>, epsilon: f64) -> Result<Decoder, ConfigError> {
    let mut decoder = sketch.decoder(Vec::new(), blocks)?;
    decoder.embedding.path = format!("backbone.{EMBEDDING}");
    decoder.norm = Norm::rms("backbone.norm_f", epsilon);
    Ok(decoder)
}

/// The mixer at `module` (with the final dot), without norm and limits of its steps.
pub(super) fn mixer(sketch: Sketch<'_>, module: &str, sizes: SizeKeys) -> Result<Mamba, ConfigError> {
    let [heads, head_dim, groups, state] = sizes;
    let (heads_key, groups_key) = (heads, groups);
    let (heads, groups) = (sketch.count(heads)?, sketch.count_or(groups, 1)?);
    if groups == 0 || heads % groups != 0 {
        return Err(wrong(groups_key, &format!("is {groups}, which does not divide {heads} ({heads_key})")));
    }
    let [input, output] = linears(module, ["in_proj", "out_proj"]);
    let path = |name: &str| format!("{module}{name}");
    Ok(Mamba {
        heads,
        head_dim: sketch.count(head_dim)?,
        groups,
        state: sketch.count(state)?,
        input,
        convolution: path("conv1d"),
        step_bias: path("dt_bias"),
        step_limits: [0.0, f32::INFINITY],
        decay_log: path("A_log"),
        skip: path("D"),
        norm: None,
        gate_last: false,
        output,
    })
}

impl Mamba {
    /// With a norm of each group behind the gate.
    pub(super) fn normed(self, norm: Norm) -> Self {
        Self { norm: Some(GroupNorm { norm, groups: self.groups }), ..self }
    }
}

/// `time_step_limit`: what steps stay within.
pub(super) fn step_limits(sketch: Sketch<'_>) -> Result<[f32; 2], ConfigError> {
    const KEY: &str = "time_step_limit";
    let Some(value) = sketch.config.get(KEY) else { return Ok([0.0, f32::INFINITY]) };
    // What JSON has no number for.
    let named = |value: &Value| value.get("__float__")?.as_str()?.parse::<f64>().ok();
    let number = |value: &Value| value.as_f64().or_else(|| named(value));
    let limits: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(number).collect());
    match limits.as_deref() {
        Some([least, most]) if least <= most => Ok([*least as f32, *most as f32]),
        _ => Err(wrong(KEY, "is no pair of numbers, the smaller one first")),
    }
}

/// Refuses mixers of another activation: mlx-lm has this one alone.
pub(super) fn silu(sketch: Sketch<'_>, key: &str) -> Result<(), ConfigError> {
    match sketch.activation(key, Activation::Silu)? {
        Activation::Silu => Ok(()),
        _ => Err(undescribed(key, "is no silu: mixers that mlx_lm 0.32.2 computes otherwise")),
    }
}
