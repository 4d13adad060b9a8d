//! State space models, alone or between layers of attention.

use mlx_format::checkpoint::ConfigError;

use super::words::{EMBEDDING_AND_HEAD, named};
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::rules::{ATTENTION, EXPERTS, gated, stack, turn_convolutions};

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["mamba", "falcon_mamba"], mamba),
    Family::rules_only(&["jamba"], jamba),
    Family::rules_only(&["plamo2"], plamo2),
];

const FEED_FORWARD: [&str; 3] = gated!("feed_forward");
const MAMBA: [&str; 2] = ["mamba.in_proj", "mamba.out_proj"];

/// A stack of mixers alone.
fn mamba(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mixer = ["mixer.in_proj", "mixer.out_proj", "mixer.x_proj", "mixer.dt_proj"];
    Ok(named(source, "mamba", &[&mixer, &["embeddings", "lm_head"]])?
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["conv1d", "A_log"])
        .tied(source, true))
}

fn jamba(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        &ATTENTION[..],
        &MAMBA,
        &["mamba.x_proj", "mamba.dt_proj", "feed_forward.router"],
        &FEED_FORWARD,
        &EXPERTS,
        &EMBEDDING_AND_HEAD,
    ];
    let experts = stack(
        r"^(?<x>.*\.feed_forward)\.experts\.(?<e>\d+)\.(?<p>\w+)\.(?<k>weight|bias|scales|biases)$",
        "$x.switch_mlp.$p.$k",
    );
    Ok(named(source, "jamba", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .rules([experts])
        .protect(&["feed_forward.router"])
        .parameters(&["conv1d", "A_log"])
        .tied(source, true))
}

fn plamo2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mixer = ["in_proj", "bcdt_proj", "dt_proj", "out_proj", "qkv_proj", "o_proj"];
    let linears = [&mixer[..], &["mlp.gate_up_proj", "mlp.down_proj"], &EMBEDDING_AND_HEAD];
    Ok(named(source, "plamo2", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["conv1d", "q_weight", "k_weight"])
        .tied(source, true))
}
