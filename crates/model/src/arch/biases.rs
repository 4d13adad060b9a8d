//! Which linears have a bias: the model's definition knows, the tensors must agree.
//!
//! The forward pass reads a bias where there is one, so that it needs none of this. mlx_lm does: it stops at a bias too
//! many and at one too few. So a family says of its linears what its file in `mlx_lm/models` says (version 0.32.2,
//! `nn.Linear(.., bias=..)`; transformers says the same).

/// When a linear or a layer norm has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// Where config.json sets this key; none where it is silent.
    If(&'static str),
    /// Unless config.json unsets this key; one where it is silent.
    Unless(&'static str),
    Unknown,
}
use Bias::{Always, If, Never};

/// Last segments of paths, and when linears there have a bias. The first rule that matches counts.
pub(super) type BiasRule = (&'static [&'static str], Bias);

pub(super) const QKV: &[&str] = &["q_proj", "k_proj", "v_proj"];
pub(super) const OUT: &[&str] = &["o_proj"];
pub(super) const NETWORK: &[&str] = &["gate_proj", "up_proj", "down_proj", "gate_up_proj"];

/// Every linear that no rule before matched.
pub(super) const OTHERS: &[&str] = &[];

/// No linear has one.
pub(super) const NONE: &[BiasRule] = &[(OTHERS, Never)];

/// Every linear has one.
pub(super) const ALL: &[BiasRule] = &[(OTHERS, Always)];

/// Every linear but the head has one.
pub(super) const ALL_BUT_HEAD: &[BiasRule] = &[(&["lm_head"], Never), (OTHERS, Always)];

/// The linears of attention, where config.json sets `attention_bias`.
pub(super) const ATTENTION: &[BiasRule] =
    &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (OTHERS, Never)];

/// The linears of attention, where config.json sets `attention_bias`; those of networks, where it sets `mlp_bias`.
pub(super) const ATTENTION_AND_NETWORK: &[BiasRule] =
    &[(QKV, If("attention_bias")), (OUT, If("attention_bias")), (NETWORK, If("mlp_bias")), (OTHERS, Never)];

/// Queries, keys and values have one, others not.
pub(super) const QKV_ALONE: &[BiasRule] = &[(QKV, Always), (OTHERS, Never)];

/// What `rules` say of the linear at `path`.
pub(super) fn of_linear(rules: &[BiasRule], path: &str) -> Bias {
    let last = path.rsplit('.').next().unwrap_or(path);
    let rule = rules.iter().find(|(ends, _)| ends.is_empty() || ends.contains(&last));
    rule.map_or(Bias::Unknown, |(_, bias)| *bias)
}
