//! The language model of a checkpoint, as its own config.json would describe it, whether it stands alone or within a
//! wrapper. Whoever asks for a description asks here, so that no family has to know what it lies in.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use mlx_format::checkpoint::{Config, ConfigError, Tensor};
use serde_json::{Map, Value};

use super::architecture::{Architecture, Source};
use super::family::Family;
use super::loader::Loader;
use super::place::Place;
use super::sketch::Sketch;
use super::towers::is_tower;
use super::wrappers::{self, Inside, Wrapper};
use super::{by_names, family, rules};
use crate::decoder::{Decoder, Linear};

/// A language model, alone or within a wrapper.
#[derive(Debug)]
pub(crate) struct Language<'a> {
    /// config.json as it is.
    whole: &'a Config,
    /// config.json of the language model.
    pub(crate) config: Cow<'a, Config>,
    /// Its family; `None` if its type has no description.
    pub(crate) family: Option<&'static Family>,
    /// What it lies in.
    wrapper: Option<&'static Wrapper>,
}

impl<'a> Language<'a> {
    /// The language model that config.json speaks of.
    pub(crate) fn of(config: &'a Config) -> Self {
        let opened = opened(config);
        if let Some((wrapper, inside)) = opened
            && let Some(family) = family(inside.family)
        {
            let (mut text, mut around) = apart(config);
            inside.settle(&mut text, around.as_mut());
            text.insert("model_type".to_owned(), inside.family.into());
            return Self {
                whole: config,
                config: Cow::Owned(Config(text)),
                family: Some(family),
                wrapper: Some(wrapper),
            };
        }
        let known = config.model_type().ok().filter(|name| Wrapper::of(name).is_none()).and_then(family);
        Self { whole: config, config: Cow::Borrowed(config), family: known, wrapper: None }
    }

    /// Names, rules and linears, by the names of the whole checkpoint.
    ///
    /// # Errors
    /// If config.json lacks what the family needs.
    pub(crate) fn architecture(
        &self,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Architecture, ConfigError> {
        self.whole.model_type()?;
        let Some(family) = self.family else {
            return Ok(by_names::architecture(Source { config: self.whole, tensors }));
        };
        let Some(wrapper) = self.wrapper else {
            return (family.names)(Source { config: &self.config, tensors });
        };
        let own = tensors.iter().filter(|(name, _)| !is_tower(name));
        let own = own.map(|(name, tensor)| (Wrapper::plain(name), tensor.clone())).collect();
        let source = Source { config: &self.config, tensors: &own };
        (family.names)(source).map(|own| wrapper.around(own, self.whole)).map_err(|error| self.nested(error))
    }

    /// The decoder of a model with tensors of these names (MLX's), or as config.json alone tells it if there are none;
    /// `None` if its type has no description.
    ///
    /// # Errors
    /// If config.json lacks what the family needs, or says what it cannot mean.
    pub(crate) fn decoder(&self, names: Option<&BTreeSet<&str>>) -> Result<Option<Decoder>, ConfigError> {
        self.whole.model_type()?;
        let place = self.wrapper.map_or(Place::ALONE, |wrapper| wrapper.place);
        let build = |family: &Family| {
            let sketch = Sketch { config: &self.config, names, defaults: family.defaults, place };
            family.decoder.map(|decoder| decoder(sketch))
        };
        self.family.and_then(build).transpose().map_err(|error| self.nested(error))
    }

    /// The decoder, with a head of its own unless something says that it has none.
    ///
    /// # Errors
    /// As [`Self::decoder`].
    pub(crate) fn headed(
        &self,
        architecture: &Architecture,
        names: Option<&BTreeSet<&str>>,
    ) -> Result<Option<Decoder>, ConfigError> {
        let mut decoder = self.decoder(names)?;
        if let Some(decoder) = decoder.as_mut().filter(|decoder| decoder.head.linear.is_none())
            && (self.tied() == Some(false) || !architecture.drops_head() && !architecture.tied_without_head)
        {
            decoder.head.linear = Some(Linear::new(architecture.place.name("lm_head")));
        }
        Ok(decoder)
    }

    /// What config.json says of head and embedding being one table.
    pub(crate) fn tied(&self) -> Option<bool> {
        rules::tied(&self.config)
    }

    /// The error, with the key where it stands in the whole config.json.
    fn nested(&self, error: ConfigError) -> ConfigError {
        let nests = self.wrapper.is_some() && self.whole.0.get("text_config").is_some_and(Value::is_object);
        let below = |key: String| format!("text_config.{key}");
        match error {
            ConfigError::Key { key, reason } if nests => ConfigError::Key { key: below(key), reason },
            ConfigError::Undescribed { key, reason } if nests => {
                ConfigError::Undescribed { key: below(key), reason }
            }
            error => error,
        }
    }
}

/// config.json as mlx-lm has it after it made a model of it: what a wrapper settles in its `text_config` stands there.
pub fn settled(config: &Config) -> Config {
    let Some((_, inside)) = opened(config) else { return config.clone() };
    let (mut text, mut around) = apart(config);
    inside.settle(&mut text, around.as_mut());
    let Some(mut around) = around else { return Config(text) };
    around.insert("text_config".to_owned(), text.into());
    Config(around)
}

/// What loads a model of this config.json as a language model: mlx-lm, unless mlx-vlm alone has its type.
pub fn loader(config: &Config) -> Loader {
    let wrapper = config.model_type().ok().and_then(Wrapper::of);
    wrapper.map_or(Loader::MlxLm, |wrapper| wrapper.loader)
}

/// Why no library runs a model of this config.json, whatever its weights are; nothing where one does, or nobody knows.
pub fn obstacle(config: &Config) -> Option<String> {
    let model_type = config.model_type().ok()?;
    if let Some(why) = wrappers::unknown(model_type) {
        return Some(why.to_owned());
    }
    let (wrapper, text_type) = (Wrapper::of(model_type)?, text_type(config)?);
    if wrapper.inside(Some(text_type)).is_some() {
        return None;
    }
    let known: Vec<&str> = wrapper.inside.iter().flat_map(|inside| inside.types).copied().collect();
    Some(format!(
        "text_config.model_type is {text_type:?}, but within {model_type} {} runs {} alone",
        wrapper.loader.name(),
        known.join(", ")
    ))
}

/// A wrapper with a description.
#[derive(Clone, Debug)]
pub struct Wrapped {
    /// Its types.
    pub types: &'static [&'static str],
    /// Types of language models inside, with the type that each is described as.
    pub inside: Vec<(&'static [&'static str], &'static str)>,
    /// Whether what sees and hears is kept.
    pub keeps_towers: bool,
    /// What runs the language model.
    pub loader: Loader,
}

/// The wrappers with a description.
pub fn wrapped() -> impl Iterator<Item = Wrapped> {
    wrappers::WRAPPERS.iter().map(|wrapper| {
        let inside = wrapper.inside.iter().filter(|inside| family(inside.family).is_some());
        let inside = inside.map(|inside| (inside.types, inside.family)).collect();
        Wrapped {
            types: wrapper.types,
            inside,
            keeps_towers: wrapper.layout.is_some(),
            loader: wrapper.loader,
        }
    })
}

/// The wrapper that config.json describes, and the language model inside.
fn opened(config: &Config) -> Option<(&'static Wrapper, &'static Inside)> {
    let wrapper = Wrapper::of(config.model_type().ok()?)?;
    Some((wrapper, wrapper.inside(text_type(config))?))
}

/// `text_config.model_type`.
fn text_type(config: &Config) -> Option<&str> {
    config.0.get("text_config")?.get("model_type")?.as_str()
}

/// `text_config` and the keys around it; nothing around where the keys of both stand side by side.
fn apart(config: &Config) -> (Map<String, Value>, Option<Map<String, Value>>) {
    match config.0.get("text_config") {
        Some(Value::Object(text)) => (text.clone(), Some(config.0.clone())),
        _ => (config.0.clone(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::known;

    fn config(json: &str) -> Config {
        Config::parse(json.as_bytes()).unwrap()
    }

    fn settled_as(json: &str) -> Value {
        Value::Object(settled(&config(json)).0)
    }

    #[test]
    fn every_wrapper_is_a_type_of_its_loader_and_opened() {
        let mut seen = BTreeSet::new();
        for wrapper in wrappers::WRAPPERS {
            for model_type in wrapper.types {
                assert_eq!(known::model_type(model_type), wrapper.loader == Loader::MlxLm, "{model_type}");
                assert!(wrapper.loader == Loader::MlxLm || wrapper.layout.is_some(), "{model_type}");
                assert!(seen.insert(*model_type), "{model_type} twice");
            }
            for inside in wrapper.inside {
                assert!(family(inside.family).is_some(), "{}", inside.family);
            }
        }
    }

    #[test]
    fn every_tensor_of_a_decoder_lies_below_the_place_of_its_language_model() {
        const SIZES: &str = r#""hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 8, "head_dim": 4, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4,
            "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2, "kv_lora_rank": 2, "hidden_size_per_layer_input": 2,
            "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 2, "linear_value_head_dim": 2,
            "num_kv_shared_layers": 0, "tie_word_embeddings": false"#;
        for (wrapper, inside) in wrappers::WRAPPERS
            .iter()
            .flat_map(|wrapper| wrapper.inside.iter().map(move |inside| (wrapper, inside)))
        {
            let (model_type, text_type) = (wrapper.types[0], inside.types[0]);
            let config = config(&format!(
                r#"{{"model_type": "{model_type}", "text_config": {{"model_type": "{text_type}", {SIZES}}}}}"#
            ));
            let language = Language::of(&config);
            let names = BTreeSet::new();
            let Some(decoder) = language.decoder(Some(&names)).unwrap() else { continue };
            for name in decoder.reads().0.keys() {
                assert!(name.starts_with(wrapper.place.outer), "{model_type}, {text_type}: {name}");
            }
        }
    }

    #[test]
    fn the_inner_type_decides() {
        let of = |text: &str| {
            let config = config(&format!(r#"{{"model_type": "mistral3", "text_config": {{{text}}}}}"#));
            Language::of(&config).family.map(|family| family.types[0])
        };
        assert_eq!(of(r#""model_type": "ministral3""#), Some("ministral3"));
        assert_eq!(of(r#""model_type": "llama""#), Some("llama"));
        assert_eq!(of(""), Some("mistral"));
        assert_eq!(of(r#""model_type": "qwen2""#), None);
        let flat = config(r#"{"model_type": "qwen2_5_vl", "hidden_size": 8}"#);
        assert_eq!(Language::of(&flat).config.count("hidden_size").unwrap(), 8);
        assert_eq!(Language::of(&flat).config.model_type().unwrap(), "qwen2");
    }

    #[test]
    fn only_the_nested_keys_count() {
        let config = config(
            r#"{"model_type": "gemma3", "tie_word_embeddings": true, "num_hidden_layers": 9, "text_config": {"hidden_size": 8}}"#,
        );
        let language = Language::of(&config);
        assert_eq!(language.tied(), None);
        let error = language.architecture(&BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("text_config.num_hidden_layers is missing"), "{error}");
    }

    #[test]
    fn what_mlx_lm_settles() {
        let gemma = settled_as(r#"{"model_type": "gemma3", "text_config": {"num_attention_heads": 16}}"#);
        let text =
            serde_json::json!({"num_attention_heads": 16, "vocab_size": 262_208, "num_key_value_heads": 4});
        assert_eq!(gemma["text_config"], text);
        assert!(gemma.get("vocab_size").is_none());
        // mlx-lm takes the number beside text_config, or its own default, whatever text_config says.
        let gemma = settled_as(r#"{"model_type": "gemma3", "text_config": {"vocab_size": 300}}"#);
        assert_eq!((&gemma["vocab_size"], &gemma["text_config"]["vocab_size"]), (&300.into(), &300.into()));
        let pixtral =
            settled_as(r#"{"model_type": "pixtral", "text_config": {"tie_word_embeddings": true}}"#);
        assert_eq!(pixtral["text_config"]["tie_word_embeddings"], false);
        let flat = r#"{"model_type": "gemma3", "vocab_size": 300}"#;
        assert_eq!(settled_as(flat)["vocab_size"], 300);
        let plain = r#"{"model_type": "llama", "text_config": {}}"#;
        assert_eq!(settled(&config(plain)), config(plain));
    }

    #[test]
    fn what_mlx_lm_does_not_run() {
        let of = |json: &str| obstacle(&config(json));
        for model_type in ["internvl_chat", "idefics2", "glm4v_moe", "mllama"] {
            assert!(!known::model_type(model_type));
            let why = of(&format!(r#"{{"model_type": "{model_type}"}}"#)).unwrap();
            assert!(why.contains("no model of this type"), "{why}");
        }
        let why = of(r#"{"model_type": "internvl", "text_config": {"model_type": "qwen2"}}"#).unwrap();
        assert!(why.contains("within internvl mlx_vlm runs qwen3 alone"), "{why}");
        let why = of(r#"{"model_type": "llava", "text_config": {"model_type": "qwen2"}}"#).unwrap();
        assert!(why.contains("\"qwen2\"") && why.contains("llama, mistral"), "{why}");
        for fine in
            [r#"{"model_type": "llava"}"#, r#"{"model_type": "llama"}"#, r#"{"model_type": "of_tomorrow"}"#]
        {
            assert_eq!(of(fine), None);
        }
    }
}
