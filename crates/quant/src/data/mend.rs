//! JSON as programs write it that are not strict about it.
//!
//! Python's `json.dumps` writes lone surrogates, `NaN` and `Infinity`; other programs write numbers beyond float64.
//! None of it is JSON, and a strict parser refuses the row, mostly for a column that nobody reads. So a row that does
//! not parse is mended: what stands for half a character becomes U+FFFD, what is no number becomes null.

use std::borrow::Cow;

use serde_json::Value;

/// A JSON text as a value.
pub(super) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| match mend(text) {
        Cow::Borrowed(_) => Err(error),
        Cow::Owned(mended) => serde_json::from_str(&mended),
    })
}

/// The text with lone surrogate escapes as `\ufffd` and with `NaN`, `Infinity` and numbers out of range as null.
fn mend(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let mut mended = String::new();
    let (mut at, mut copied) = (0, 0);
    while at < bytes.len() {
        let (end, replacement) = match bytes[at] {
            b'"' => {
                at = mend_string(text, at + 1, &mut mended, &mut copied);
                continue;
            }
            b'-' | b'0'..=b'9' | b'N' | b'I' => {
                let end = (at + 1..bytes.len())
                    .find(|end| !matches!(bytes[*end], b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.'))
                    .unwrap_or(bytes.len());
                (end, if is_number(&text[at..end]) { None } else { Some("null") })
            }
            _ => (at + 1, None),
        };
        if let Some(replacement) = replacement {
            mended.push_str(&text[copied..at]);
            mended.push_str(replacement);
            copied = end;
        }
        at = end;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    mended.push_str(&text[copied..]);
    Cow::Owned(mended)
}

/// Whether a token is to stay: a finite number, or something that is no number in any program.
fn is_number(token: &str) -> bool {
    match token {
        "NaN" | "-NaN" | "Infinity" | "-Infinity" => false,
        _ => token.parse::<f64>().map_or(true, f64::is_finite),
    }
}

/// Goes through a string from behind its opening quote; returns the place behind its closing one.
fn mend_string(text: &str, mut at: usize, mended: &mut String, copied: &mut usize) -> usize {
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return at + 1,
            b'\\' if bytes.get(at + 1) == Some(&b'u') => {
                let lone = match (code_unit(bytes, at), code_unit(bytes, at + 6)) {
                    (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => {
                        at += 12;
                        continue;
                    }
                    (Some(0xd800..=0xdfff), _) => true,
                    _ => false,
                };
                if lone {
                    mended.push_str(&text[*copied..at]);
                    mended.push_str("\\ufffd");
                    *copied = at + 6;
                    at += 6;
                } else {
                    at += 2;
                }
            }
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The UTF-16 unit of an escape such as `\ud83d` at a place, if one stands there.
fn code_unit(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
    digits.iter().try_fold(0, |unit, digit| Some(unit * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn half_characters_become_the_replacement_character() {
        for (text, expected) in [
            (r#""caf\udce9""#, "caf\u{fffd}"),
            (r#""\ud83d""#, "\u{fffd}"),
            (r#""\ud83dx\udE00""#, "\u{fffd}x\u{fffd}"),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}\u{1f600}"),
            (r#""\uD83D\uDE00\uDE00""#, "\u{1f600}\u{fffd}"),
            (r#""\\ud83d \udc00""#, "\\ud83d \u{fffd}"),
            (r#""\"\udc00\u00e9""#, "\"\u{fffd}é"),
        ] {
            assert_eq!(parse(text).unwrap(), json!(expected), "{text}");
        }
        assert_eq!(parse(r#"{"\udce9": "x"}"#).unwrap(), json!({"\u{fffd}": "x"}));
    }

    #[test]
    fn what_is_no_number_becomes_null() {
        for (text, expected) in [
            (
                r#"{"a":NaN,"b":[Infinity,-Infinity , 1e999,-1E+400]}"#,
                json!({"a": null, "b": [null, null, null, null]}),
            ),
            (r#"{"a": "NaN", "Infinity": [NaN]}"#, json!({"a": "NaN", "Infinity": [null]})),
            ("[NaN, 1e-999, 12, -3.5e2]", json!([null, 0.0, 12, -350.0])),
            ("[true, NaN, false, null]", json!([true, null, false, null])),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_broken_stays_broken() {
        for text in ["{\"a\": NaN", "\"\\u12", "\"\\", "[--1]", "\"\\ud8", "[1 NaN]", "nul", ""] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
