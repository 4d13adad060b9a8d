//! What a family says of a checkpoint: which names change, which tensors are stacked, split or dropped, which
//! weights are linear or embedding layers. Plain data, which `names.rs` applies.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use mlx_format::checkpoint::{Config, Tensor};
use regex::{Captures, Regex};

use super::place::Place;
use super::towers;
use crate::view::Step;

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
    pub(super) fn any_name_ends_with(&self, suffix: &str) -> bool {
        self.tensors.keys().any(|name| name.ends_with(suffix))
    }
}

/// What a source tensor is of an output tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All of it.
    Whole,
    /// One on a new first axis, at the index that the group named `e` in the pattern says.
    Stacked,
    /// One of `of` parts that stand one behind the other on the first axis.
    Joined {
        /// Its place among the parts.
        part: usize,
        /// How many there are.
        of: usize,
    },
}

/// An output tensor that a rule makes.
#[derive(Clone, Debug)]
pub struct Output {
    /// Name, with `$1`, `$2`, ... for the groups of the rule's pattern.
    pub name: Cow<'static, str>,
    /// Applied in order.
    pub steps: Vec<Step>,
    /// What the source tensor is of it.
    pub share: Share,
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
    /// Where the names that the rules make stand: the language model's own place in a wrapper.
    pub place: Place,
    /// Prefix replacements; the first that matches is applied, before the rules.
    pub prefixes: Vec<(&'static str, &'static str)>,
    /// The first that matches decides; without one the tensor keeps its name.
    pub rules: Vec<Rule>,
    /// Linear and embedding layers.
    pub linears: Linears,
    /// Layers with bits of their own.
    pub protected: Vec<Protected>,
    /// Ends of paths of linears that no window of text reaches, so that nothing tells how they should be rounded:
    /// calibrated methods keep them at 8 bits.
    pub unreached: Vec<&'static str>,
    /// Linears that mlx-lm's model leaves as they are (`quant_predicate`), by a pattern of their paths.
    pub unquantized: Option<Regex>,
    /// Ends of names (of paths, if it is a `weight`) of tensors with several axes that are no linears: any other is refused.
    /// `None` where a decoder tells, and all of them are weights and biases.
    pub parameters: Option<Vec<&'static str>>,
    /// Names containing one of these keep the dtype of the file (`cast_predicate`).
    pub keep_dtype: Vec<&'static str>,
    /// Names that end in one of these are float32, whatever the file has.
    pub float32: Vec<&'static str>,
    /// Whether a checkpoint without a head is tied, although no rule drops a head (Gemma 3).
    pub tied_without_head: bool,
    /// The parts that see and hear beside the language model, where they are kept.
    pub towers: Option<Towers>,
    /// Whether the language model stands below `language_model.` in a frame that sees or hears, and only its matrices
    /// are linears.
    pub framed: bool,
}

/// The parts of a checkpoint that see and hear.
#[derive(Clone, Debug)]
pub struct Towers {
    /// Names of these parts, whatever stands before them.
    pub(super) pattern: Regex,
    /// What stands before all of their names in the output.
    pub outer: &'static str,
    /// From names without `model.` to mlx-vlm's; the first that matches decides, without one the name stays.
    pub(super) rules: Vec<Rule>,
    /// Whether mlx-vlm's language model has a head of its own although the model ties it to the embedding: it reads the
    /// table under both names.
    pub repeats_head: bool,
}

impl Towers {
    /// The name of a tensor of these parts without what stands before it; `None` of all others.
    pub(crate) fn inner<'n>(&self, name: &'n str) -> Option<&'n str> {
        let whole = self.pattern.captures(name)?;
        Some(&name[whole.name("outer").map_or(0, |outer| outer.end())..])
    }

    /// The rule for a name that [`Self::inner`] gave.
    pub(crate) fn rule(&self, inner: &str) -> Option<&Rule> {
        self.rules.iter().find(|rule| rule.captures(inner).is_some())
    }
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
            Linears::ByShape => axes == 2 && !towers::is_kept(path) && !self.is_tower(path),
        }
    }

    /// Whether a linear of `axes` axes is what MLX stacks experts in (`SwitchLinear`), and not the heads of latent attention
    /// (`MultiLinear`).
    pub fn is_experts(&self, path: &str, axes: usize) -> bool {
        let heads = ["embed_q", "unembed_out"];
        axes == 3 && self.is_linear(path, axes) && !heads.iter().any(|leaf| ends_with_segments(path, leaf))
    }

    /// Whether a head of its own is dropped, because it is the embedding's table.
    pub fn drops_head(&self) -> bool {
        let heads = ["lm_head.weight", "model.lm_head.weight"];
        self.rules
            .iter()
            .any(|rule| rule.outputs.is_empty() && heads.iter().any(|head| rule.captures(head).is_some()))
    }

    /// Whether a tensor or module belongs to a part that sees or hears.
    pub fn is_tower(&self, name: &str) -> bool {
        towers::is_tower(name) || self.framed && !towers::is_inside(name)
    }

    /// Whether mlx-lm's model leaves the linear at `path` as it is.
    pub fn is_unquantized(&self, path: &str) -> bool {
        self.unquantized.as_ref().is_some_and(|pattern| pattern.is_match(path))
    }

    /// Whether a tensor of `axes` axes that is no linear has a place in the model, as far as anybody knows.
    pub fn has_place(&self, name: &str, axes: usize) -> bool {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let leaf = name.rsplit('.').next().unwrap_or(name);
        match &self.parameters {
            _ if axes < 2 => true,
            Some(parameters) => leaf == "bias" || parameters.iter().any(|end| ends_with_segments(path, end)),
            // Parameters of a described model that are no layer's weight or bias are vectors.
            None => !self.described || matches!(leaf, "weight" | "bias"),
        }
    }

    /// Whether a name of the checkpoint belongs to a head that predicts tokens beyond the next one: a part called `mtp`, or
    /// a layer behind the last one.
    pub fn is_prediction_head(&self, name: &str) -> bool {
        let mut segments = name.split('.');
        if segments.clone().any(|segment| segment.starts_with("mtp")) {
            return true;
        }
        let layer = segments.by_ref().find(|segment| *segment == "layers").and(segments.next());
        let number = layer.and_then(|layer| layer.parse::<usize>().ok());
        self.layers > 0 && number.is_some_and(|number| number >= self.layers)
    }

    /// Whether no window of text reaches the linear at `path`.
    pub fn is_unreached(&self, path: &str) -> bool {
        self.unreached.iter().any(|end| ends_with_segments(path, end))
    }

    /// The protection of the module at `path`, if any.
    pub fn protection(&self, path: &str) -> Option<Protected> {
        self.protected.iter().find(|protected| ends_with_segments(path, protected.path)).copied()
    }
}

/// Whether the last segments of a dotted path are `suffix`; a `#` in it stands for a number.
fn ends_with_segments(path: &str, suffix: &str) -> bool {
    let mut segments = path.rsplit('.');
    suffix.rsplit('.').all(|wanted| {
        let own = segments.next();
        own.is_some_and(|own| own == wanted || wanted == "#" && own.parse::<usize>().is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_later_tokens_have_names_or_numbers() {
        let architecture = Architecture::with_layers("test", 4, &[]);
        for name in [
            "mtp.fc.weight",
            "model.mtp_layers.0.norm.weight",
            "language_model.model.layers.4.eh_proj.weight",
        ] {
            assert!(architecture.is_prediction_head(name), "{name}");
        }
        for name in ["model.layers.3.mlp.up_proj.weight", "model.rotary_emb.inv_freq", "lm_head.weight"] {
            assert!(!architecture.is_prediction_head(name), "{name}");
        }
        assert!(!Architecture::with_layers("test", 0, &[]).is_prediction_head("model.layers.4.a.weight"));
    }

    #[test]
    fn segments_are_whole() {
        assert!(ends_with_segments("model.layers.0.mlp.gate", "mlp.gate"));
        assert!(ends_with_segments("lm_head", "lm_head"));
        assert!(!ends_with_segments("model.xlm_head", "lm_head"));
        assert!(ends_with_segments("model.ngram.embedders.12", "embedders.#"));
        assert!(!ends_with_segments("model.ngram.embedders.x", "embedders.#"));
        assert!(!ends_with_segments("lm_head", "model.lm_head"));
    }
}
