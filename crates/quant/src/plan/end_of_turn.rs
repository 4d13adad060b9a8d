//! Which tokens end a text: everything that the model's files name, so that no program that loads the output talks on.
//!
//! mlx_lm takes generation_config.json's `eos_token_id` where that file has one, else config.json's (`mlx_lm/utils.py`,
//! `load_config`). Makers write the one into the first and the other into the second, and chat templates end turns with a third.

use mlx_format::checkpoint::{Config, Directory, is_truthy};
use mlx_quant_model::{end_of_text, end_of_turn};
use serde_json::Value;

/// generation_config.json of the output.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum GenerationConfig {
    /// The source's, if it has one.
    #[default]
    AsItIs,
    /// Another: the source's would hide tokens that end a text, or names what is none.
    Replaced(Config),
    /// None: the source's is no JSON object, which mlx_lm stops at.
    LeftOut,
}

/// What the output's files say of the end of a text.
#[derive(Debug, Default)]
pub(super) struct EndOfTurn {
    /// `eos_token_id` of config.json, where it differs from what mlx_lm would take from the source.
    pub(super) value: Option<Value>,
    pub(super) generation_config: GenerationConfig,
    pub(super) notes: Vec<String>,
}

impl EndOfTurn {
    /// `config` is the source's, with generation_config.json's `eos_token_id` where that has one.
    pub(super) fn of(directory: &Directory, config: &Config, keep: bool) -> Self {
        if keep {
            return Self::default();
        }
        let mut found = Self::default();
        let bytes = |file: &str| directory.read(file).ok().flatten();
        let raw = bytes("config.json")
            .and_then(|bytes| Config::parse(&bytes).ok())
            .unwrap_or_else(|| config.clone());
        let generation = match bytes("generation_config.json").map(|bytes| Config::parse(&bytes)) {
            Some(Err(reason)) => {
                found.generation_config = GenerationConfig::LeftOut;
                found.notes.push(format!("generation_config.json is {reason}: it is left out"));
                None
            }
            parsed => parsed.and_then(Result::ok),
        };
        let named: Vec<&Value> = [Some(config), Some(&raw), generation.as_ref()]
            .into_iter()
            .flatten()
            .filter_map(|config| config.0.get("eos_token_id"))
            .chain(raw.0.get("text_config").and_then(|text| text.get("eos_token_id")))
            .collect();
        let odd: Vec<String> =
            named.iter().filter(|value| !is_plain(value)).map(ToString::to_string).collect();
        if let Some(odd) = odd.first() {
            found
                .notes
                .push(format!("eos_token_id {odd} is no token id or list of such: what is none is left out"));
        }
        // Where the files name none, mlx_lm takes the tokenizer's, which a list in its place would hide.
        let mut taken = config.0.get("eos_token_id").map(ids).unwrap_or_default();
        if taken.is_empty() {
            taken.extend(end_of_text(directory));
        }
        let turn = end_of_turn(directory);
        let mut all = taken.clone();
        for id in named.into_iter().flat_map(ids).chain(turn.as_ref().map(|(id, _)| *id)) {
            if !all.contains(&id) {
                all.push(id);
            }
        }
        if all.len() == taken.len() && odd.is_empty() {
            return found;
        }
        if all.len() > taken.len() {
            found.notes.push(said(&all, taken.len(), turn.as_ref()));
        }
        let value = if all.is_empty() { Value::Null } else { Value::from(all) };
        let hides = |generation: &Config| generation.0.get("eos_token_id").is_some_and(is_truthy);
        if let Some(mut generation) = generation.filter(hides) {
            if value.is_null() {
                generation.0.shift_remove("eos_token_id");
            } else {
                generation.0.insert("eos_token_id".to_owned(), value.clone());
            }
            found.generation_config = GenerationConfig::Replaced(generation);
        }
        found.value = Some(value);
        found
    }
}

/// Which tokens were added to the first `taken` of `all`, and why.
fn said(all: &[u64], taken: usize, turn: Option<&(u64, String)>) -> String {
    let added: Vec<String> = all[taken..]
        .iter()
        .map(|id| match turn {
            Some((own, text)) if own == id => format!("{id} ({text}, which ends turns in the chat template)"),
            _ => id.to_string(),
        })
        .collect();
    format!(
        "eos_token_id is {all:?}: the model's files name {} beside what mlx_lm would take; --keep-eos leaves them out",
        added.join(", ")
    )
}

/// Whether a value is a token id or a list of them, as mlx_lm takes it.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(Value::is_u64),
        Value::Null => true,
        other => other.is_u64(),
    }
}

/// One id or a list of them, each once.
fn ids(value: &Value) -> Vec<u64> {
    let mut ids: Vec<u64> = Vec::new();
    for id in
        value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice).iter().filter_map(Value::as_u64)
    {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(config: &str, generation: Option<&str>, template: Option<&str>) -> (Option<Value>, Option<Value>) {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
        write("config.json", config);
        if let Some(generation) = generation {
            write("generation_config.json", generation);
        }
        if let Some(template) = template {
            write(
                "tokenizer.json",
                r#"{"added_tokens": [{"id": 5, "content": "<end>", "special": true}, {"id": 2, "content": "</s>", "special": true}]}"#,
            );
            let settings = serde_json::json!({"eos_token": "</s>", "chat_template": template});
            write("tokenizer_config.json", &settings.to_string());
        }
        let directory = Directory::open(directory.path()).unwrap();
        let config = Config::load(&directory).unwrap();
        let found = EndOfTurn::of(&directory, &config, false);
        assert!(EndOfTurn::of(&directory, &config, true).value.is_none());
        assert!(found.value.is_none() || !found.notes.is_empty());
        let generation = match found.generation_config {
            GenerationConfig::AsItIs => None,
            GenerationConfig::Replaced(config) => {
                Some(config.0.get("eos_token_id").cloned().unwrap_or_default())
            }
            GenerationConfig::LeftOut => Some("left out".into()),
        };
        (found.value, generation)
    }

    const ENDS: &str = "{% for m in messages %}{{ m.content }}<end>{% endfor %}";

    #[test]
    fn the_union_of_all_files() {
        let list = |ids: &[u64]| Some(Value::from(ids));
        assert_eq!(of(r#"{"eos_token_id": 1}"#, None, None), (None, None));
        assert_eq!(of(r#"{"eos_token_id": 1}"#, Some(r#"{"eos_token_id": [1]}"#), None), (None, None));
        let both = of(r#"{"eos_token_id": [10, 11, 12]}"#, Some(r#"{"eos_token_id": 10}"#), None);
        assert_eq!(both, (list(&[10, 11, 12]), list(&[10, 11, 12])));
        let apart = of(r#"{"eos_token_id": 3}"#, Some(r#"{"eos_token_id": [1, 2]}"#), None);
        assert_eq!(apart, (list(&[1, 2, 3]), list(&[1, 2, 3])));
        assert_eq!(of(r#"{"eos_token_id": 2}"#, Some(r#"{"top_p": 1}"#), Some(ENDS)), (list(&[2, 5]), None));
        assert_eq!(of(r#"{"eos_token_id": [2, 5]}"#, None, Some(ENDS)), (None, None));
        assert_eq!(of(r#"{"text_config": {"eos_token_id": 7}}"#, None, None), (list(&[7]), None));
    }

    #[test]
    fn what_is_no_token_id_is_left_out() {
        let list = |ids: &[u64]| Some(Value::from(ids));
        assert_eq!(of(r#"{"eos_token_id": "2"}"#, None, None), (Some(Value::Null), None));
        assert_eq!(of(r#"{"eos_token_id": [2, "</s>", 3.0, -5, null]}"#, None, None), (list(&[2]), None));
        let odd = of(r#"{"eos_token_id": 2}"#, Some(r#"{"eos_token_id": "</s>"}"#), None);
        assert_eq!(odd, (list(&[2]), list(&[2])));
        let odd = of(r#"{"eos_token_id": 2.0}"#, Some(r#"{"eos_token_id": {"a": 1}}"#), None);
        assert_eq!(odd, (Some(Value::Null), Some(Value::Null)));
        assert_eq!(of(r#"{"eos_token_id": 2}"#, Some("[1, 2]"), None), (None, Some("left out".into())));
    }

    #[test]
    fn where_config_names_none_the_tokenizers_stays() {
        assert_eq!(of("{}", None, Some(ENDS)), (Some(Value::from(vec![2, 5])), None));
        assert_eq!(
            of("{}", None, Some("{% for m in messages %}{{ m.content }}</s>{% endfor %}")),
            (None, None)
        );
    }
}
