//! The tokenizer, as far as loading and the embedding go.

use serde_json::Value;

use super::findings::Findings;
use crate::{Error, Model};

const FILE: &str = "tokenizer.json";

/// Files that transformers can build a tokenizer from where there is no tokenizer.json.
fn is_other_tokenizer(name: &str) -> bool {
    const NAMES: [&str; 6] =
        ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "tiktoken.model"];
    NAMES.contains(&name) || name.ends_with(".tiktoken")
}

/// `vocabulary`: rows of the embedding, where known.
pub(super) fn check(model: &Model, vocabulary: Option<usize>, findings: &mut Findings) -> Result<(), Error> {
    let directory = model.checkpoint.directory();
    let Some(text) = directory.read(FILE)? else {
        match directory.files()?.iter().find(|name| is_other_tokenizer(name)) {
            Some(other) => {
                findings.notes.push(format!("the tokenizer ({other}) was not checked, only {FILE} is"));
            }
            None => findings.fatal(
                FILE,
                "is missing, and no other tokenizer is there: mlx_lm loads no model without one",
            ),
        }
        return Ok(());
    };
    let tokenizer: Value = match serde_json::from_slice(&text) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            findings.fatal(FILE, format!("is no JSON: {error}"));
            return Ok(());
        }
    };
    for key in ["model", "added_tokens"] {
        if tokenizer.get(key).is_none() {
            findings.fatal(FILE, format!("is no tokenizer, it has no {key}"));
            return Ok(());
        }
    }
    let rows = vocabulary.or_else(|| model.config.count("vocab_size").ok());
    let (Some((id, token)), Some(rows)) = (highest(&tokenizer), rows) else {
        findings
            .notes
            .push("token ids were not held against the vocabulary, one of the two is not known".to_owned());
        return Ok(());
    };
    if id >= rows as u64 {
        findings.warning(
            FILE,
            format!(
                "token {token:?} has id {id}, the embedding has {rows} rows: that token would read beyond it"
            ),
        );
    }
    Ok(())
}

/// The highest token id, and its token.
fn highest(tokenizer: &Value) -> Option<(u64, String)> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added = added.filter_map(|token| Some((token.get("id")?.as_u64()?, token.get("content")?.as_str()?)));
    let vocabulary = tokenizer.pointer("/model/vocab");
    let by_token = vocabulary.and_then(Value::as_object).into_iter().flatten();
    let by_token = by_token.filter_map(|(token, id)| Some((id.as_u64()?, token.as_str())));
    // Unigram models list pairs of token and score; ids are positions.
    let by_position = vocabulary.and_then(Value::as_array).into_iter().flatten().enumerate();
    let by_position = by_position.filter_map(|(id, pair)| Some((id as u64, pair.get(0)?.as_str()?)));
    added.chain(by_token).chain(by_position).max().map(|(id, token)| (id, token.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_highest_id_of_every_kind_of_vocabulary() {
        let added = json!([{"id": 9, "content": "<x>"}]);
        let byte_pairs = json!({"added_tokens": added, "model": {"vocab": {"a": 3, "b": 12}}});
        assert_eq!(highest(&byte_pairs), Some((12, "b".to_owned())));
        let unigram = json!({"added_tokens": [], "model": {"vocab": [["a", -1.0], ["b", -2.0]]}});
        assert_eq!(highest(&unigram), Some((1, "b".to_owned())));
        let only_added = json!({"added_tokens": added});
        assert_eq!(highest(&only_added), Some((9, "<x>".to_owned())));
        assert_eq!(highest(&json!({})), None);
    }
}
