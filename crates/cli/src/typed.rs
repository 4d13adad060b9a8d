//! The command as it was typed, so that people can repeat it.

use std::path::Path;
use std::sync::OnceLock;

use mlx_format::checkpoint::Command;

/// Begins an unfinished run anew, which whoever repeats a command does not want.
const RESTART: &str = "--restart";

/// This process's command and where it was given, quoted for a shell.
pub(crate) fn typed() -> &'static Command {
    static TYPED: OnceLock<Command> = OnceLock::new();
    TYPED.get_or_init(|| {
        let words = std::env::args_os().filter(|word| word != RESTART);
        let words: Vec<String> = words.map(|word| quoted(Path::new(&word))).collect();
        let directory = std::env::current_dir().unwrap_or_default().display().to_string();
        // A line break would be taken for the end of the command.
        let one_line = |text: String| text.replace(['\n', '\r'], " ");
        Command { directory: one_line(directory), line: one_line(words.join(" ")) }
    })
}

/// As a shell takes it.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+=:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_take_them_apart() {
        for (word, expected) in
            [("out-4bit", "out-4bit"), ("my model", "'my model'"), ("it's", r"'it'\''s'"), ("", "''")]
        {
            assert_eq!(quoted(Path::new(word)), expected);
        }
    }
}
