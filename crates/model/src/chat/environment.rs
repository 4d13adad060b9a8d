//! What a chat template finds around it, as in transformers.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value as Item;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use regex::Regex;

use super::to_json::to_json;

/// Friday, 26 July 2024, midnight: the day that Llama 3.1's template takes where it is told none.
const TODAY: [(char, &str); 18] = [
    ('a', "Fri"),
    ('A', "Friday"),
    ('b', "Jul"),
    ('B', "July"),
    ('d', "26"),
    ('e', "26"),
    ('F', "2024-07-26"),
    ('H', "00"),
    ('I', "12"),
    ('j', "208"),
    ('m', "07"),
    ('M', "00"),
    ('p', "AM"),
    ('S', "00"),
    ('T', "00:00:00"),
    ('y', "24"),
    ('Y', "2024"),
    ('%', "%"),
];

/// The tag that marks what an assistant wrote, for training; it changes nothing in the text.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("a valid regular expression")
});

/// The source with that tag as one that the engine knows.
pub(super) fn without_generation(source: &str) -> String {
    let replaced = GENERATION.replace_all(source, |found: &regex::Captures| {
        let keyword = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{keyword}{}", &found[1], &found[3])
    });
    replaced.into_owned()
}

pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the default delimiters are valid"),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Item, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment
}

/// Python's `strftime` of [`TODAY`].
fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        let mut directive = letters.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = letters.next();
        }
        let Some((_, value)) = TODAY.iter().find(|(name, _)| Some(*name) == directive) else {
            let message = format!("strftime_now does not know %{}", directive.unwrap_or(' '));
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        };
        let short = value.trim_start_matches('0');
        text.push_str(match (unpadded, short) {
            (true, "") => "0",
            (true, short) => short,
            (false, _) => value,
        });
    }
    Ok(text)
}
