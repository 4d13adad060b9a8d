//! The filter `tojson`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value as Item, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// As minijinja counts.
const BYTES_PER_FUEL: u64 = 64;

/// How deeply lists and objects of a template may be nested.
const MAX_DEPTH: usize = 100;

/// Python's `json.dumps` with transformers' defaults.
pub(super) fn to_json(state: &State, value: Item, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    if indent.is_some_and(|indent| indent > 16) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson indents by at most 16"));
    }
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = JsonWriter { state, indent, item, key, ascii, sorted, text: String::new() };
    writer.write(&value, 0)?;
    Ok(writer.text)
}

/// Writes a template's value, paying for each part before it goes on: values may hold the same list many times over, so
/// that their text is exponentially longer than they are.
struct JsonWriter<'a, 'env> {
    state: &'a State<'a, 'env>,
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
    text: String,
}

impl JsonWriter<'_, '_> {
    fn write(&mut self, value: &Item, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "value is nested too deeply for tojson"));
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.items(['[', ']'], items, depth)
            }
            ValueKind::Map => {
                let mut keys: Vec<Item> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                let items = keys.into_iter().map(|key| {
                    let item = value.get_item(&key).unwrap_or_default();
                    (Some(key), item)
                });
                self.items(['{', '}'], items, depth)
            }
            _ => self.scalar(value),
        }
    }

    fn items(
        &mut self,
        brackets: [char; 2],
        items: impl Iterator<Item = (Option<Item>, Item)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.text.push(brackets[0]);
        let mut empty = true;
        for (key, item) in items {
            if !empty {
                let separator = self.item.clone();
                self.push(&separator)?;
            }
            empty = false;
            self.new_line(depth + 1)?;
            if let Some(key) = key {
                self.scalar(&Item::from(key.to_string()))?;
                let separator = self.key.clone();
                self.push(&separator)?;
            }
            self.write(&item, depth + 1)?;
        }
        if !empty {
            self.new_line(depth)?;
        }
        self.text.push(brackets[1]);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.indent else { return Ok(()) };
        self.push(&format!("\n{}", " ".repeat(indent * depth)))
    }

    fn scalar(&mut self, value: &Item) -> Result<(), Error> {
        let plain = serde_json::to_string(value)
            .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
        if !self.ascii {
            return self.push(&plain);
        }
        let mut escaped = String::with_capacity(plain.len());
        for letter in plain.chars() {
            if (' '..='~').contains(&letter) {
                escaped.push(letter);
            } else {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    let _ = write!(escaped, "\\u{unit:04x}");
                }
            }
        }
        self.push(&escaped)
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / BYTES_PER_FUEL)?;
        self.text.push_str(text);
        Ok(())
    }
}
