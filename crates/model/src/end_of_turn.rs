//! The token with which a model ends its turn, as its chat template shows.
//!
//! config.json often names the end of a text alone, while a chat model ends its turns with another token. A program that does not
//! know it goes on talking to itself. The template is the one place where it always stands: whatever follows an answer.

use mlx_format::checkpoint::Directory;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::chat::ChatTemplate;
use crate::tokenizer::{named_tokens, read_object, templates};

/// Stands for an answer; no template writes it by itself.
const ANSWER: &str = "an-answer-that-no-template-holds";

/// A token outside the vocabulary proper.
#[derive(Debug, Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
}

/// What is read of tokenizer.json; its vocabulary is passed over.
#[derive(Debug, Default, Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

/// The special token that a model's chat template puts right behind an answer: its id and text. Nothing if there is no template,
/// it cannot be rendered, or something else follows.
pub fn end_of_turn(directory: &Directory) -> Option<(u64, String)> {
    let added = added_tokens(directory);
    let settings = read_object(directory, "tokenizer_config.json").ok()?;
    let special =
        named_tokens(&settings, &read_object(directory, "special_tokens_map.json").unwrap_or_default());
    // What begins a text or fills it up ends no turn.
    let begins =
        |name: &str| special.get(name).filter(|token| special.get("eos_token") != Some(token)).cloned();
    let others = [begins("bos_token"), begins("pad_token")];
    let (file, source) = templates(directory, &settings).ok()?.default?;
    let template = ChatTemplate::new(file, &source, special);
    let messages =
        [json!({"role": "user", "content": "a question"}), json!({"role": "assistant", "content": ANSWER})];
    let text = template.render_adapted(&messages, None).ok()?;
    let (_, behind) = text.rsplit_once(ANSWER)?;
    let behind = behind.trim_start_matches([' ', '\n']);
    let own = |token: &&AddedToken| {
        let text = Value::from(token.content.as_str());
        token.special && !token.content.is_empty() && !others.iter().flatten().any(|other| *other == text)
    };
    let token = added.iter().filter(own);
    let token =
        token.filter(|token| behind.starts_with(&token.content)).max_by_key(|token| token.content.len())?;
    Some((token.id, token.content.clone()))
}

/// The id of a tokenizer's own end of text, by the name of the token.
pub fn end_of_text(directory: &Directory) -> Option<u64> {
    let settings = read_object(directory, "tokenizer_config.json").unwrap_or_default();
    let special =
        named_tokens(&settings, &read_object(directory, "special_tokens_map.json").unwrap_or_default());
    let name = special.get("eos_token")?.as_str()?;
    added_tokens(directory).into_iter().find(|token| token.content == name).map(|token| token.id)
}

/// Added tokens of tokenizer.json, else of tokenizer_config.json.
fn added_tokens(directory: &Directory) -> Vec<AddedToken> {
    let bytes = directory.read("tokenizer.json").ok().flatten();
    let tokens =
        bytes.and_then(|bytes| serde_json::from_slice::<AddedTokens>(&bytes).ok()).unwrap_or_default();
    if !tokens.added_tokens.is_empty() {
        return tokens.added_tokens;
    }
    let settings = read_object(directory, "tokenizer_config.json").unwrap_or_default();
    let by_id = settings.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
    let token = |(id, token): (&String, &Value)| {
        let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        Some(AddedToken {
            id: id.parse().ok()?,
            content: token.get("content")?.as_str()?.to_owned(),
            special,
        })
    };
    by_id.filter_map(token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(template: &str, tokens: &Value) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, value: Value| {
            std::fs::write(directory.path().join(file), value.to_string()).unwrap();
        };
        write("tokenizer.json", json!({"added_tokens": tokens, "model": {"vocab": {"a": 0}}}));
        write("tokenizer_config.json", json!({"eos_token": "</s>", "chat_template": template}));
        directory
    }

    fn found(template: &str) -> Option<(u64, String)> {
        let tokens = json!([
            {"id": 2, "content": "</s>", "special": true},
            {"id": 7, "content": "<end>", "special": true},
            {"id": 8, "content": "<end>!", "special": true},
            {"id": 9, "content": "said", "special": false},
        ]);
        let directory = model(template, &tokens);
        end_of_turn(&Directory::open(directory.path()).unwrap())
    }

    #[test]
    fn what_follows_an_answer_ends_a_turn() {
        let each = |end: &str| {
            format!("{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{end}{{% endfor %}}")
        };
        assert_eq!(found(&each("<end>\n")), Some((7, "<end>".to_owned())));
        assert_eq!(found(&each("<end>!")), Some((8, "<end>!".to_owned())));
        assert_eq!(found(&each(" </s>")), Some((2, "</s>".to_owned())));
        assert_eq!(found(&each("{{ eos_token }}")), Some((2, "</s>".to_owned())));
        assert_eq!(found(&each("said")), None, "an ordinary token");
        assert_eq!(found(&each("")), None);
        let parts =
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<end>{% endfor %}";
        assert_eq!(found(parts), Some((7, "<end>".to_owned())), "a template that takes parts");
        assert_eq!(found("{{ raise_exception('no') }}"), None);
        assert_eq!(
            found("{% for m in messages %}{{ m.role }}{% endfor %}"),
            None,
            "a template that shows no answers"
        );
    }

    #[test]
    fn the_end_of_text_by_its_name() {
        let directory = model("", &json!([{"id": 2, "content": "</s>", "special": true}]));
        assert_eq!(end_of_text(&Directory::open(directory.path()).unwrap()), Some(2));
    }
}
