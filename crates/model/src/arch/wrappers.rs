//! Models that see or hear around a language model: which type lies inside, by what names, and what mlx-lm supposes.
//!
//! mlx-lm runs the language model of such a checkpoint alone. So a wrapper is data: the types of config.json, the types
//! that `text_config` may have and the family that each belongs to, what mlx-lm's class puts into `text_config`, and what
//! stands before the names of its parameters. Everything else is the family's (`language.rs` brings both together). The
//! source is the wrapper's file in `mlx_lm/models`, version 0.32.2; sizes that the hub's configs leave out because they
//! are transformers' defaults are that library's.

use mlx_format::checkpoint::Config;
use serde_json::{Map, Value, json};

use super::architecture::{Architecture, Rule};
use super::loader::Loader;
use super::mlx_vlm::{self, Layout};
use super::place::Place;
use super::rules::drop;

/// A model that holds a language model in `text_config`, or, in old checkpoints, beside its own keys.
#[derive(Debug)]
pub(super) struct Wrapper {
    /// Its names, as `model_type` has them.
    pub(super) types: &'static [&'static str],
    /// Language models that mlx-lm takes inside; the first where config.json does not name one.
    pub(super) inside: &'static [Inside],
    /// Where it stands in MLX's names.
    pub(super) place: Place,
    /// How mlx-vlm names the parts that see and hear; nothing if they are not kept.
    pub(super) layout: Option<Layout>,
    /// What loads it as a language model.
    pub(super) loader: Loader,
}

/// A language model inside.
#[derive(Debug)]
pub(super) struct Inside {
    /// Its names, as `text_config.model_type` has them. Where a wrapper holds one kind alone, mlx-lm does not look.
    pub(super) types: &'static [&'static str],
    /// Model type of the family that describes it.
    pub(super) family: &'static str,
    /// What `text_config` may leave out.
    fills: &'static [Fill],
}

/// A key of `text_config` that is settled before the language model is made of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill {
    /// Where it is missing.
    Missing(&'static str, Number),
    /// Whatever it says.
    Always(&'static str, Number),
    /// Where it is missing, and mlx-lm reads it beside `text_config` alone.
    Beside(&'static str, Number),
}

/// A value that a `Fill` gives.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Count(usize),
    Flag(bool),
}
use Fill::{Always, Beside, Missing};
use Number::{Count, Flag};

impl Number {
    pub(super) fn value(self) -> Value {
        match self {
            Self::Count(count) => json!(count),
            Self::Flag(flag) => json!(flag),
        }
    }
}

const fn inside(types: &'static [&'static str], family: &'static str, fills: &'static [Fill]) -> Inside {
    Inside { types, family, fills }
}

/// A wrapper as nearly all are.
const fn below(types: &'static [&'static str], layout: Layout, inside: &'static [Inside]) -> Wrapper {
    Wrapper { layout: Some(layout), ..plain(types, inside) }
}

/// A wrapper whose parts that see are dropped.
const fn plain(types: &'static [&'static str], inside: &'static [Inside]) -> Wrapper {
    Wrapper { types, inside, place: Place::below(LANGUAGE), layout: None, loader: Loader::MlxLm }
}

/// A wrapper that mlx-vlm has a model of, and mlx-lm has none.
const fn seen(types: &'static [&'static str], layout: Layout, inside: &'static [Inside]) -> Wrapper {
    Wrapper { loader: Loader::MlxVlm, ..below(types, layout, inside) }
}

const LANGUAGE: &str = "language_model.";

const APART: Fill = Missing("tie_word_embeddings", Flag(false));

/// LLaVA 1.5's `text_config` names a Llama 2 7B by what differs from transformers' defaults: nearly nothing.
const LLAMA_7B: &[Fill] = &[
    APART,
    Missing("hidden_size", Count(4096)),
    Missing("intermediate_size", Count(11008)),
    Missing("num_hidden_layers", Count(32)),
    Missing("num_attention_heads", Count(32)),
    Missing("vocab_size", Count(32000)),
];

const MISTRAL_7B: &[Fill] = &[
    APART,
    Missing("hidden_size", Count(4096)),
    Missing("intermediate_size", Count(14336)),
    Missing("num_hidden_layers", Count(32)),
    Missing("num_attention_heads", Count(32)),
    Missing("num_key_value_heads", Count(8)),
    Missing("vocab_size", Count(32000)),
];

/// Its attention has biases whatever config.json says.
const GLM4V: &[Fill] = &[APART, Missing("attention_bias", Flag(true))];

const PIXTRAL: &[Fill] =
    &[Always("tie_word_embeddings", Flag(false)), Missing("num_attention_heads", Count(32))];

const MISTRAL: Inside = inside(&["mistral"], "mistral", MISTRAL_7B);
const LLAMA: Inside = inside(&["llama"], "llama", LLAMA_7B);
const MINISTRAL3: Inside = inside(&["ministral3"], "ministral3", &[APART]);
const MISTRAL4: Inside = inside(&["mistral4"], "mistral4", &[APART]);

const QWEN2: &[&str] = &["qwen2_vl_text", "qwen2_5_vl_text"];
const QWEN3_5: &[&str] = &["qwen3_5_text", "qwen3_5_moe_text"];

const GEMMA3: &[Fill] = &[
    Beside("vocab_size", Count(262_208)),
    Missing("num_attention_heads", Count(8)),
    Missing("num_key_value_heads", Count(4)),
];

const GEMMA4: &[Fill] = &[
    Beside("vocab_size", Count(262_144)),
    Missing("num_attention_heads", Count(8)),
    Missing("num_key_value_heads", Count(1)),
];

/// The wrappers, a line for each.
pub(super) const WRAPPERS: &[Wrapper] = &[
    below(&["gemma3"], Layout::TowerAndHead, &[inside(&["gemma3_text"], "gemma3_text", GEMMA3)]),
    below(&["gemma4", "gemma4_unified"], Layout::Gemma4, &[inside(&["gemma4_text"], "gemma4_text", GEMMA4)]),
    below(&["qwen2_vl", "qwen2_5_vl"], Layout::Visual, &[inside(QWEN2, "qwen2", &[])]),
    below(&["qwen3_vl"], Layout::Visual, &[inside(&["qwen3_vl_text"], "qwen3", &[])]),
    below(&["qwen3_vl_moe"], Layout::Visual, &[inside(&["qwen3_vl_moe_text"], "qwen3_moe", &[])]),
    below(&["qwen3_5", "qwen3_5_moe"], Layout::Visual, &[inside(QWEN3_5, "qwen3_5", &[])]),
    below(&["mistral3"], Layout::Tower, &[MISTRAL, LLAMA, MINISTRAL3, MISTRAL4]),
    below(&["llava"], Layout::Tower, &[LLAMA, MISTRAL, MINISTRAL3, MISTRAL4]),
    below(
        &["pixtral"],
        Layout::Tower,
        &[inside(&["mistral"], "mistral", PIXTRAL), inside(&["llama"], "llama", PIXTRAL)],
    ),
    // mlx-vlm wants `kv_b_proj` there and mlx-lm `embed_q` and `unembed_out`, and each refuses the other's: no layout has both.
    plain(&["kimi_vl"], &[inside(&["deepseek_v3"], "deepseek_v3", &[])]),
    below(&["kimi_k25"], Layout::Moon, &[inside(&["kimi_k2"], "kimi_k2", &[])]),
    below(&["llama4"], Layout::AsOnTheHub, &[inside(&["llama4_text"], "llama4", &[])]),
    plain(&["kimi_k3"], &[inside(&["kimi_linear"], "kimi_k3", &[])]),
    plain(&["minimax_m3_vl"], &[inside(&["minimax_m3"], "minimax_m3_vl", &[])]),
    Wrapper {
        types: &["muse_glimmer"],
        place: Place::ALONE,
        ..below(&[], Layout::AsOnTheHub, &[inside(&["muse_glimmer_text"], "muse_glimmer", &[])])
    },
    seen(&["glm4v"], Layout::Visual, &[inside(&["glm4v_text"], "glm4", GLM4V)]),
    seen(&["internvl"], Layout::InternVl, &[inside(&["qwen3"], "qwen3", &[])]),
    seen(&["lfm2_vl"], Layout::Lfm2Vl, &[inside(&["lfm2"], "lfm2", &[])]),
    Wrapper {
        place: Place { outer: LANGUAGE, model: "" },
        ..seen(&["idefics3", "smolvlm"], Layout::Idefics3, &[inside(&["llama"], "llama", &[APART])])
    },
];

/// Wrappers that mlx-lm has no model of and that are not described here. mlx-vlm has.
const UNKNOWN: &[&str] = &[
    "aya_vision",
    "glm46v",
    "glm4v_moe",
    "glm5_next",
    "idefics2",
    "internvl_chat",
    "llava_next",
    "mllama",
    "paligemma",
    "phi4mm",
    "qwen3_omni_moe",
    "qwen4_exp",
    "step3p7",
];

/// How the language model's names begin, and what they become; the first that fits counts. Old checkpoints have the
/// second pair, those of transformers 5 the third, some neither.
const SPELLINGS: [(&str, &str); 8] = [
    ("model.language_model.model.", "model."),
    ("language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
    // Idefics 3.
    ("model.text_model.", "model."),
    ("text_model.", "model."),
];

impl Wrapper {
    /// The wrapper of a model type.
    pub(super) fn of(model_type: &str) -> Option<&'static Self> {
        WRAPPERS.iter().find(|wrapper| wrapper.types.contains(&model_type))
    }

    /// The language model of this type inside; the likeliest if config.json does not say, the only one of mlx-lm's whatever it
    /// says, as there.
    pub(super) fn inside(&self, text_type: Option<&str>) -> Option<&'static Inside> {
        let only = self.inside.len() == 1 && self.loader == Loader::MlxLm;
        let fits = |inside: &&Inside| only || text_type.is_none_or(|own| inside.types.contains(&own));
        self.inside.iter().find(fits)
    }

    /// A name of the checkpoint as the language model alone would have it.
    pub(super) fn plain(name: &str) -> String {
        let found = SPELLINGS.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
        found.unwrap_or_else(|| name.to_owned())
    }

    /// What the language model's `architecture` is by the names of the whole checkpoint, whose `config` is the wrapper's.
    pub(super) fn around(&self, mut architecture: Architecture, config: &Config) -> Architecture {
        architecture.prefixes = SPELLINGS.to_vec();
        architecture.rules.insert(0, Self::without_towers());
        architecture.place = self.place;
        architecture.towers = self.layout.map(|layout| layout.towers(config));
        architecture
    }

    /// Drops what sees and hears, where nobody says how it would be kept: mlx-lm has no use for it.
    fn without_towers() -> Rule {
        drop(&mlx_vlm::pattern())
    }
}

impl Inside {
    /// Settles the keys of `text` that mlx-lm settles; `beside` are the keys around it, which are changed where mlx-lm would
    /// otherwise suppose another value.
    pub(super) fn settle(&self, text: &mut Map<String, Value>, mut beside: Option<&mut Map<String, Value>>) {
        for fill in self.fills {
            match *fill {
                Missing(key, number) => {
                    text.entry(key).or_insert_with(|| number.value());
                }
                Always(key, number) => {
                    text.insert(key.to_owned(), number.value());
                }
                Beside(key, number) => {
                    let said = beside.as_ref().and_then(|beside| beside.get(key).cloned());
                    let supposed = said.unwrap_or_else(|| number.value());
                    let own = text.entry(key).or_insert_with(|| supposed.clone());
                    if let Some(beside) = beside.as_mut().filter(|_| *own != supposed) {
                        beside.insert(key.to_owned(), own.clone());
                    }
                }
            }
        }
    }
}

/// Why mlx-lm has no use for a model of this type, whatever its weights are.
pub(super) fn unknown(model_type: &str) -> Option<&'static str> {
    UNKNOWN.contains(&model_type).then_some("mlx_lm 0.32.2 has no model of this type")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_name() {
        for name in [
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "language_model.layers.0.mlp.up_proj.weight",
            "model.text_model.layers.0.mlp.up_proj.weight",
        ] {
            assert_eq!(Wrapper::plain(name), "model.layers.0.mlp.up_proj.weight");
        }
        for name in ["language_model.lm_head.weight", "model.language_model.lm_head.weight", "lm_head.weight"]
        {
            assert_eq!(Wrapper::plain(name), "lm_head.weight");
        }
    }
}
