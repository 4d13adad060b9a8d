//! What mlx-vlm calls the parts that see and hear, and which of their convolutions it turns.
//!
//! mlx-lm drops these parts, mlx-vlm computes with them; a directory in mlx-vlm's layout is taken by both, so that is
//! what is written. The language model lies below `language_model.` there as it does in mlx-lm's wrappers. The source is
//! each model's `sanitize` in `mlx_vlm/models`, version 0.7.10: here its names are data, as mlx-lm's are in the families.
//! mlx-vlm reads its own output by the same functions, so that every rule leaves alone what is in its form already.

use mlx_format::checkpoint::Config;
use regex::Regex;
use serde_json::Value;

use super::architecture::{Rule, Towers};
use super::rules::{drop, make};
use super::towers::TOWERS;
use crate::view::Step;

/// How the parts of a wrapper are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// A SigLIP or CLIP tower below `vision_tower.vision_model`, or Pixtral's, and a projector.
    Tower,
    /// The same; the language model has a head of its own there, which is the embedding's table once more.
    TowerAndHead,
    /// `visual`, its patches cut from two frames.
    Visual,
    /// Gemma 4: a tower for images, one for sound, and what embeds both.
    Gemma4,
    /// MoonViT: blocks below `encoder`, whose attention has no name of its own.
    Moon,
    /// Names are the hub's, and no convolution is among them: Llama 4 and Muse Glimmer.
    AsOnTheHub,
    /// InternVL's own tower, in transformers' form.
    InternVl,
    /// SigLIP 2, whose patches a matrix embeds.
    Lfm2Vl,
    /// A SigLIP tower at `vision_model`, and a `connector`.
    Idefics3,
    /// Gemma 3n: MobileNet for images, a conformer for sound, and what embeds both. All of it stands below `model.`, where
    /// mlx-lm looks for what it drops; mlx-vlm takes that away.
    Gemma3n {
        /// Whether channels of images' kernels stand before them still.
        channels_first: bool,
    },
}

/// What begins the names of parts that see or hear.
pub(super) fn pattern() -> String {
    format!(r"^(?<outer>(model\.)*)({})\.", TOWERS.join("|"))
}

/// Renames what `text` matches, its groups being `$1`, `$2`, ..; nothing is turned.
fn rename(text: &str, name: &'static str) -> Rule {
    make(text, [(name, vec![])])
}

/// Puts the channels of the convolutions that `text` matches behind their kernels.
fn turn(text: &str, name: &'static str) -> Rule {
    make(text, [(name, vec![Step::ChannelsLast])])
}

impl Layout {
    /// Names and turns, by the wrapper's config.json.
    pub(super) fn towers(self, config: &Config) -> Towers {
        let pattern = Regex::new(&pattern()).expect("rule patterns are valid");
        // Buffers of old checkpoints, which nobody reads.
        let mut rules = vec![drop(r"\.position_ids$|\.rotary_(pos_)?emb\.inv_freq$")];
        rules.extend(match self {
            Self::Tower | Self::TowerAndHead => vec![
                turn(r"^(vision_tower\.vision_model\..*patch_(embedding|conv)\.weight)$", "$1"),
                rename(r"^(vision_tower\.vision_model\..*)$", "$1"),
                turn(r"^vision_(?:tower|encoder)\.(patch_conv\.weight)$", "vision_tower.vision_model.$1"),
                rename(
                    r"^vision_(?:tower|encoder)\.((?:transformer|ln_pre)\..*)$",
                    "vision_tower.vision_model.$1",
                ),
                rename(r"^vision_projection\.(.*)$", "multi_modal_projector.$1"),
            ],
            Self::Visual => vec![
                turn(
                    r"^(?:visual|vision_tower)\.((?:patch_embed\.proj|downsample)\.weight)$",
                    "vision_tower.$1",
                ),
                rename(r"^visual\.(.*)$", "vision_tower.$1"),
            ],
            Self::Gemma4 => Self::gemma4(config),
            Self::Moon => vec![
                turn(r"^(vision_tower\.patch_embed\.proj\.weight)$", "$1"),
                rename(
                    r"^vision_tower\.(?:encoder\.)?blocks\.(\d+)\.(wqkv|wo)\.(.*)$",
                    "vision_tower.blocks.$1.attn.$2.$3",
                ),
                rename(r"^vision_tower\.encoder\.(.*)$", "vision_tower.$1"),
            ],
            Self::AsOnTheHub => Vec::new(),
            Self::InternVl => {
                vec![turn(r"^(vision_tower\.embeddings\.patch_embeddings\.projection\.weight)$", "$1")]
            }
            Self::Lfm2Vl => Self::lfm2_vl(config),
            Self::Idefics3 => vec![turn(r"^(vision_model\.embeddings\.patch_embedding\.weight)$", "$1")],
            Self::Gemma3n { channels_first } => Self::gemma3n(channels_first),
        });
        let outer = if matches!(self, Self::Gemma3n { .. }) { "model." } else { "" };
        Towers { pattern, outer, rules, repeats_head: self == Self::TowerAndHead }
    }

    /// The norm of a projector that does not use it is in some checkpoints.
    fn lfm2_vl(config: &Config) -> Vec<Rule> {
        let mut rules = vec![rename(r"^vision_tower\.vision_model\.(.*)$", "vision_tower.$1")];
        if !config.bool("projector_use_layernorm", true) {
            rules.push(drop(r"^multi_modal_projector\.layer_norm\."));
        }
        rules
    }

    /// A kernel of 3 x 3 over 3 channels does not tell its form, so that all of a tower's are turned, or none.
    fn gemma3n(channels_first: bool) -> Vec<Rule> {
        let mut rules = vec![
            turn(r"^(audio_tower\..*conv\.weight)$", "$1"),
            turn(r"^(audio_tower\..*conv1d\.weight)$", "$1"),
        ];
        if channels_first {
            rules.push(turn(r"^(vision_tower\.(?:.*[._])?(?:conv[^.]*|proj)\.weight)$", "$1"));
        }
        rules
    }

    /// Bounds of activations are read where the tower clips; a model without ears has nothing for sound.
    fn gemma4(config: &Config) -> Vec<Rule> {
        let set = |key: &str| config.0.get(key).filter(|value| !value.is_null());
        let clips = set("vision_config").and_then(|vision| vision.get("use_clipped_linears"));
        let mut rules = vec![
            turn(r"^(audio_tower\..*subsample_conv_projection\..*conv\.weight)$", "$1"),
            turn(r"^(audio_tower\..*depthwise_conv1d\.weight)$", "$1"),
        ];
        if clips.and_then(Value::as_bool) != Some(true) {
            rules.push(drop(r"^vision_tower\..*\.(input|output)_(max|min)$"));
        }
        if set("audio_config").is_none() {
            rules.push(drop(r"^(audio_tower|embed_audio)\."));
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(layout: Layout, config: &str, name: &str) -> Option<String> {
        let towers = layout.towers(&Config::parse(config.as_bytes()).unwrap());
        let inner = towers.inner(name).unwrap();
        let Some(rule) = towers.rule(inner) else { return Some(inner.to_owned()) };
        let output = rule.outputs.first()?;
        let mut name = String::new();
        rule.captures(inner).unwrap().expand(&output.name, &mut name);
        Some(name)
    }

    #[test]
    fn names_of_the_hub_and_of_mlx_vlm_become_the_same() {
        for (layout, hub, right) in [
            (Layout::Visual, "model.visual.blocks.0.attn.qkv.bias", "vision_tower.blocks.0.attn.qkv.bias"),
            (Layout::Visual, "visual.patch_embed.proj.weight", "vision_tower.patch_embed.proj.weight"),
            (Layout::Tower, "vision_tower.patch_conv.weight", "vision_tower.vision_model.patch_conv.weight"),
            (
                Layout::Tower,
                "model.vision_tower.transformer.layers.0.attention.k_proj.weight",
                "vision_tower.vision_model.transformer.layers.0.attention.k_proj.weight",
            ),
            (
                Layout::Tower,
                "model.vision_tower.vision_model.post_layernorm.bias",
                "vision_tower.vision_model.post_layernorm.bias",
            ),
            (
                Layout::Tower,
                "model.multi_modal_projector.mm_soft_emb_norm.weight",
                "multi_modal_projector.mm_soft_emb_norm.weight",
            ),
            (Layout::Moon, "vision_tower.encoder.blocks.3.wo.weight", "vision_tower.blocks.3.attn.wo.weight"),
            (Layout::Moon, "vision_tower.encoder.final_layernorm.bias", "vision_tower.final_layernorm.bias"),
            (Layout::Moon, "mm_projector.proj.0.weight", "mm_projector.proj.0.weight"),
            (
                Layout::Gemma4,
                "model.embed_vision.embedding_projection.weight",
                "embed_vision.embedding_projection.weight",
            ),
        ] {
            assert_eq!(named(layout, "{}", hub).as_deref(), Some(right), "{hub}");
            assert_eq!(named(layout, "{}", right).as_deref(), Some(right), "{right}");
        }
    }

    #[test]
    fn what_mlx_vlm_does_not_read_is_dropped() {
        let clips = r#"{"audio_config": {"hidden_size": 8}, "vision_config": {"use_clipped_linears": true}}"#;
        for name in ["vision_tower.encoder.layers.0.mlp.up_proj.input_max", "audio_tower.x.weight"] {
            assert_eq!(named(Layout::Gemma4, "{}", name), None);
            assert_eq!(named(Layout::Gemma4, r#"{"audio_config": null}"#, name), None);
            assert_eq!(named(Layout::Gemma4, clips, name).as_deref(), Some(name));
        }
        assert_eq!(named(Layout::Tower, "{}", "vision_tower.vision_model.embeddings.position_ids"), None);
    }

    #[test]
    fn only_parts_that_see_and_hear_are_taken() {
        let towers = Layout::Tower.towers(&Config::parse(b"{}").unwrap());
        for name in
            ["language_model.model.layers.0.vision_tower.weight", "model.layers.0.x", "vision_towers.x"]
        {
            assert_eq!(towers.inner(name), None, "{name}");
        }
    }
}
