//! The one place that writes to stdout (data) and stderr (for people).
//!
//! While a bar is shown, lines go above it, whoever prints them: no line ends a bar that is still needed.
#![expect(clippy::unused_self, reason = "this is the place that prints, whatever it is asked to show")]

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use anstyle::AnsiColor;
use indicatif::{ProgressBar, ProgressDrawTarget};
pub(crate) use mlx_quant::numbers::bytes;

/// The bar that is shown: a terminal has room for one.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Prints above the bar.
fn above_bar(print: impl FnOnce()) {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    match &*bar {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// What is shown, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Printer {
    quiet: bool,
    verbose: bool,
    json: bool,
}

impl Printer {
    pub(crate) fn new(quiet: bool, verbose: bool, json: bool) -> Self {
        Self { quiet, verbose, json }
    }

    /// Whether stdout is to hold one JSON document.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Whether a person wants to see all of it.
    pub(crate) fn is_verbose(self) -> bool {
        self.verbose
    }

    /// Columns that stdout shows: those of its terminal; where it is none, what COLUMNS says, or 80, so that a file or a
    /// pipe gets the same everywhere. The library reads no environment, so it is told.
    pub(crate) fn width(self) -> usize {
        let asked = || std::env::var("COLUMNS").ok()?.trim().parse().ok().filter(|columns| *columns > 0);
        let terminal = terminal_size::terminal_size_of(std::io::stdout());
        terminal.map(|(columns, _)| usize::from(columns.0)).or_else(asked).unwrap_or(80)
    }

    /// Data, to stdout. A reader that has gone away (`| head`) is no failure.
    pub(crate) fn data(self, text: &str) {
        above_bar(|| drop(writeln!(std::io::stdout(), "{}", printable(text))));
    }

    /// A line for people, to stderr.
    pub(crate) fn say(self, text: &str) {
        if !self.quiet {
            above_bar(|| anstream::eprintln!("{}", printable(text)));
        }
    }

    /// A line for curious people.
    pub(crate) fn detail(self, text: &str) {
        if self.verbose {
            above_bar(|| anstream::eprintln!("{}", printable(text)));
        }
    }

    /// Something that a person should know.
    pub(crate) fn warn(self, text: &str) {
        if !self.quiet {
            let label = label("warning:", AnsiColor::Yellow);
            above_bar(|| anstream::eprintln!("{label} {}", printable(text)));
        }
    }

    /// What went wrong, and on a line of its own what to do next.
    pub(crate) fn error(self, error: &anyhow::Error) {
        let text = printable(&told_once(error));
        above_bar(|| match text.split_once("; hint: ") {
            Some((what, hint)) => {
                anstream::eprintln!("{} {what}", label("error:", AnsiColor::Red));
                anstream::eprintln!("{} {hint}", label("hint:", AnsiColor::Cyan));
            }
            None => anstream::eprintln!("{} {text}", label("error:", AnsiColor::Red)),
        });
    }

    /// Whether a bar can be drawn: stderr is a terminal, and somebody wants to see it.
    pub(crate) fn draws(self) -> bool {
        !self.quiet
            && std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    }

    /// Whether lines are wanted where no bar can be drawn.
    pub(crate) fn tells(self) -> bool {
        !self.quiet && !self.draws()
    }

    /// The bar that is shown; a new one, prepared by `prepare`, if there is none.
    pub(crate) fn with_bar(self, prepare: impl FnOnce(&ProgressBar), change: impl FnOnce(&ProgressBar)) {
        if !self.draws() {
            return;
        }
        let mut shown = BAR.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = shown.get_or_insert_with(|| {
            // Drawn only when it looks as it should.
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
            prepare(&bar);
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar
        });
        change(bar);
    }

    /// Takes the bar away; the next one that asks for it gets another.
    pub(crate) fn without_bar(self) {
        if let Some(bar) = BAR.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}

/// An error and its causes, without those whose words stand in what was said before them.
fn told_once(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !told.contains(&cause) {
            let joint = if told.is_empty() { "" } else { ": " };
            told = format!("{told}{joint}{cause}");
        }
    }
    told
}

/// A word in colour, where stderr is a terminal and NO_COLOR is not set.
fn label(word: &str, color: AnsiColor) -> String {
    let style = color.on_default().bold();
    format!("{style}{word}{style:#}")
}

/// Control characters (names in a checkpoint may hold any) as escapes, so that they cannot steer a terminal.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug)]
        struct Outer(std::io::Error);
        impl std::fmt::Display for Outer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "recipe file: {}", self.0)
            }
        }
        impl std::error::Error for Outer {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                Some(&self.0)
            }
        }
        let error = anyhow::Error::new(Outer(std::io::Error::other("no layer; hint: look")));
        assert_eq!(told_once(&error), "recipe file: no layer; hint: look");
        let context = anyhow::Error::new(std::io::Error::other("disk full")).context("out/model");
        assert_eq!(told_once(&context), "out/model: disk full");
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc"), "a\\u{1b}[31mb\nc");
    }
}
