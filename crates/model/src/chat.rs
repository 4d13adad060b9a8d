//! Chat templates: Jinja programs that come with a model and turn messages into its text.
//!
//! They are other people's programs, so they get a budget of steps and memory ([`FUEL`]) and of time ([`DEADLINE`]), see no file, no clock and no environment, and can do nothing but return text. What they find is what
//! transformers gives them: `trim_blocks` and `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`,
//! a `tojson` without HTML escapes, Python's string and dictionary methods, `{% generation %}`.
//!
//! `strftime_now` tells [`TODAY`] whatever the day: data must give the same tokens on every day.

use std::fmt::Write as _;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Item, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, context};
use regex::Regex;
use serde_json::{Map, Value};

use crate::TokenizerError;

/// The budget of one rendering, beside [`MESSAGE_FUEL`] for each message and 4 for each of their bytes. About one is
/// used by a step of the template and one by 64 bytes of text made; real templates need hundreds a message.
const FUEL: u64 = 500_000;

/// See [`FUEL`].
const MESSAGE_FUEL: u64 = 2_000;

/// The time of one rendering, thousands of times what one takes. Not everything costs fuel: a list that holds
/// itself twice, sixty times over, is small to build and endless to print or compare.
const DEADLINE: Duration = Duration::from_secs(10);

/// Enough for lists nested as deeply as the budget allows; memory is used as it is touched.
const STACK: usize = 256 << 20;

/// As minijinja counts.
const BYTES_PER_FUEL: u64 = 64;

/// How deeply lists and objects of a template may be nested.
const MAX_DEPTH: usize = 100;

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

/// A chat template with the special tokens it may name.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    file: String,
    source: Arc<str>,
    special: Map<String, Value>,
    deadline: Duration,
}

impl ChatTemplate {
    /// `file` is for messages.
    pub(crate) fn new(file: String, source: &str, special: Map<String, Value>) -> Self {
        let source = GENERATION.replace_all(source, |found: &regex::Captures| {
            let keyword = if found.get(2).is_some() { "endif" } else { "if true" };
            format!("{}{keyword}{}", &found[1], &found[3])
        });
        Self { file, source: source.into(), special, deadline: DEADLINE }
    }

    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let bytes = messages.iter().chain(tools).map(size_of_value).sum::<u64>();
        let fuel = FUEL + MESSAGE_FUEL * messages.len() as u64 + 4 * bytes;
        let context = context! {
            messages => Serde(messages),
            tools => tools.map(Serde),
            documents => (),
            add_generation_prompt,
            ..Item::from(Serde(&self.special))
        };
        let file = || self.file.clone();
        match self.render_apart(context, fuel) {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) if error.kind() == ErrorKind::OutOfFuel => {
                Err(TokenizerError::Runaway { file: file(), reason: error.to_string() })
            }
            Ok(Err(error)) => Err(TokenizerError::Template { file: file(), reason: error.to_string() }),
            Err(RecvTimeoutError::Timeout) => Err(TokenizerError::Runaway {
                file: file(),
                reason: format!("stopped after {} seconds", self.deadline.as_secs_f32()),
            }),
            Err(RecvTimeoutError::Disconnected) => {
                Err(TokenizerError::Template { file: file(), reason: "no thread could render it".to_owned() })
            }
        }
    }

    /// Renders in a thread of its own, which is left behind if it exceeds the deadline.
    fn render_apart(&self, context: Item, fuel: u64) -> Result<Result<String, Error>, RecvTimeoutError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let source = Arc::clone(&self.source);
        let work = move || {
            let mut environment = environment();
            environment.set_fuel(Some(fuel));
            let text = environment.template_from_str(&source).and_then(|template| template.render(context));
            // Nobody listens any more after the deadline.
            let _ = sender.send(text);
        };
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
        thread.spawn(work).map_err(|_| RecvTimeoutError::Disconnected)?;
        receiver.recv_timeout(self.deadline)
    }
}

fn environment() -> Environment<'static> {
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

fn size_of_value(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(size_of_value).sum::<u64>() + 1,
        Value::Object(map) => {
            map.iter().map(|(key, it)| key.len() as u64 + size_of_value(it)).sum::<u64>() + 1
        }
        _ => 1,
    }
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

/// Python's `json.dumps` with transformers' defaults.
fn to_json(state: &State, value: Item, options: Kwargs) -> Result<String, Error> {
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

/// Writes a template's value, paying for each part before it goes on: values may hold the same list many times over, so that
/// their text is exponentially longer than they are.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_costs_no_fuel_ends_by_the_clock() {
        for template in [
            "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s ~ '' }}",
            "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        ] {
            let mut chat = ChatTemplate::new("file".to_owned(), template, Map::new());
            chat.deadline = Duration::from_millis(200);
            let error = chat.render(&[], None, false).expect_err(template);
            assert!(matches!(error, TokenizerError::Runaway { .. }), "{template}: {error}");
        }
    }
}
