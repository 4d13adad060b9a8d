//! Files of `fuzz/`.

use std::path::{Path, PathBuf};

/// The directory.
pub(crate) fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").canonicalize().unwrap()
}

/// All files of a directory in the order of their names; none if there is no such directory.
pub(crate) fn inputs(directory: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Words that a target's inputs are made of, from its dictionary if it has one.
pub(crate) fn dictionary(target: &str) -> Vec<Vec<u8>> {
    let file = fuzz().join("dictionaries").join(target).with_extension("dict");
    std::fs::read_to_string(file).map(|text| words(&text)).unwrap_or_default()
}

/// Words of a dictionary in libfuzzer's form: a line each, between quotes, with `\xNN`, `\\` and `\"`.
pub(crate) fn words(text: &str) -> Vec<Vec<u8>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let quoted = lines.filter_map(|line| {
        let (start, end) = (line.find('"')?, line.rfind('"')?);
        line.get(start + 1..end)
    });
    quoted.map(unescaped).collect()
}

fn unescaped(text: &str) -> Vec<u8> {
    let (bytes, mut made, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let hexadecimal = text.get(at..).and_then(|rest| rest.strip_prefix("\\x")?.get(..2));
        if let Some(byte) = hexadecimal.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            made.push(byte);
            at += 4;
        } else {
            at += usize::from(bytes[at] == b'\\');
            made.extend(bytes.get(at));
            at += 1;
        }
    }
    made
}
