//! The words in which a family says what its checkpoints hold: rules, and the names that most families share.

use std::borrow::Cow;
use std::ops::Range;

use mlx_format::checkpoint::{Config, ConfigError, is_truthy};
use regex::Regex;
use serde_json::Value;

use super::architecture::{Architecture, Linears, Output, Protected, Rule, Share, Source};
use super::place::Place;
use crate::view::Step;

/// The linears of a gated network below a path.
macro_rules! gated {
    ($path:literal) => {
        [concat!($path, ".gate_proj"), concat!($path, ".up_proj"), concat!($path, ".down_proj")]
    };
}
pub(super) use gated;

/// Separate projections of an attention layer: queries, keys, values, output.
pub(super) const ATTENTION: [&str; 4] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];

/// The gated network of a dense layer.
pub(super) const MLP: [&str; 3] = gated!("mlp");

/// Stacked experts.
pub(super) const EXPERTS: [&str; 3] = gated!("switch_mlp");

/// Stacked experts, where they keep the hub's name.
pub(super) const PLAIN_EXPERTS: [&str; 3] = gated!("experts");

/// Experts that every token passes, fused to one.
pub(super) const SHARED_EXPERTS: [&str; 3] = gated!("shared_experts");

/// A rule pattern; they are constants of this crate.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("rule patterns are valid")
}

/// Tensors that mlx-lm does not load.
pub(super) fn drop(text: &str) -> Rule {
    drop_in_layers(text, 0..usize::MAX)
}

/// Tensors of some layers (the group `l`) that mlx-lm does not load.
pub(super) fn drop_in_layers(text: &str, layers: Range<usize>) -> Rule {
    Rule { pattern: pattern(text), layers, outputs: Vec::new() }
}

/// Tensors that become one or more others.
pub(super) fn make<N: Into<Cow<'static, str>>>(
    text: &str,
    outputs: impl IntoIterator<Item = (N, Vec<Step>)>,
) -> Rule {
    let outputs = outputs
        .into_iter()
        .map(|(name, steps)| Output { name: name.into(), steps, share: Share::Whole })
        .collect();
    Rule { pattern: pattern(text), layers: 0..usize::MAX, outputs }
}

/// Per-expert tensors stacked on a new first axis; the pattern's group `e` is the expert.
pub(super) fn stack(text: &str, name: &'static str) -> Rule {
    let outputs = vec![Output { name: name.into(), steps: Vec::new(), share: Share::Stacked }];
    Rule { pattern: pattern(text), layers: 0..usize::MAX, outputs }
}

/// Tensors that stand one behind the other in another: what matches a pattern of `texts` is one of its parts, in that order.
pub(super) fn join<const N: usize>(
    parts: [(&str, Vec<Step>); N],
    name: &'static str,
) -> impl Iterator<Item = Rule> {
    parts.into_iter().enumerate().map(move |(part, (text, steps))| {
        let output = Output { name: name.into(), steps, share: Share::Joined { part, of: N } };
        Rule { pattern: pattern(text), layers: 0..usize::MAX, outputs: vec![output] }
    })
}

/// Convolutions along time, `[channels, 1, kernel]` as transformers stores them; MLX's own form is `[channels, kernel, 1]`.
/// `end` is a pattern of the path's end.
pub(super) fn turn_convolutions(source: Source<'_>, end: &str) -> Option<Rule> {
    let text = format!(r"^(?<x>.*{end}\.weight)$");
    let ends = pattern(&text);
    let untouched = source.tensors.iter().any(|(name, tensor)| {
        matches!(tensor.shape[..], [_, _, kernel] if kernel != 1) && ends.is_match(name)
    });
    untouched.then(|| make(&text, [("$x", vec![Step::Transpose])]))
}

/// `kv_b_proj` by heads: the part that embeds queries (turned) and the one that makes values.
pub(super) fn split_kv_b(source: Source<'_>) -> Result<Option<Rule>, ConfigError> {
    let heads = source.config.count("num_attention_heads")?;
    let (nope, value) = (source.config.count("qk_nope_head_dim")?, source.config.count("v_head_dim")?);
    let rows = |start, count| Step::Rows { start, count, of: nope + value };
    let split = make(
        r"^(?<x>.*)\.kv_b_proj\.weight$",
        [
            ("$x.embed_q.weight", vec![Step::SplitRows(heads), rows(0, nope), Step::Transpose]),
            ("$x.unembed_out.weight", vec![Step::SplitRows(heads), rows(nope, value)]),
        ],
    );
    // Packed words cannot be turned: older MLX models keep the joint form, which mlx-lm splits as it loads.
    let joint = source.any_name_ends_with(".kv_b_proj.scales");
    Ok((!joint).then_some(split))
}

/// `X.mlp.experts.E.P.weight` (scales and biases too) to `X.mlp.switch_mlp.P.weight`, as most MoE models do.
pub(super) fn stack_mlp_experts() -> Rule {
    stack(
        r"^(?<x>.*\.mlp)\.experts\.(?<e>\d+)\.(?<p>gate_proj|up_proj|down_proj)\.(?<k>weight|scales|biases)$",
        "$x.switch_mlp.$p.$k",
    )
}

/// The experts w1 (gate), w2 (down) and w3 (up) of a module, stacked in its `switch_mlp`.
pub(super) fn stack_w_experts(module: &str) -> [Rule; 3] {
    [
        ("w1", "$x.switch_mlp.gate_proj.$k"),
        ("w2", "$x.switch_mlp.down_proj.$k"),
        ("w3", "$x.switch_mlp.up_proj.$k"),
    ]
    .map(|(own, name)| {
        let text = format!(r"^(?<x>.*\.{module})\.experts\.(?<e>\d+)\.{own}\.(?<k>weight|scales|biases)$");
        stack(&text, name)
    })
}

/// Experts of all layers in two tensors, `[experts, 2 * inner, hidden]` (gate, then up) and `[experts, hidden,
/// inner]`, as parts of `$x.switch_mlp`.
pub(super) fn split_fused_experts() -> [Rule; 2] {
    [
        make(
            r"^(?<x>.*\.mlp)\.experts\.gate_up_proj$",
            [
                ("$x.switch_mlp.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                ("$x.switch_mlp.up_proj.weight", vec![Step::HalfOfRows(true)]),
            ],
        ),
        make(r"^(?<x>.*\.mlp)\.experts\.down_proj$", [("$x.switch_mlp.down_proj.weight", vec![])]),
    ]
}

/// `X.mlp.experts.E.P.weight` (scales and biases too) to `X.mlp.experts.P.weight`.
pub(super) fn stack_experts_in_place() -> Rule {
    stack(
        r"^(?<x>.*\.mlp\.experts)\.(?<e>\d+)\.(?<p>gate_proj|up_proj|down_proj)\.(?<k>weight|scales|biases)$",
        "$x.$p.$k",
    )
}

/// Layers from `layers` on: multi-token prediction heads, which mlx-lm does not load.
pub(super) fn drop_layers_from(layers: usize) -> Rule {
    drop_in_layers(r"^model\.layers\.(?<l>\d+)\.", layers..usize::MAX)
}

/// Precomputed rotary frequencies of old checkpoints.
pub(super) fn drop_inv_freq() -> Rule {
    drop(r"rotary_emb\.inv_freq")
}

/// The head of a model whose config may tie it to the embedding; `default` is what mlx-lm's model assumes. Like
/// there, what is not true in Python is not tied.
pub(super) fn drop_tied_head(source: Source<'_>, default: bool) -> Vec<Rule> {
    if tied(source.config).unwrap_or(default) {
        vec![drop(r"^(language_model\.)?lm_head\.weight$")]
    } else {
        Vec::new()
    }
}

/// What config.json says of head and embedding being one table; the nested config alone counts where there is one.
pub(super) fn tied(config: &Config) -> Option<bool> {
    let config = config.0.get("text_config").and_then(Value::as_object).unwrap_or(&config.0);
    config.get("tie_word_embeddings").map(is_truthy)
}

impl Architecture {
    /// A family with nothing special: names stay, `linears` are the layers.
    pub(super) fn plain(
        source: Source<'_>,
        family: &'static str,
        linears: &[&'static str],
    ) -> Result<Self, ConfigError> {
        let layers = source.config.count("num_hidden_layers")?;
        Ok(Self::with_layers(family, layers, linears).rules([drop_inv_freq()]))
    }

    /// The same for configs that count their layers under another key; no rules.
    pub(super) fn with_layers(family: &'static str, layers: usize, linears: &[&'static str]) -> Self {
        Self {
            family,
            described: true,
            layers,
            place: Place::ALONE,
            prefixes: Vec::new(),
            rules: Vec::new(),
            linears: Linears::Named(linears.to_vec()),
            protected: Vec::new(),
            unreached: Vec::new(),
            unquantized: None,
            parameters: None,
            keep_dtype: Vec::new(),
            float32: Vec::new(),
            tied_without_head: false,
            towers: None,
            framed: false,
        }
    }

    pub(super) fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }

    pub(super) fn protect(mut self, paths: &[&'static str]) -> Self {
        self.protected.extend(paths.iter().map(|path| Protected { path, bits: 8, group_size: 64 }));
        self
    }

    /// Leaves the linears whose paths match as they are.
    pub(super) fn leave(mut self, text: &str) -> Self {
        self.unquantized = Some(pattern(text));
        self
    }

    /// Names all tensors with several axes that are no linears; see the field.
    pub(super) fn parameters(mut self, names: &[&'static str]) -> Self {
        self.parameters = Some(names.to_vec());
        self
    }

    pub(super) fn keep_dtype(mut self, names: &[&'static str]) -> Self {
        self.keep_dtype.extend(names);
        self
    }
}
