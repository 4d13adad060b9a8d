//! config.json: read as Python reads it, written as mlx-lm writes it.

use std::fmt::Write as _;

use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value};

use super::directory::{Directory, DirectoryError};

/// The key under which transformers and mlx-lm tag non-finite floats in JSON.
const FLOAT_TAG: &str = "__float__";

/// A model configuration: a JSON object with its keys in file order.
#[derive(Clone, Debug, PartialEq)]
pub struct Config(pub Map<String, Value>);

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not readable.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// No config.json.
    #[error("{0} is missing; hint: give the directory that holds config.json beside the weights")]
    Missing(String),
    /// Not a JSON object.
    #[error("{file}: {reason}; hint: download the file again")]
    Json {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A key has no usable value.
    #[error("config.json: {key} {reason}; hint: this does not look like a language model's config.json")]
    Key {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A key asks for something that is right but not described here.
    #[error(
        "config.json: {key} {reason}, which is not described here; hint: `convert` works without a description, `eval` and calibrated methods do not"
    )]
    Undescribed {
        /// The key.
        key: String,
        /// What it asks for.
        reason: String,
    },
}

impl Config {
    /// Reads config.json and, as mlx-lm does, takes `eos_token_id` from generation_config.json if that has one.
    ///
    /// # Errors
    /// If config.json is missing or not an object. A broken generation_config.json is passed over.
    pub fn load(directory: &Directory) -> Result<Self, ConfigError> {
        let file = directory.display_file("config.json");
        let bytes = directory.read("config.json")?.ok_or_else(|| ConfigError::Missing(file.clone()))?;
        let mut config = Self::parse(&bytes).map_err(|reason| ConfigError::Json { file, reason })?;
        if let Some(bytes) = directory.read("generation_config.json")?
            && let Ok(mut generation) = Self::parse(&bytes)
            && let Some(eos) = generation.0.remove("eos_token_id")
            && is_truthy(&eos)
        {
            config.0.insert("eos_token_id".to_owned(), eos);
        }
        Ok(config)
    }

    /// Parses a JSON object; Python's bare `Infinity`, `-Infinity` and `NaN` become `{"__float__": ...}`.
    ///
    /// # Errors
    /// What is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| format!("not UTF-8: {error}"))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        match serde_json::from_str(&tag_floats(text)) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err("not a JSON object".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The text that mlx-lm writes (`mlx_lm/utils.py`, `save_config`): top-level keys sorted, nested ones in
    /// their order, four spaces, ASCII only, no final newline; without `_name_or_path`.
    pub fn to_mlx_json(&self) -> String {
        let mut keys: Vec<&String> = self.0.keys().filter(|key| *key != "_name_or_path").collect();
        keys.sort();
        let sorted: Map<String, Value> =
            keys.into_iter().map(|key| (key.clone(), self.0[key].clone())).collect();
        python_json(&Value::Object(sorted))
    }

    /// JSON as Python writes it, keys in file order, tagged floats bare again: for files in which nobody expects tags.
    pub fn to_python_json(&self) -> String {
        const MARK: &str = "\u{0}float:";
        fn bare(value: &Value) -> Value {
            match value {
                Value::Object(map) => match map.get(FLOAT_TAG).and_then(Value::as_str) {
                    Some(float) if map.len() == 1 => format!("{MARK}{float}").into(),
                    _ => Value::Object(map.iter().map(|(key, value)| (key.clone(), bare(value))).collect()),
                },
                Value::Array(items) => items.iter().map(bare).collect(),
                other => other.clone(),
            }
        }
        let mut text = python_json(&bare(&Value::Object(self.0.clone())));
        for float in ["NaN", "Infinity", "-Infinity"] {
            text = text.replace(&format!("\"\\u0000float:{float}\""), float);
        }
        text
    }

    /// `model_type`.
    ///
    /// # Errors
    /// If it is missing.
    pub fn model_type(&self) -> Result<&str, ConfigError> {
        self.str("model_type").ok_or_else(|| ConfigError::Key {
            key: "model_type".to_owned(),
            reason: "is missing or no string".to_owned(),
        })
    }

    /// A key, looked up in `text_config` first when there is one (models with vision nest the language model).
    /// `outer.inner` is a key of an object.
    pub fn get<'c>(&'c self, key: &str) -> Option<&'c Value> {
        let (outer, inner) = key.split_once('.').map_or((key, None), |(outer, inner)| (outer, Some(inner)));
        let of = |value: Option<&'c Value>| match inner {
            None => value,
            Some(inner) => value?.get(inner),
        };
        let nested = of(self.0.get("text_config").and_then(|text| text.get(outer)));
        nested.or_else(|| of(self.0.get(outer))).filter(|value| !value.is_null())
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        // `model_type` is the outer one: the nested one names the inner class.
        self.0.get(key).and_then(Value::as_str).or_else(|| self.get(key).and_then(Value::as_str))
    }

    /// A boolean, or `default` where the key is missing.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// A non-negative integer below 2^31 (no count in a model is larger).
    ///
    /// # Errors
    /// If the key is missing or something else.
    pub fn count(&self, key: &str) -> Result<usize, ConfigError> {
        let error = |reason: &str| ConfigError::Key { key: key.to_owned(), reason: reason.to_owned() };
        let value = self.get(key).ok_or_else(|| error("is missing"))?;
        value
            .as_u64()
            .filter(|n| *n < 1 << 31)
            .map(|n| n as usize)
            .ok_or_else(|| error(&format!("is {value}, not a sensible count")))
    }
}

/// Python's truth of a JSON value.
pub fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// Replaces Python's bare non-finite floats, outside strings, by their tagged form.
fn tag_floats(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.contains("Infinity") && !text.contains("NaN") {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let token =
            ["-Infinity", "Infinity", "NaN"].into_iter().find(|token| !in_string && rest.starts_with(token));
        let taken = if let Some(token) = token {
            let _ = write!(out, "{{\"{FLOAT_TAG}\": \"{token}\"}}");
            token.len()
        } else if in_string && c == '\\' {
            // The escaped character cannot end the string.
            let escaped = rest[1..].chars().next().map_or(0, char::len_utf8);
            out.push_str(&rest[..=escaped]);
            1 + escaped
        } else {
            in_string ^= c == '"';
            out.push(c);
            c.len_utf8()
        };
        rest = &rest[taken..];
    }
    out.into()
}

/// Python's layout of JSON: four spaces, and floats as `repr` prints them.
struct PythonFormatter(PrettyFormatter<'static>);

macro_rules! delegate {
    ($($method:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $method<W: ?Sized + std::io::Write>(&mut self, writer: &mut W $(, $argument: $kind)*) -> std::io::Result<()> {
            self.0.$method(writer $(, $argument)*)
        })*
    };
}

impl Formatter for PythonFormatter {
    delegate! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        begin_object_value();
        end_object_value();
    }

    fn write_f64<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, value: f64) -> std::io::Result<()> {
        let scientific = format!("{value:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        match exponent.parse::<i32>() {
            Ok(exponent) if !(-4..16).contains(&exponent) => {
                let sign = if exponent < 0 { '-' } else { '+' };
                write!(writer, "{digits}e{sign}{:02}", exponent.abs())
            }
            _ => write!(writer, "{value:?}"),
        }
    }
}

/// JSON as Python's `json.dump(value, indent=4)` lays it out.
pub(super) fn python_json(value: &Value) -> String {
    let mut bytes = Vec::new();
    let formatter = PythonFormatter(PrettyFormatter::with_indent(b"    "));
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    serde::Serialize::serialize(value, &mut serializer).expect("a JSON value serializes to memory");
    let text = String::from_utf8(bytes).expect("serde_json writes UTF-8");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() && c != '\x7f' {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_floats_are_read_and_written_tagged() {
        let config =
            Config::parse(br#"{"limit": [0.0, Infinity, -Infinity, NaN], "name": "Infinity \" NaN"}"#)
                .unwrap();
        let tagged = serde_json::json!({"limit": [0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}, {"__float__": "NaN"}], "name": "Infinity \" NaN"});
        assert_eq!(Value::Object(config.0), tagged);
        let bare = Config::parse(br#"{"limit": [0.0, Infinity, -Infinity, NaN], "a": {"t": NaN}}"#).unwrap();
        assert_eq!(Config::parse(bare.to_python_json().as_bytes()).unwrap(), bare);
        assert!(bare.to_python_json().contains("\"t\": NaN"), "{}", bare.to_python_json());
        assert!(Config::parse(b"[1]").is_err());
        assert!(Config::parse(b"{\"a\": Infinit}").is_err());
    }

    #[test]
    fn written_as_python_writes_it() {
        let config = Config::parse("{\"b\": {\"z\": [1e-05, 0.0001, 10000.0, 1e16, -1.5e-7, 3], \"a\": []}, \"a\": \"\u{e9}\u{1f600}\", \"_name_or_path\": \"x\"}".as_bytes()).unwrap();
        let expected = "{\n    \"a\": \"\\u00e9\\ud83d\\ude00\",\n    \"b\": {\n        \"z\": [\n            1e-05,\n            0.0001,\n            10000.0,\n            1e+16,\n            -1.5e-07,\n            3\n        ],\n        \"a\": []\n    }\n}";
        assert_eq!(config.to_mlx_json(), expected);
    }

    #[test]
    fn text_config_comes_first_and_counts_are_sane() {
        let config = Config::parse(br#"{"model_type": "outer", "n": 2, "text_config": {"model_type": "inner", "n": 3, "big": 4294967296, "neg": -1}}"#).unwrap();
        assert_eq!((config.model_type().unwrap(), config.count("n").unwrap()), ("outer", 3));
        assert!(
            config.count("big").is_err() && config.count("neg").is_err() && config.count("none").is_err()
        );
    }

    #[test]
    fn keys_of_objects_are_found() {
        let config = Config::parse(br#"{"a": {"n": 2, "m": null}, "text_config": {"a": {"k": 3}}}"#).unwrap();
        assert_eq!((config.count("a.n").unwrap(), config.count("a.k").unwrap()), (2, 3));
        assert!(config.get("a.m").is_none() && config.get("a.x").is_none() && config.get("n.a").is_none());
    }
}
