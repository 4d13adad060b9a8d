//! Files of a run, and what several bodies need.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mlx_format::checkpoint::Directory;
use mlx_quant::model::Tokenizer;

/// A tokenizer with one token for each byte, and a beginning and an end of text.
pub(crate) const TOKENIZER: &[u8] = include_bytes!("../files/tokenizer.json");

/// Its settings.
pub(crate) const TOKENIZER_CONFIG: &[u8] = br#"{"bos_token": "<s>", "eos_token": "</s>"}"#;

/// The usual markup of turns, with roles and content as they come.
const TEMPLATE: &[u8] = b"{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}";

/// Token ids of the tokenizer.
pub(crate) const VOCABULARY: usize = 258;

/// A directory of this process, in memory where the system has such. `TMPDIR` says where else; whoever sets it
/// cleans it up.
pub(crate) fn work() -> &'static Path {
    static WORK: LazyLock<PathBuf> = LazyLock::new(|| {
        let memory = Path::new("/dev/shm");
        let given = std::env::var_os("TMPDIR").is_some();
        let base = if !given && memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let work = base.join(format!("mlx-quant-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&work).expect("a work directory");
        work
    });
    &WORK
}

/// Writes a file below [`work`] and gives its path.
pub(crate) fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = work().join(name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).expect("a directory");
    }
    std::fs::write(&path, bytes).expect("written");
    path
}

/// The tokenizer of the bodies that read data, with a chat template.
pub(crate) fn byte_tokenizer() -> &'static Tokenizer {
    static READ: LazyLock<Tokenizer> = LazyLock::new(|| {
        let files = &[
            ("tokenizer.json", TOKENIZER),
            ("tokenizer_config.json", TOKENIZER_CONFIG),
            ("chat_template.jinja", TEMPLATE),
        ];
        Tokenizer::load(&Directory::Embedded { name: "fuzz", files }).expect("a valid tokenizer")
    });
    &READ
}

/// An error as a person needs it: with the name of a file, and what to do.
///
/// # Panics
/// If one of them is missing.
#[track_caller]
pub(crate) fn assert_helps(error: &dyn std::fmt::Display, file: &str) {
    let message = error.to_string();
    assert!(message.contains(file), "the error does not name {file}: {message}");
    assert!(message.contains("; hint: "), "the error does not say what to do: {message}");
}

/// The parts of an input between its first NUL bytes; missing ones are empty.
pub(crate) fn parts<const COUNT: usize>(bytes: &[u8]) -> [&[u8]; COUNT] {
    let mut all = bytes.splitn(COUNT, |byte| *byte == 0);
    std::array::from_fn(|_| all.next().unwrap_or_default())
}
