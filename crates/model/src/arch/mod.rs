//! What each model type's checkpoint holds and how mlx-lm names it: Rust data, one small file per family.
//!
//! A `Family` says of its model types, as functions of config.json (and of the names in the checkpoint), which names
//! change, which tensors are stacked, split or dropped, which weights are linear or embedding layers, which of those
//! mlx-lm protects with more bits, and how the decoder is built. Everything else is derived from that. **A new family
//! is a file here and a line in `REGISTRY`**; a model type that reuses one is a name in that family's file; a model that
//! sees or hears around a language model is a line in `wrappers.rs`.
//!
//! The source of every fact is the model's file in `mlx_lm/models` (its `sanitize`, `quant_predicate`,
//! `cast_predicate` and module tree), version 0.32.2.

mod architecture;
mod biases;
pub mod by_names;
mod defaults;
mod drafters;
mod family;
pub(crate) mod keys;
mod language;
mod loader;
mod mlx_vlm;
mod place;
mod rope;
mod rules;
mod rules_only;
mod sketch;
mod towers;
mod wrappers;

mod afmoe;
mod apertus;
mod bailing;
mod bailing_linear;
mod cohere;
mod dbrx;
mod deepseek;
mod dots1;
mod ernie4_5_moe;
mod exaone;
mod falcon_h1;
mod gemma;
mod gemma3n;
mod gemma4;
mod glm4;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod granitemoehybrid;
mod hunyuan;
mod internlm;
mod kimi_linear;
mod laguna;
mod lfm2;
mod llama;
mod llama4;
mod mamba2;
mod mimo_v2_flash;
mod minicpm;
mod minimax;
mod ministral3;
mod mistral4;
mod mixtral;
mod muse_glimmer;
mod nanochat;
mod nemotron;
mod nemotron_h;
mod olmo;
mod phi;
mod qwen;
mod qwen3_next;
mod smollm3;
mod stablelm;
mod starcoder2;
mod step3p5;

pub use self::architecture::{Architecture, Linears, Output, Protected, Rule, Share, Source, Towers};
pub(crate) use self::drafters::Drafter;
pub use self::drafters::drafters;
pub(crate) use self::family::Family;
pub(crate) use self::language::Language;
pub use self::language::{Wrapped, loader, obstacle, settled, wrapped};
pub use self::loader::Loader;
pub use self::place::Place;
pub use crate::view::{Factors, Step};

/// The families, a line for each file.
const REGISTRY: &[&[Family]] = &[
    llama::FAMILIES,
    smollm3::FAMILIES,
    ministral3::FAMILIES,
    qwen::FAMILIES,
    olmo::FAMILIES,
    hunyuan::FAMILIES,
    nemotron::FAMILIES,
    stablelm::FAMILIES,
    granite::FAMILIES,
    gemma::FAMILIES,
    gemma4::FAMILIES,
    cohere::FAMILIES,
    glm4::FAMILIES,
    phi::FAMILIES,
    starcoder2::FAMILIES,
    gpt2::FAMILIES,
    gpt_neox::FAMILIES,
    gpt_oss::FAMILIES,
    mixtral::FAMILIES,
    qwen3_next::FAMILIES,
    deepseek::FAMILIES,
    lfm2::FAMILIES,
    minimax::FAMILIES,
    dots1::FAMILIES,
    ernie4_5_moe::FAMILIES,
    exaone::FAMILIES,
    internlm::FAMILIES,
    minicpm::FAMILIES,
    nanochat::FAMILIES,
    apertus::FAMILIES,
    muse_glimmer::FAMILIES,
    afmoe::FAMILIES,
    bailing::FAMILIES,
    laguna::FAMILIES,
    step3p5::FAMILIES,
    mimo_v2_flash::FAMILIES,
    mistral4::FAMILIES,
    llama4::FAMILIES,
    kimi_linear::FAMILIES,
    gemma3n::FAMILIES,
    dbrx::FAMILIES,
    mamba2::FAMILIES,
    nemotron_h::FAMILIES,
    granitemoehybrid::FAMILIES,
    falcon_h1::FAMILIES,
    bailing_linear::FAMILIES,
];

fn all() -> impl Iterator<Item = &'static Family> {
    REGISTRY.iter().chain(rules_only::REGISTRY).copied().flatten()
}

/// The family of a model type; `None` if it has no description.
fn family(model_type: &str) -> Option<&'static Family> {
    all().find(|family| family.types.contains(&model_type))
}

/// The model types that are described, those that are described alike together, and whether their decoder is.
pub fn described() -> impl Iterator<Item = (&'static [&'static str], bool)> {
    all().map(|family| (family.types, family.decoder.is_some()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mlx_format::checkpoint::Config;

    use super::*;

    fn config(json: &str) -> Config {
        Config::parse(json.as_bytes()).unwrap()
    }

    /// Where config.json is silent, what the model's class takes for granted counts.
    #[test]
    fn a_bias_may_be_there_unless_it_is_unset() {
        let has = |model_type: &str, path: &str, set: &str| {
            let config = config(&format!(r#"{{"model_type": "{model_type}"{set}}}"#));
            family(model_type).unwrap().has_bias(&config, path, false)
        };
        let own = "model.layers.0.attention.wqkv";
        assert_eq!(has("internlm2", own, ""), Some(true));
        assert_eq!(has("internlm2", own, r#", "bias": false"#), Some(false));
        assert_eq!(has("internlm2", "model.layers.0.feed_forward.w1", ""), Some(false));
        assert_eq!(has("internlm3", "model.layers.0.mlp.up_proj", ""), Some(false));
        assert_eq!(has("internlm3", "model.layers.0.mlp.up_proj", r#", "bias": true"#), Some(true));
    }

    #[test]
    fn every_listed_type_is_described() {
        let tensors = BTreeMap::new();
        for model_type in described().flat_map(|(types, _)| types) {
            let config = config(&format!(
                r#"{{"model_type": "{model_type}", "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_attention_heads": 2,
                "hidden_size": 4, "head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2}}"#
            ));
            let architecture = Language::of(&config).architecture(&tensors).unwrap();
            assert!(architecture.described, "{model_type}");
        }
        let config = config(r#"{"model_type": "new_one"}"#);
        assert!(!Language::of(&config).architecture(&tensors).unwrap().described);
    }

    #[test]
    fn no_type_stands_in_two_families() {
        let mut types: Vec<_> = described().flat_map(|(types, _)| types).collect();
        types.sort_unstable();
        assert!(types.windows(2).all(|pair| pair[0] != pair[1]), "{types:?}");
    }

    fn has_bias(json: &str, path: &str, norm: bool) -> Option<bool> {
        let config = config(json);
        Language::of(&config).family.unwrap().has_bias(&config, path, norm)
    }

    #[test]
    fn norms_have_their_own_biases() {
        let cohere = r#"{"model_type": "cohere", "layer_norm_bias": true}"#;
        assert_eq!(has_bias(cohere, "model.norm", true), Some(true));
        assert_eq!(has_bias(r#"{"model_type": "llama"}"#, "model.norm", true), None);
    }

    #[test]
    fn biases_by_type_and_by_key() {
        let (q, down) = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj");
        let llama = r#"{"model_type": "llama", "attention_bias": true}"#;
        assert_eq!((has_bias(llama, q, false), has_bias(llama, down, false)), (Some(true), Some(false)));
        let qwen2 = r#"{"model_type": "qwen2"}"#;
        assert_eq!(has_bias(qwen2, q, false), Some(true));
        assert_eq!(has_bias(qwen2, "model.layers.0.self_attn.o_proj", false), Some(false));
        assert_eq!(has_bias(r#"{"model_type": "phimoe"}"#, q, false), Some(true));
        let lfm2 = r#"{"model_type": "lfm2_moe"}"#;
        assert_eq!(has_bias(lfm2, "model.layers.0.conv.in_proj", false), None);
    }

    #[test]
    fn a_family_knows_its_widths_and_lengths() {
        let lfm2 = config(
            r#"{"model_type": "lfm2", "intermediate_size": 100, "block_auto_adjust_ff_dim": true,
            "block_multiple_of": 16, "conv_L_cache": 3}"#,
        );
        let family_of = |config| Language::of(config).family.unwrap();
        assert_eq!(family_of(&lfm2).inner_width(&lfm2).unwrap(), Some(80));
        assert_eq!(family_of(&lfm2).length(&lfm2, "model.layers.0.conv.conv").unwrap(), 3);
        let gpt2 = config(r#"{"model_type": "gpt2", "n_embd": 10}"#);
        assert_eq!(family_of(&gpt2).inner_width(&gpt2).unwrap(), Some(40));
        assert!(family_of(&gpt2).length(&gpt2, "model.wpe").is_err());
        let wide = config(r#"{"model_type": "gemma4_text", "use_double_wide_mlp": true}"#);
        assert!(!family_of(&wide).has_even_widths(&wide));
    }
}
