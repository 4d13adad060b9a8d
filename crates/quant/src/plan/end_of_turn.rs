//! Which tokens end a text: everything that the model's files name, so that no program that loads the output talks on.
//!
//! mlx_lm takes generation_config.json's `eos_token_id` where that file has one, else config.json's (`mlx_lm/utils.py`,
//! `load_config`). Makers write the one into the first and the other into the second, and chat templates end turns with a third.

use mlx_format::checkpoint::{Config, Directory, is_truthy};
use mlx_quant_model::{end_of_text, end_of_turn};
use serde_json::Value;

/// What the output's files say of the end of a text.
#[derive(Debug, Default)]
pub(super) struct EndOfTurn {
    /// `eos_token_id` of config.json, where it differs from what mlx_lm would take from the source.
    pub(super) value: Option<Value>,
    /// generation_config.json, where the source's would hide some of the tokens.
    pub(super) generation_config: Option<Config>,
    pub(super) note: Option<String>,
}

impl EndOfTurn {
    /// `config` is the source's, with generation_config.json's `eos_token_id` where that has one.
    pub(super) fn of(directory: &Directory, config: &Config, keep: bool) -> Self {
        if keep {
            return Self::default();
        }
        let read = |file: &str| Config::parse(&directory.read(file).ok().flatten()?).ok();
        let (raw, generation) =
            (read("config.json").unwrap_or_else(|| config.clone()), read("generation_config.json"));
        // Where the files name none, mlx_lm takes the tokenizer's, which a list in its place would hide.
        let mut taken = config.0.get("eos_token_id").map(ids).unwrap_or_default();
        if taken.is_empty() {
            taken.extend(end_of_text(directory));
        }
        let nested = raw.0.get("text_config").and_then(|text| text.get("eos_token_id"));
        let turn = end_of_turn(directory);
        let mut all = taken.clone();
        let named = raw.0.get("eos_token_id").into_iter().chain(nested).flat_map(ids);
        for id in named.chain(turn.as_ref().map(|(id, _)| *id)) {
            if !all.contains(&id) {
                all.push(id);
            }
        }
        if all.len() == taken.len() {
            return Self::default();
        }
        let added: Vec<String> = all[taken.len()..]
            .iter()
            .map(|id| match &turn {
                Some((own, text)) if own == id => {
                    format!("{id} ({text}, which ends turns in the chat template)")
                }
                _ => id.to_string(),
            })
            .collect();
        let note = format!(
            "eos_token_id is {all:?}: the model's files name {} beside what mlx_lm would take; --keep-eos leaves them out",
            added.join(", ")
        );
        let value = Value::from(all);
        let hides = |generation: &Config| generation.0.get("eos_token_id").is_some_and(is_truthy);
        let generation_config = generation.filter(hides).map(|mut generation| {
            generation.0.insert("eos_token_id".to_owned(), value.clone());
            generation
        });
        Self { value: Some(value), generation_config, note: Some(note) }
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
        assert_eq!(found.value.is_some(), found.note.is_some());
        (found.value, found.generation_config.map(|generation| generation.0["eos_token_id"].clone()))
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
    fn where_config_names_none_the_tokenizers_stays() {
        assert_eq!(of("{}", None, Some(ENDS)), (Some(Value::from(vec![2, 5])), None));
        assert_eq!(
            of("{}", None, Some("{% for m in messages %}{{ m.content }}</s>{% endfor %}")),
            (None, None)
        );
    }
}
