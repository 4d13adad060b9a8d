//! Model types without a description: names stay as they are, and shapes tell which weights are linears.
//!
//! That is right for most dense models and wrong for others, so what is known to end badly is listed here and refused
//! before any work, and nothing is promised of the rest. The facts about mlx-lm are those of version 0.32.2, measured
//! by converting a small checkpoint of each type with both programs.

use std::collections::BTreeMap;

use super::architecture::{Architecture, Linears, Rule, Source};
use super::rules::{drop, drop_tied_head};
use super::towers::{TOWERS, is_inside};
use crate::{View, known};

/// Parts of a name (in lower case) that adapters, quantizers and trainings leave beside a model's own weights.
const LEFTOVERS: [&str; 12] = [
    "absmax",
    "base_layer",
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
    "nested_absmax",
    "nested_quant_map",
    "optimizer",
    "original_module",
    "quant_map",
    "quant_state",
    "scb",
];

/// Beginnings of such parts.
const LEFTOVER_BEGINNINGS: [&str; 8] =
    ["dora_", "hada_w", "ia3_l", "lokr_", "lora_", "modules_to_save", "prompt_encoder", "vera_lambda"];

/// Heads of models that write no text; they stand first in a name.
const OTHER_HEADS: [&str; 7] =
    ["classification_head", "classifier", "regression_head", "reward_head", "score", "v_head", "value_head"];

/// Types that mlx-lm does not load, or not rightly, once they were quantized by tensor names, and why.
const DO_NOT_LOAD: [(&str, &str); 5] = [
    ("afm7", "it cannot quantize this type itself"),
    ("bitnet", "its linears are packed in a form of their own"),
    ("deepseek_v41", "its matrices come as fp8 and fp4 blocks, and parts of it stay float32"),
    ("deepseek_v41_text", "its matrices come as fp8 and fp4 blocks, and parts of it stay float32"),
    ("lfm2-vl", "it has no name for these weights"),
];

/// Why a tensor must not be quantized by its name alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// One expert's matrix of several, which mlx-lm wants in one tensor.
    NumberedExpert,
    /// Matrices stacked in one tensor, which would stay unquantized.
    Stacked,
}

pub(super) fn architecture(source: Source<'_>) -> Architecture {
    let highest = source.tensors.keys().filter_map(|name| {
        let mut segments = name.split('.');
        segments.find(|segment| matches!(*segment, "layers" | "h" | "blocks"))?;
        segments.next()?.parse::<usize>().ok()
    });
    let layers =
        source.config.count("num_hidden_layers").ok().or_else(|| highest.max().map(|layer| layer + 1));
    let plain = Architecture::with_layers("by tensor names", layers.unwrap_or(0), &[]);
    Architecture {
        described: false,
        linears: Linears::ByShape,
        framed: wraps(source) && source.tensors.keys().any(|name| name.contains("language_model.")),
        ..plain
            .rules(drop_tied_head(source, false))
            .rules(drop_towers(source))
            .keep_dtype(&["e_score_correction_bias", "A_log"])
    }
}

/// mlx-lm runs the language model of its wrappers alone, and drops the rest as it loads.
fn drop_towers(source: Source<'_>) -> Option<Rule> {
    source.config.model_type().ok().filter(|name| known::model_type(name))?;
    let names = || source.tensors.keys().map(String::as_str);
    if wraps(source) && names().any(|name| name.contains("language_model.")) {
        let others: Vec<String> = names()
            .filter(|name| !is_inside(name))
            .map(|name| format!("^{}$", regex::escape(name)))
            .collect();
        return (!others.is_empty()).then(|| drop(&others.join("|")));
    }
    wraps(source).then(|| drop(&format!(r"^(model\.)*({})\.", TOWERS.join("|"))))
}

/// Whether a model is a language model in a frame that sees or hears.
fn wraps(source: Source<'_>) -> bool {
    let config = &source.config.0;
    let parts = ["text_config", "vision_config", "audio_config", "llm_config", "thinker_config"];
    let model_type = source.config.model_type().unwrap_or_default();
    parts.iter().any(|key| config.contains_key(*key))
        || model_type.contains("vl")
        || model_type.contains("llava")
}

/// Whether a name says that its tensor is none of a model's own weights.
pub(crate) fn is_leftover(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let own = lower.strip_prefix("model.").unwrap_or(&lower);
    let left = |segment: &str| {
        LEFTOVERS.contains(&segment) || LEFTOVER_BEGINNINGS.iter().any(|start| segment.starts_with(start))
    };
    OTHER_HEADS.contains(&own.split('.').next().unwrap_or_default()) || lower.split('.').any(left)
}

/// Why mlx-lm does not load this type after it was quantized by tensor names, where that is known.
pub fn obstacle(model_type: &str) -> Option<&'static str> {
    DO_NOT_LOAD.iter().find(|(name, _)| *name == model_type).map(|(_, why)| *why)
}

/// What would go wrong with a tensor of a type without a description if the model were quantized.
pub fn unfit(architecture: &Architecture, name: &str, view: &View) -> Option<Unfit> {
    const TABLES: [&str; 6] = ["conv", "pos_emb", "position", "rel_pos", "query", "filter"];
    let shape = view.shape();
    if architecture.is_tower(name) || shape.len() < 2 {
        return None;
    }
    let expert = expert(name);
    if matches!(expert, Some(Expert { number: Some(_), .. })) {
        return Some(Unfit::NumberedExpert);
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    let axes = &shape[shape.len().saturating_sub(2)..];
    let stacked = shape.len() > 2 && shape[..shape.len() - 2].iter().product::<usize>() > 1;
    // The kernel of a convolution is short, tables of positions and queries are no layer's; matrices are neither.
    let table = TABLES.iter().any(|part| name.contains(part));
    let matrices =
        stacked && axes.iter().all(|axis| *axis >= 8) && axes.iter().any(|axis| *axis >= 16) && !table;
    let unnamed = expert.is_some() && last != "weight" && !last.contains("bias");
    (matrices || unnamed).then_some(Unfit::Stacked)
}

/// An expert that a name speaks of.
struct Expert<'n> {
    /// What stands before it, and behind it.
    around: (&'n str, &'n str),
    number: Option<usize>,
}

/// `X.experts.3.Y`, `X.expert_3.Y`, `X.mlps.3.Y`, or `X.experts.Y` of all together.
fn expert(name: &str) -> Option<Expert<'_>> {
    let mut start = 0;
    for segment in name.split('.') {
        let end = start + segment.len();
        let (before, rest) = (&name[..start], name[end..].trim_start_matches('.'));
        if let Some(number) = segment.strip_prefix("expert_").and_then(|number| number.parse().ok()) {
            return Some(Expert { around: (before, rest), number: Some(number) });
        }
        let several = matches!(segment, "experts" | "expert" | "local_experts" | "mlps");
        if several || segment.starts_with("expert_w") {
            let (number, behind) = rest.split_once('.').unwrap_or((rest, ""));
            return match number.parse() {
                Ok(number) => Some(Expert { around: (before, behind), number: Some(number) }),
                Err(_) if segment == "mlps" => None,
                Err(_) => Some(Expert { around: (before, rest), number: None }),
            };
        }
        start = end + 1;
    }
    None
}

/// Names and shapes of one matrix of several experts, by number.
type Experts<'n> = BTreeMap<usize, (&'n str, Vec<usize>)>;

/// Experts that are not all there, or not alike: a name that is missing, or one of another shape.
pub fn incomplete_experts<'n>(tensors: impl Iterator<Item = (&'n str, Vec<usize>)>) -> Option<String> {
    let mut groups: BTreeMap<(&str, &str), Experts<'_>> = BTreeMap::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, shape) in tensors {
        if let Some(Expert { around, number: Some(number) }) = expert(name) {
            groups.entry(around).or_default().insert(number, (name, shape));
            let count = counts.entry(around.0).or_default();
            *count = (*count).max(number.saturating_add(1));
        }
    }
    groups.into_iter().find_map(|((before, behind), held)| {
        let count = counts.get(before).copied().unwrap_or(0);
        let (_, (first, shape)) = held.first_key_value()?;
        let absent = || (0..count.min(1 << 16)).find(|number| !held.contains_key(number));
        if let Some(missing) = (held.len() < count).then(absent).flatten() {
            return Some(format!("{behind} of expert {missing} beside {first} is missing"));
        }
        let odd = held.values().find(|(_, other)| other != shape)?;
        Some(format!("{} has shape {:?}, {first} {shape:?}", odd.0, odd.1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_whole_segments() {
        assert!(
            is_leftover("model.layers.0.q_proj.lora_A.default.weight")
                && is_leftover("model.layers.0.q_proj.SCB")
        );
        assert!(
            !is_leftover("model.layers.0.attn.lora.2.weight") && !is_leftover("model.base_layers.weight")
        );
    }
}
