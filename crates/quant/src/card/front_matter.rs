//! The front matter of a model card: YAML between two lines `---`, where the hub reads licence, language and base model.
//!
//! What a card takes from another one is read as YAML and written anew, never copied: a key that stands there twice, a tab, an
//! anchor or an odd indentation would break the card that it gets into. The cards of hub repositories are good YAML, those in
//! directories are what people write; where the whole cannot be read, the lines of each key are read alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use saphyr_parser::{Event, Parser, ScalarStyle};

/// A value of front matter, as far as cards need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    One(String),
    Many(Vec<String>),
}

/// Cuts a card into what comes up to the end of the opening line, the YAML, and what begins with the closing line; nothing if there is no
/// front matter, or no end of it. As on the hub a byte order mark and white space may come before, and line ends are of any kind.
pub(super) fn split(card: &str) -> Option<[&str; 3]> {
    let text = card.strip_prefix('\u{feff}').unwrap_or(card).trim_start();
    let (mut at, mut begin) = (card.len() - text.len(), None);
    for line in lines(text) {
        match begin {
            None if is_fence(line) => begin = Some(at + line.len()),
            None => return None,
            Some(begin) if is_fence(line) => return Some([&card[..begin], &card[begin..at], &card[at..]]),
            Some(_) => {}
        }
        at += line.len();
    }
    None
}

/// The values of `keys` at the top level, where they are text or lists of text; of a key that stands there twice the last one,
/// as Python's `yaml` takes it.
pub(super) fn values(yaml: &str, keys: &[&'static str]) -> BTreeMap<&'static str, Value> {
    let known = |found: (String, Value)| keys.iter().find(|key| **key == found.0).map(|key| (*key, found.1));
    let (found, whole) = read(yaml);
    let mut values: BTreeMap<&str, Value> = found.into_iter().filter_map(known).collect();
    if !whole {
        for key in keys {
            // What was read before the error may have ended at it.
            let alone = read(&tidied(yaml, key)).0.into_iter().filter_map(known).next_back();
            values.extend(alone);
        }
    }
    values
}

/// A key and its value, as lines of YAML.
pub(super) fn write(key: &str, value: &Value) -> String {
    match value {
        Value::One(text) => format!("{key}: {}\n", scalar(text)),
        Value::Many(texts) => texts.iter().fold(format!("{key}:\n"), |mut lines, text| {
            let _ = writeln!(lines, "- {}", scalar(text));
            lines
        }),
    }
}

/// Whether a key stands at the top level.
pub(super) fn has(yaml: &str, key: &str) -> bool {
    lines(yaml).any(|line| begins(line, key))
}

/// The YAML without the lines of a key.
pub(super) fn without(yaml: &str, key: &str) -> String {
    let mut dropping = false;
    lines(yaml)
        .filter(|line| {
            dropping = begins(line, key) || (dropping && continues(line));
            !dropping
        })
        .collect()
}

/// A line of a key's value that is not the first.
fn continues(line: &str) -> bool {
    line.starts_with([' ', '\t', '-', ']', '}', '#']) && !line.trim_end().is_empty()
}

/// Whether a line is the first of a key: `key:`, which may be quoted.
fn begins(line: &str, key: &str) -> bool {
    let bare = |line: &str| -> Option<bool> {
        let quote = line.chars().next().filter(|c| matches!(c, '"' | '\''));
        let rest = line.get(quote.map_or(0, char::len_utf8)..)?.strip_prefix(key)?;
        let rest = quote.map_or(Some(rest), |quote| rest.strip_prefix(quote))?;
        let rest = rest.trim_start_matches([' ', '\t']).strip_prefix(':')?;
        Some(rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    bare(line).unwrap_or(false)
}

/// The lines of a key alone, with one indentation for all that continue it.
fn tidied(yaml: &str, key: &str) -> String {
    let (mut text, mut inside) = (String::new(), false);
    for line in lines(yaml) {
        if begins(line, key) {
            text.clear();
            inside = true;
            text.push_str(line.trim_end());
        } else if inside && continues(line) {
            text.push_str("  ");
            text.push_str(line.trim());
        } else {
            inside = inside && line.trim().is_empty();
            continue;
        }
        text.push('\n');
    }
    text
}

/// What is met inside of a value.
enum Part {
    Begin,
    End,
    Text(String),
    /// Nothing, as `null` and an empty value are.
    Null,
    /// Mappings, and references to other places.
    Other,
}

/// Keys at the top level with their values, in order, and whether everything could be read.
fn read(yaml: &str) -> (Vec<(String, Value)>, bool) {
    let (mut found, mut depth, mut key, mut parts) = (Vec::new(), 0, None, Vec::new());
    for event in Parser::new_from_str(yaml) {
        let Ok((event, _)) = event else { return (found, false) };
        let before = depth;
        let part = match event {
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                depth += 1;
                if matches!(event, Event::SequenceStart(..)) { Part::Begin } else { Part::Other }
            }
            Event::SequenceEnd | Event::MappingEnd => {
                depth -= 1;
                if matches!(event, Event::SequenceEnd) { Part::End } else { Part::Other }
            }
            Event::Scalar(text, ScalarStyle::Plain, ..)
                if matches!(text.as_ref(), "" | "~" | "null" | "Null" | "NULL") =>
            {
                Part::Null
            }
            Event::Scalar(text, ..) => Part::Text(text.into_owned()),
            Event::Alias(_) => Part::Other,
            Event::DocumentEnd => break,
            _ => continue,
        };
        match (&key, part) {
            // The mapping that everything is in.
            (None, Part::Other) if before == 0 && depth == 1 => {}
            (None, Part::Text(name)) if depth == 1 => key = Some(name),
            // Its end, or no mapping of names.
            (None, _) => break,
            (Some(_), part) => {
                parts.push(part);
                if depth == 1 {
                    let name = key.take().unwrap_or_default();
                    found.extend(value(std::mem::take(&mut parts)).map(|value| (name, value)));
                }
            }
        }
    }
    (found, true)
}

/// Text or a list of text.
fn value(parts: Vec<Part>) -> Option<Value> {
    let list = matches!(parts.first(), Some(Part::Begin));
    let mut texts = Vec::new();
    let mut begun = 0;
    for part in parts {
        match part {
            Part::Text(text) => texts.push(text),
            Part::Null | Part::End => {}
            Part::Begin if begun == 0 => begun += 1,
            Part::Begin | Part::Other => return None,
        }
    }
    if list {
        return (!texts.is_empty()).then_some(Value::Many(texts));
    }
    texts.pop().map(Value::One)
}

/// Text as YAML, plain where it is nothing else in any version of YAML (`no` is false in 1.1, and a language), else quoted.
fn scalar(text: &str) -> String {
    const WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':' | '+');
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(safe)
        && !text.ends_with(':')
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    if plain {
        return text.to_owned();
    }
    let printable =
        |c: char| if c.is_control() || matches!(c, '\u{feff}' | '\u{fffe}' | '\u{ffff}') { ' ' } else { c };
    let text: String = text.trim_end().chars().map(printable).collect();
    // JSON's strings are YAML's in double quotes.
    serde_json::Value::String(text).to_string()
}

fn is_fence(line: &str) -> bool {
    line.trim_end_matches([' ', '\t', '\r', '\n']) == "---"
}

/// Lines with their ends: `\n`, `\r\n` or `\r`.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = match rest.find(['\n', '\r']) {
            Some(at) if rest[at..].starts_with("\r\n") => at + 2,
            Some(at) => at + 1,
            None => rest.len(),
        };
        let (line, after) = rest.split_at(end);
        rest = after;
        (!line.is_empty()).then_some(line)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use super::*;

    const KEYS: [&str; 4] = ["license", "license_name", "license_link", "language"];

    /// What is kept of a card, as it is written again.
    fn kept(card: &str) -> String {
        let Some([_, yaml, _]) = split(card) else { return "no front matter".to_owned() };
        values(yaml, &KEYS).iter().map(|(key, value)| write(key, value)).collect()
    }

    #[test]
    fn line_ends_and_marks_of_any_kind() {
        let card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\n---\nText\n";
        let both = "language:\n- en\n- de\nlicense: apache-2.0\n";
        for card in [
            card.to_owned(),
            card.replace('\n', "\r\n"),
            card.replace('\n', "\r"),
            format!("\u{feff}{card}"),
            format!("\u{feff}{}", card.replace('\n', "\r\n")),
            format!("\n  \n{card}"),
            card.replace("---\n", "---  \n"),
            card.replace("---\n", "---\t\r\n"),
            card.replace("Text\n", "").trim_end().to_owned(),
            card.replace("language:\n", "language:   # of the data\n# two\n\n"),
            card.replace("license:", "tags:\n- a: b\n  c: [1, {d: 2}]\nmodel-index:\n- name: x\n  results:\n  - license: wrong\nlicense:"),
            card.replace("- en\n- de", "    - en\n    - 'de'"),
            card.replace("\n- en\n- de", " [en,\n  \"de\"]"),
            card.replace("license: apache-2.0", "\"license\" : 'apache-2.0'  # as it says"),
            card.replace("license: apache-2.0", "license: mit\nlicense: apache-2.0"),
        ] {
            assert_eq!(kept(&card), both, "{card:?}");
        }
    }

    #[test]
    fn front_matter_that_is_none() {
        for card in [
            "",
            "Text\n",
            "---\nlicense: mit\n",
            "---\nlicense: mit\n----\n",
            "---\nlicense: mit\n---x\n",
            "--- license: mit\n---\n",
            "# Title\n---\nlicense: mit\n---\n",
            "---",
        ] {
            assert_eq!(kept(card), "no front matter", "{card:?}");
        }
        for card in [
            "---\n---\n",
            "---\n- license\n---\n",
            "---\nlicense\n---\n",
            "---\nlicense:\n---\n",
            "---\nlicense: {a: b}\n---\n",
        ] {
            assert_eq!(kept(card), "", "{card:?}");
        }
    }

    /// What is no YAML keeps its licence, and nothing of it gets out.
    #[test]
    fn front_matter_that_is_broken() {
        let broken = [
            "license: mit\nlanguage:\n\t- en\n\t- de\nwidget: [\n",
            "license: mit\nlanguage:\n  - en\n - de\n",
            "widget: {\nlicense: mit\nlanguage:\n- en\n- de\n",
            "title: a: b: c\nlicense: mit\nlanguage: [en, de]\n",
            "@odd\nlicense: mit\nlicense: mit\nlanguage:\n - en\n\n   - de\n",
        ];
        for yaml in broken {
            assert_eq!(kept(&format!("---\n{yaml}---\n")), "language:\n- en\n- de\nlicense: mit\n", "{yaml}");
        }
        assert_eq!(kept("---\nx: &a mit\nlicense: *a\nlanguage: *b\n---\n"), "");
    }

    /// Whatever a value holds, it is one value of its key when it is read again.
    #[test]
    fn what_is_written_is_read_again() {
        let texts = [
            "mit",
            "no",
            "Off",
            "1.0",
            "2024-01-01",
            "a: b",
            "a #b",
            "- x",
            "it's",
            "\"q\"",
            "[x",
            "{x}",
            "*a",
            "&a",
            "!t",
            "%x",
            "https://example.com/a?b=c#d",
            "ends:",
            "über",
            "a\\b",
            "~",
            " lead",
            "x\u{2028}y",
            "@at",
            "`tick`",
            "|",
            ">",
            "---",
        ];
        for text in texts {
            let (one, many) =
                (Value::One(text.to_owned()), Value::Many(vec![text.to_owned(), "x".to_owned()]));
            let yaml = format!("{}{}after: 1\n", write("license", &one), write("language", &many));
            let (found, whole) = read(&yaml);
            assert!(whole, "{yaml}");
            let expected = [("license", one), ("language", many), ("after", Value::One("1".to_owned()))];
            assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value)), "{yaml}");
        }
        let folded =
            kept("---\nlicense_link: >-\n  https://example.com/a\n  b\nlicense_name: |\n  x\n  y\n---\n");
        assert_eq!(folded, "license_link: \"https://example.com/a b\"\nlicense_name: \"x y\"\n");
    }

    #[test]
    fn a_key_is_taken_out_with_its_lines() {
        let yaml = "license: mit\r\nlicense_name: x\r\nlanguage:\r\n- en\r\n- de\r\ntags:\r\n- mlx\r\n";
        assert_eq!(without(yaml, "language"), "license: mit\r\nlicense_name: x\r\ntags:\r\n- mlx\r\n");
        assert_eq!(without(yaml, "license"), yaml.strip_prefix("license: mit\r\n").unwrap());
        assert_eq!(without(yaml, "base_model"), yaml);
        assert!(has(yaml, "license") && has(yaml, "tags") && !has(yaml, "licens") && !has(yaml, "mlx"));
        assert_eq!(without("'a': [x,\n  y\n]\nb: 1\n", "a"), "b: 1\n");
    }
}
