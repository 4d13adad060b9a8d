//! The one place that writes to stdout (data) and stderr (for people).
#![expect(clippy::unused_self, reason = "this is the place that prints, whatever it is asked to show")]

use std::io::Write as _;

use anstyle::AnsiColor;
use indicatif::{ProgressBar, ProgressDrawTarget};
pub(crate) use mlx_quant::numbers::bytes;

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
        let _ = writeln!(std::io::stdout(), "{}", printable(text));
    }

    /// A line for people, to stderr.
    pub(crate) fn say(self, text: &str) {
        if !self.quiet {
            anstream::eprintln!("{}", printable(text));
        }
    }

    /// A line for curious people.
    pub(crate) fn detail(self, text: &str) {
        if self.verbose {
            anstream::eprintln!("{}", printable(text));
        }
    }

    /// Something that a person should know.
    pub(crate) fn warn(self, text: &str) {
        if !self.quiet {
            anstream::eprintln!("{} {}", label("warning:", AnsiColor::Yellow), printable(text));
        }
    }

    /// What went wrong, and on a line of its own what to do next.
    pub(crate) fn error(self, error: &anyhow::Error) {
        let text = printable(&format!("{error:#}"));
        match text.split_once("; hint: ") {
            Some((what, hint)) => {
                anstream::eprintln!("{} {what}", label("error:", AnsiColor::Red));
                anstream::eprintln!("{} {hint}", label("hint:", AnsiColor::Cyan));
            }
            None => anstream::eprintln!("{} {text}", label("error:", AnsiColor::Red)),
        }
    }

    /// A bar, invisible where stderr is no terminal.
    pub(crate) fn progress(self) -> ProgressBar {
        let target = if self.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        ProgressBar::with_draw_target(None, target)
    }
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
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc"), "a\\u{1b}[31mb\nc");
    }
}
