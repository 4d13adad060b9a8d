//! What each model type's checkpoint holds and how mlx-lm names it: Rust data, one small file per family.
//!
//! A family is a function from config.json (and the names in the checkpoint) to an [`Architecture`]: which
//! names change, which tensors are stacked, split or dropped, which weights are linear or embedding layers,
//! and which of those mlx-lm protects with more bits. Everything else is derived from that. A model type that
//! reuses a family is a line in the registry.
//!
//! The source of every fact is the model's file in `mlx_lm/models` (its `sanitize`, `quant_predicate`,
//! `cast_predicate` and module tree), version 0.32.2.

mod biases;
pub mod by_names;
mod cohere2;
mod deepseek;
mod gemma;
mod gemma4;
mod glm4;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod hunyuan;
mod lfm2;
mod llama;
mod ministral3;
mod mixtral;
mod nemotron;
mod olmo;
mod phi;
mod qwen;
mod qwen3_next;
mod rope;
mod sketch;
mod smollm3;
mod stablelm;
mod starcoder2;

use std::collections::BTreeMap;
use std::ops::Range;

use mlx_format::checkpoint::{Config, ConfigError, Tensor, is_truthy};
use regex::{Captures, Regex};
use serde_json::Value;

pub(crate) use self::biases::has_bias;
pub use self::sketch::Sketch;
use crate::decoder::Decoder;

/// What a family's function sees.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// config.json.
    pub config: &'a Config,
    /// Names and shapes in the checkpoint.
    pub tensors: &'a BTreeMap<String, Tensor>,
}

impl Source<'_> {
    /// Whether any tensor name ends so.
    fn any_name_ends_with(&self, suffix: &str) -> bool {
        self.tensors.keys().any(|name| name.ends_with(suffix))
    }
}

/// One step of turning a source tensor into an output tensor; none of them touches a value but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Splits the first axis into `[parts, rows / parts]`.
    SplitRows(usize),
    /// Keeps `count` rows (the axis before the last) from `start` on; there are `of`.
    Rows {
        /// First row.
        start: usize,
        /// How many, at least one.
        count: usize,
        /// Length of the axis.
        of: usize,
    },
    /// Keeps every other element of the axis that many places before the last (0 is the last), the odd ones
    /// or the even ones.
    EveryOther {
        /// 0 is the last axis.
        from_last: usize,
        /// Odd ones.
        odd: bool,
    },
    /// One of the two halves of the axis before the last (`false` the first).
    HalfOfRows(bool),
    /// Swaps the last two axes.
    Transpose,
    /// Bytes `[.., n, 16]` read as uint32 `[.., n * 4]`.
    Words,
    /// Adds 1 in the dtype of the file: norms that multiply by `1 + w`.
    AddOne,
}

/// An output tensor that a rule makes.
#[derive(Clone, Debug)]
pub struct Output {
    /// Name, with `$1`, `$2`, ... for the groups of the rule's pattern.
    pub name: &'static str,
    /// Applied in order.
    pub steps: Vec<Step>,
    /// Whether the group named `e` in the pattern is the index on a new first axis.
    pub stacked: bool,
}

/// Source names that match `pattern` become `outputs`; none means that they are dropped.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Matched against the renamed source name.
    pub pattern: Regex,
    /// Only for layers (the pattern's group `l`) in this range.
    pub layers: Range<usize>,
    /// What it becomes.
    pub outputs: Vec<Output>,
}

/// Layers that mlx-lm's model keeps at other bits (`quant_predicate`): affine, whatever the mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protected {
    /// End of the module path.
    pub path: &'static str,
    /// Bits.
    pub bits: u32,
    /// Group size.
    pub group_size: usize,
}

/// Which weights are linear or embedding layers.
#[derive(Clone, Debug)]
pub enum Linears {
    /// Module paths that end in one of these (whole segments).
    Named(Vec<&'static str>),
    /// Any two-dimensional `*.weight` that is not a norm or a router: for types without a description.
    ByShape,
}

/// Everything about a checkpoint that its tensors do not say themselves.
#[derive(Clone, Debug)]
pub struct Architecture {
    /// Family name, for reports.
    pub family: &'static str,
    /// Whether the model type is described, or guessed by names.
    pub described: bool,
    /// Number of decoder layers.
    pub layers: usize,
    /// Prefix replacements; the first that matches is applied, before the rules.
    pub prefixes: Vec<(&'static str, &'static str)>,
    /// The first that matches decides; without one the tensor keeps its name.
    pub rules: Vec<Rule>,
    /// Linear and embedding layers.
    pub linears: Linears,
    /// Layers with bits of their own.
    pub protected: Vec<Protected>,
    /// Names containing one of these keep the dtype of the file (`cast_predicate`).
    pub keep_dtype: Vec<&'static str>,
    /// Whether a checkpoint without a head is tied, although no rule drops a head (Gemma 3).
    pub tied_without_head: bool,
    /// Whether the language model stands below `language_model.` in a frame that sees or hears, and only its matrices are linears.
    pub framed: bool,
}

/// Separate projections of an attention layer.
const ATTENTION: [&str; 4] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];

/// Stacked experts.
const EXPERTS: [&str; 3] = ["switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj"];

/// Experts that every token passes, fused to one.
const SHARED_EXPERTS: [&str; 3] =
    ["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"];

/// A rule pattern; they are constants of this crate.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("rule patterns are valid")
}

/// Tensors that mlx-lm does not load.
fn drop(text: &str) -> Rule {
    drop_in_layers(text, 0..usize::MAX)
}

/// Tensors of some layers (the group `l`) that mlx-lm does not load.
fn drop_in_layers(text: &str, layers: Range<usize>) -> Rule {
    Rule { pattern: pattern(text), layers, outputs: Vec::new() }
}

/// Tensors that become one or more others.
fn make(text: &str, outputs: impl IntoIterator<Item = (&'static str, Vec<Step>)>) -> Rule {
    let outputs = outputs.into_iter().map(|(name, steps)| Output { name, steps, stacked: false }).collect();
    Rule { pattern: pattern(text), layers: 0..usize::MAX, outputs }
}

/// Per-expert tensors stacked on a new first axis; the pattern's group `e` is the expert.
fn stack(text: &str, name: &'static str) -> Rule {
    let outputs = vec![Output { name, steps: Vec::new(), stacked: true }];
    Rule { pattern: pattern(text), layers: 0..usize::MAX, outputs }
}

/// `X.mlp.experts.E.P.weight` (scales and biases too) to `X.mlp.switch_mlp.P.weight`, as most MoE models do.
fn stack_mlp_experts() -> Rule {
    stack(
        r"^(?<x>.*\.mlp)\.experts\.(?<e>\d+)\.(?<p>gate_proj|up_proj|down_proj)\.(?<k>weight|scales|biases)$",
        "$x.switch_mlp.$p.$k",
    )
}

/// Layers from `layers` on: multi-token prediction heads, which mlx-lm does not load.
fn drop_layers_from(layers: usize) -> Rule {
    drop_in_layers(r"^model\.layers\.(?<l>\d+)\.", layers..usize::MAX)
}

/// Precomputed rotary frequencies of old checkpoints.
fn drop_inv_freq() -> Rule {
    drop(r"rotary_emb\.inv_freq")
}

/// The head of a model whose config may tie it to the embedding; `default` is what mlx-lm's model assumes. Like
/// there, the nested config alone counts where there is one, and what is not true in Python is not tied.
fn drop_tied_head(source: Source<'_>, default: bool) -> Vec<Rule> {
    if tied(source.config).unwrap_or(default) {
        vec![drop(r"^(language_model\.)?lm_head\.weight$")]
    } else {
        Vec::new()
    }
}

/// What config.json says of head and embedding being one table; the nested config alone counts where there is one.
pub(crate) fn tied(config: &Config) -> Option<bool> {
    let config = config.0.get("text_config").and_then(Value::as_object).unwrap_or(&config.0);
    config.get("tie_word_embeddings").map(is_truthy)
}

impl Rule {
    /// The groups, if the rule applies to a name.
    pub fn captures<'n>(&self, name: &'n str) -> Option<Captures<'n>> {
        let captures = self.pattern.captures(name)?;
        let layer = captures.name("l").map(|layer| layer.as_str().parse().unwrap_or(usize::MAX - 1));
        layer.is_none_or(|layer| self.layers.contains(&layer)).then_some(captures)
    }
}

impl Architecture {
    /// A family with nothing special: names stay, `linears` are the layers.
    fn plain(
        source: Source<'_>,
        family: &'static str,
        linears: &[&'static str],
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            family,
            described: true,
            layers: source.config.count("num_hidden_layers")?,
            prefixes: Vec::new(),
            rules: vec![drop_inv_freq()],
            linears: Linears::Named(linears.to_vec()),
            protected: Vec::new(),
            keep_dtype: Vec::new(),
            tied_without_head: false,
            framed: false,
        })
    }

    fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }

    fn protect(mut self, paths: &[&'static str]) -> Self {
        self.protected.extend(paths.iter().map(|path| Protected { path, bits: 8, group_size: 64 }));
        self
    }

    fn keep_dtype(mut self, names: &[&'static str]) -> Self {
        self.keep_dtype.extend(names);
        self
    }

    /// The name after prefix replacement.
    pub fn renamed(&self, name: &str) -> String {
        for (from, to) in &self.prefixes {
            if let Some(rest) = name.strip_prefix(from) {
                return format!("{to}{rest}");
            }
        }
        name.to_owned()
    }

    /// Whether the module at `path` with a weight of `axes` axes is a linear or embedding layer.
    pub fn is_linear(&self, path: &str, axes: usize) -> bool {
        match &self.linears {
            Linears::Named(names) => {
                matches!(axes, 2 | 3) && names.iter().any(|name| ends_with_segments(path, name))
            }
            Linears::ByShape => axes == 2 && !by_names::is_kept(path) && !self.is_tower(path),
        }
    }

    /// Whether a head of its own is dropped, because it is the embedding's table.
    pub fn drops_head(&self) -> bool {
        let heads = ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"];
        self.rules
            .iter()
            .any(|rule| rule.outputs.is_empty() && heads.iter().any(|head| rule.captures(head).is_some()))
    }

    /// Whether a tensor or module belongs to a part that sees or hears.
    pub fn is_tower(&self, name: &str) -> bool {
        by_names::is_tower(name) || self.framed && !by_names::is_inside(name)
    }

    /// The protection of the module at `path`, if any.
    pub fn protection(&self, path: &str) -> Option<Protected> {
        self.protected.iter().find(|protected| ends_with_segments(path, protected.path)).copied()
    }
}

/// Whether the last segments of a dotted path are `suffix`.
fn ends_with_segments(path: &str, suffix: &str) -> bool {
    path.strip_suffix(suffix).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A family: the model types that are one, what their checkpoints hold, and how their decoder is built.
struct Family {
    types: &'static [&'static str],
    names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
    decoder: Option<fn(Sketch<'_>) -> Result<Decoder, ConfigError>>,
}

/// A line of the registry.
const fn family(
    types: &'static [&'static str],
    names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
    decoder: fn(Sketch<'_>) -> Result<Decoder, ConfigError>,
) -> Family {
    Family { types, names, decoder: Some(decoder) }
}

const REGISTRY: &[Family] = &[
    family(&["llama", "iquestcoder", "xverse"], llama::llama, llama::decoder),
    family(&["mistral"], llama::llama, llama::mistral),
    family(&["seed_oss"], llama::llama, llama::decoder),
    family(&["smollm3"], llama::llama, smollm3::decoder),
    family(&["ministral3"], llama::llama, ministral3::decoder),
    family(&["qwen2"], llama::llama, qwen::qwen2),
    family(&["qwen3"], llama::llama, qwen::qwen3),
    family(&["olmo2"], llama::llama, olmo::olmo2),
    family(&["olmo3"], llama::untied_by_default, olmo::olmo3),
    family(&["exaone4"], llama::untied_by_default, olmo::exaone4),
    family(&["hunyuan_v1_dense"], llama::untied_by_default, hunyuan::decoder),
    family(&["nemotron"], llama::untied_by_default, nemotron::decoder),
    family(&["ernie4_5"], llama::untied_by_default, llama::ernie),
    family(&["stablelm"], llama::separate_head, stablelm::decoder),
    family(&["granite"], granite::granite, granite::decoder),
    family(&["gemma"], gemma::always_tied, gemma::gemma),
    family(&["gemma2"], gemma::always_tied, gemma::gemma2),
    family(&["gemma3_text"], gemma::tied_if_missing, gemma::gemma3),
    family(&["gemma4_text"], gemma4::gemma4_text, gemma4::decoder),
    family(&["cohere"], cohere2::cohere2, cohere2::cohere),
    family(&["cohere2"], cohere2::cohere2, cohere2::decoder),
    family(&["glm4"], glm4::dense, glm4::dense_decoder),
    family(&["glm4_moe"], glm4::moe, glm4::moe_decoder),
    family(&["phi3"], phi::phi3, phi::phi3_decoder),
    family(&["phi"], phi::phi, phi::phi_decoder),
    family(&["starcoder2"], starcoder2::starcoder2, starcoder2::decoder),
    family(&["gpt2"], gpt2::gpt2, gpt2::decoder),
    family(&["gpt_neox"], gpt_neox::gpt_neox, gpt_neox::decoder),
    family(&["gpt_oss"], gpt_oss::gpt_oss, gpt_oss::decoder),
    family(&["mixtral"], mixtral::mixtral, mixtral::decoder),
    // Its router (sparsemixer) is not described.
    Family { types: &["phimoe"], names: mixtral::phimoe, decoder: None },
    family(&["qwen2_moe"], qwen::qwen2_moe, qwen::qwen2_moe_decoder),
    family(&["qwen3_moe"], qwen::qwen3_moe, qwen::qwen3_moe_decoder),
    family(&["qwen3_next"], qwen3_next::qwen3_next, qwen3_next::decoder),
    family(&["qwen3_5", "qwen3_5_moe"], qwen3_next::qwen3_5, qwen3_next::decoder),
    family(&["deepseek_v2"], deepseek::v2, deepseek::decoder),
    family(&["deepseek_v3", "kimi_k2", "joyai_llm_flash"], deepseek::v3, deepseek::decoder),
    family(&["lfm2"], lfm2::lfm2, lfm2::decoder),
];

fn family_of(model_type: &str) -> Option<&'static Family> {
    REGISTRY.iter().find(|family| family.types.contains(&model_type))
}

/// The architecture of a checkpoint: by `model_type`, else by its tensor names.
///
/// # Errors
/// If config.json lacks what the family needs.
pub fn describe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    match family_of(source.config.model_type()?) {
        Some(family) => (family.names)(source),
        None => Ok(by_names::architecture(source)),
    }
}

/// The decoder of a model; `None` if its type has no description.
///
/// # Errors
/// If config.json lacks what the family needs, or says what it cannot mean.
pub fn decoder(sketch: Sketch<'_>) -> Result<Option<Decoder>, ConfigError> {
    let decoder = family_of(sketch.config.model_type()?).and_then(|family| family.decoder);
    decoder.map(|decoder| decoder(sketch)).transpose()
}

/// The model types that have a description of their names, sorted, and whether they have one of their decoder.
pub fn described() -> Vec<(&'static str, bool)> {
    let types = |family: &'static Family| family.types.iter().map(|name| (*name, family.decoder.is_some()));
    let mut described: Vec<_> = REGISTRY.iter().flat_map(types).collect();
    described.sort_unstable();
    described
}

/// The model types that are described as `model_type` is, itself among them; none if it has no description.
pub fn aliases(model_type: &str) -> &'static [&'static str] {
    family_of(model_type).map_or(&[], |family| family.types)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_whole() {
        assert!(ends_with_segments("model.layers.0.mlp.gate", "mlp.gate"));
        assert!(ends_with_segments("lm_head", "lm_head"));
        assert!(!ends_with_segments("model.xlm_head", "lm_head"));
    }

    #[test]
    fn every_listed_type_is_described() {
        let tensors = BTreeMap::new();
        for (model_type, _) in described() {
            let json = format!(
                r#"{{"model_type": "{model_type}", "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2,
                "qk_nope_head_dim": 2, "v_head_dim": 2}}"#
            );
            let config = Config::parse(json.as_bytes()).unwrap();
            let architecture = describe(Source { config: &config, tensors: &tensors }).unwrap();
            assert!(architecture.described, "{model_type}");
        }
        let config = Config::parse(br#"{"model_type": "new_one"}"#).unwrap();
        assert!(!describe(Source { config: &config, tensors: &tensors }).unwrap().described);
    }
}
