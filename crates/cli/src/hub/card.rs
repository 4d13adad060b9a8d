//! What the hub thinks of a model card, asked before anything else is sent: it refuses a commit whose README.md it does not like.

use mlx_quant::Observer;
use mlx_quant::card::{inherited_keys, is_own_card, without_key};
use serde::Deserialize;

use super::explain::{Problem, Trouble};
use super::{Address, Hub};

const ANSWER_BYTES: usize = 1 << 20;

/// What the hub says of a card (`/api/validate-yaml`, as huggingface_hub's `_validate_yaml` asks it).
#[derive(Default, Deserialize)]
struct Opinion {
    #[serde(default)]
    errors: Vec<Remark>,
    #[serde(default)]
    warnings: Vec<Remark>,
    /// The form of other errors.
    error: Option<String>,
}

#[derive(Deserialize)]
struct Remark {
    message: String,
}

impl Hub {
    /// A card that the hub takes. From one of ours is left out what the hub refuses of what came from the source, with a note; any
    /// other card has to be right.
    pub(crate) fn accepted_card(
        &self,
        address: &Address,
        card: String,
        observer: &dyn Observer,
    ) -> Result<String, Trouble> {
        let (mut card, mut said) = (card, Vec::new());
        loop {
            let opinion = self.ask(address, observer, || self.opinion(&card))?;
            let Some(opinion) = opinion else { return Ok(card) };
            for Remark { message } in &opinion.warnings {
                let message = self.plain(message);
                if !said.contains(&message) {
                    self.printer.warn(&format!("the hub on README.md: {message}"));
                    said.push(message);
                }
            }
            if opinion.errors.is_empty() {
                return Ok(card);
            }
            let errors: Vec<String> = opinion.errors.iter().map(|error| self.plain(&error.message)).collect();
            let words = errors.join("; ");
            let keys = if is_own_card(&card) { inherited_keys(&card) } else { Vec::new() };
            let dropped = named(&errors, &keys).map_or(keys, |key| vec![key]);
            if dropped.is_empty() {
                return Err(Trouble::Refused(format!(
                    "{} refuses README.md: {words}; hint: mend what stands between its lines `---`, or remove it",
                    self.speaker.endpoint
                )));
            }
            let listed = dropped.join(", ");
            self.printer.warn(&format!("README.md: left out {listed}, which the hub refuses: {words}"));
            card = dropped.into_iter().fold(card, |card, key| without_key(&card, key));
        }
    }

    /// What the hub says of a card; nothing if it does not read cards.
    fn opinion(&self, card: &str) -> Result<Option<Opinion>, Problem> {
        let body = serde_json::json!({ "repoType": "model", "content": card }).to_string();
        let request = self.direct.post(self.url(["api", "validate-yaml"])?);
        let request = request.header(reqwest::header::CONTENT_TYPE, "application/json").body(body);
        let mut answer = match self.ask_once(request)? {
            answer if matches!(answer.status().as_u16(), 404 | 405 | 501) => return Ok(None),
            answer if answer.status().is_success() || answer.status().as_u16() == 400 => answer,
            answer => return Err(self.problem(answer)),
        };
        let refused = !answer.status().is_success();
        let mut opinion: Opinion = match serde_json::from_slice(&self.body(&mut answer, ANSWER_BYTES)?) {
            Ok(opinion) => opinion,
            Err(_) if refused => Opinion::default(),
            Err(error) => return Err(error.into()),
        };
        if refused && opinion.errors.is_empty() {
            let message = opinion.error.take().unwrap_or_else(|| "it says no more".to_owned());
            opinion.errors.push(Remark { message });
        }
        Ok(Some(opinion))
    }

    /// The hub's words on one line, and not too many.
    fn plain(&self, message: &str) -> String {
        let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect();
        self.speaker.scrub(line.trim())
    }
}

/// The first of `keys` that the hub names, in quotes or else as a word.
fn named(errors: &[String], keys: &[&'static str]) -> Option<&'static str> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let quoted = |error: &str, key: &str| {
        // `"language[0]" must be`, `"license" with value "x"`
        let quotes = ['"', '\'', '`'];
        let starts = error.match_indices(quotes).map(|(at, quote)| (at, &error[at + quote.len()..]));
        let mut named = starts.filter_map(|(at, rest)| Some((at, rest.strip_prefix(key)?)));
        named.find(|(_, rest)| !rest.starts_with(is_part)).map(|(at, _)| at)
    };
    let word = |error: &str, key: &str| {
        let mut found = error.match_indices(key);
        let alone =
            |at: usize| !error[..at].ends_with(is_part) && !error[at + key.len()..].starts_with(is_part);
        found.find(|(at, _)| alone(*at)).map(|(at, _)| at)
    };
    let first = |place: &dyn Fn(&str, &str) -> Option<usize>| {
        errors.iter().find_map(|error| {
            let places = keys.iter().filter_map(|key| Some((place(error, key)?, *key)));
            places.min().map(|(_, key)| key)
        })
    };
    first(&quoted).or_else(|| first(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_that_an_error_is_about() {
        let keys = ["license", "license_name", "license_link", "language", "base_model"];
        for (error, key) in [
            (r#""license" must be one of [apache-2.0, mit, other]"#, Some("license")),
            (r#""language[0]" must only contain lowercase characters"#, Some("language")),
            (r#""language" with value "English" is not valid"#, Some("language")),
            (r#""license_name" is required if "license" is "other""#, Some("license_name")),
            ("base_model: the license of a/b is unknown", Some("base_model")),
            ("Invalid license_link", Some("license_link")),
            (r#""tags" must be an array, as "language" is"#, Some("language")),
            ("bad indentation of a mapping entry (3:1)", None),
            ("the sublanguage and license-like things", None),
        ] {
            assert_eq!(named(&[error.to_owned()], &keys), key, "{error}");
        }
        let both = ["no key".to_owned(), "'base_model.0' is none".to_owned()];
        assert_eq!(named(&both, &keys), Some("base_model"));
        assert_eq!(named(&both, &[]), None);
    }
}
