//! tokenizer.json and tokenizer_config.json.

use mlx_format::checkpoint::Directory;
use mlx_quant::model::Tokenizer;

use crate::work::{assert_helps, parts, work, write};

/// What is encoded.
const TEXTS: [&str; 6] = [
    "",
    "Hello, world! 12345",
    "naïve 😀\u{200d}\n\t\r\n  x",
    "<s></s><|begin_of_text|>[CLS]",
    "\u{0}\u{feff}\u{ac00}\u{301}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// A tokenizer.json, a NUL byte, a tokenizer_config.json, a NUL byte, and a text. Ids are the same each time and none is above the
/// highest.
///
/// # Panics
/// If one is, or an error does not help.
pub fn tokenizer(bytes: &[u8]) {
    let [tokenizer, settings, text] = parts(bytes);
    write("tokenizer/tokenizer.json", tokenizer);
    write("tokenizer/tokenizer_config.json", if settings.is_empty() { b"{}" } else { settings });
    let directory = Directory::open(&work().join("tokenizer")).expect("a directory");
    let tokenizer = match Tokenizer::load(&directory) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert_helps(&error, ""),
    };
    assert!(
        tokenizer.prefix().iter().chain(&tokenizer.end_of_text()).all(|id| *id <= tokenizer.highest_id())
    );
    for text in TEXTS.into_iter().chain(std::str::from_utf8(text)) {
        match tokenizer.encode(text) {
            Ok(ids) => {
                assert!(ids.iter().all(|id| *id <= tokenizer.highest_id()), "{text:?}: {ids:?}");
                assert_eq!(tokenizer.encode(text).ok(), Some(ids), "{text:?}");
            }
            Err(error) => assert_helps(&error, ""),
        }
    }
}
