//! Kernels as text: WGSL files in which words are filled in, lines repeated and lines left out.
//!
//! * `$NAME` becomes what the caller says.
//! * `#if NAME` .. `#else` .. `#end`: lines for a name that is there and not `0`, or is not.
//! * `#repeat i N` .. `#end`: the lines `N` times, `$i` being 0, 1, ..; `N` is a number or a name.
//!
//! Registers have no index, so whatever lies in registers is written out by repetition.

use crate::error::{Result, bail};

/// A kernel.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) source: &'static str,
    /// Whether places in arrays are held within them. Only a kernel whose places are shown to lie there goes without.
    pub(super) checked: bool,
    /// Bindings that it only reads, which come first.
    pub(super) reads: usize,
    /// Bindings that it writes.
    pub(super) writes: usize,
}

/// A kernel `wgsl/NAME.wgsl`, with the files that it shares with others.
macro_rules! program {
    ($name:literal, $reads:literal, $writes:literal $(, $shared:literal)*) => {
        Program {
            name: $name,
            source: concat!(
                $(include_str!(concat!("wgsl/", $shared, ".wgsl")),)*
                include_str!(concat!("wgsl/", $name, ".wgsl"))
            ),
            checked: true,
            reads: $reads,
            writes: $writes,
        }
    };
}

pub(super) use program;

/// Words that are filled in.
pub(super) type Words<'w> = &'w [(&'static str, String)];

/// What every kernel may use.
const COMMON: &str = include_str!("wgsl/common.wgsl");

impl Program {
    /// The WGSL text.
    pub(super) fn text(&self, words: Words<'_>) -> Result<String> {
        let words: Vec<(String, String)> =
            words.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let mut out = COMMON.to_owned();
        let lines: Vec<&str> = self.source.lines().collect();
        expand(&lines, &words, &mut out)?;
        // Directives stand in front of everything else.
        let (directives, rest): (Vec<&str>, Vec<&str>) =
            out.lines().partition(|line| line.starts_with("enable "));
        if directives.is_empty() {
            return Ok(out);
        }
        Ok([directives, rest].concat().join("\n"))
    }
}

fn value<'w>(words: &'w [(String, String)], name: &str) -> Option<&'w str> {
    words.iter().rev().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
}

/// Where the `#end` (and the `#else`) of a block stands that begins in front of `lines`.
fn block(lines: &[&str]) -> Result<(usize, Option<usize>)> {
    let (mut depth, mut otherwise) = (0, None);
    for (at, line) in lines.iter().enumerate() {
        match line.trim_start() {
            line if line.starts_with("#if") || line.starts_with("#repeat") => depth += 1,
            "#else" if depth == 0 => otherwise = Some(at),
            "#end" if depth == 0 => return Ok((at, otherwise)),
            "#end" => depth -= 1,
            _ => {}
        }
    }
    bail!("a kernel's block has no end")
}

fn expand(lines: &[&str], words: &[(String, String)], out: &mut String) -> Result<()> {
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        let trimmed = line.trim_start();
        if let Some(name) = trimmed.strip_prefix("#if ") {
            let (end, otherwise) = block(&lines[at..])?;
            let holds = value(words, name.trim()).is_some_and(|value| value != "0");
            let middle = otherwise.unwrap_or(end);
            let chosen = if holds { 0..middle } else { (middle + 1).min(end)..end };
            expand(&lines[at..][chosen], words, out)?;
            at += end + 1;
        } else if let Some(rest) = trimmed.strip_prefix("#repeat ") {
            let (end, _) = block(&lines[at..])?;
            let Some((index, times)) = rest.trim().split_once(' ') else { bail!("a kernel repeats {rest}") };
            let Ok(times) = value(words, times).unwrap_or(times).parse::<usize>() else {
                bail!("a kernel repeats {times} times")
            };
            for step in 0..times {
                let mut inner = words.to_vec();
                inner.push((index.to_owned(), step.to_string()));
                expand(&lines[at..at + end], &inner, out)?;
            }
            at += end + 1;
        } else {
            fill(line, words, out)?;
            out.push('\n');
        }
    }
    Ok(())
}

/// A line with its words filled in. The longest name that fits is taken.
fn fill(line: &str, words: &[(String, String)], out: &mut String) -> Result<()> {
    let mut rest = line;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let fits = words.iter().rev().filter(|(name, _)| rest.starts_with(name.as_str()));
        // Of names of one length the last, which is the innermost.
        let longest = fits.reduce(|best, own| if own.0.len() > best.0.len() { own } else { best });
        let Some((name, value)) = longest else { bail!("a kernel's line has an unknown word: {line}") };
        out.push_str(value);
        rest = &rest[name.len()..];
    }
    out.push_str(rest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &'static str, words: Words<'_>) -> Result<String> {
        let program = Program { name: "test", source, checked: true, reads: 0, writes: 0 };
        program.text(words).map(|text| text[COMMON.len()..].to_owned())
    }

    #[test]
    fn words_blocks_and_repetitions() {
        let source = "#repeat i N\n#repeat j 2\nlet c$i$j = $VALUE;\n#end\n#end\n#if WIDE\nwide\n#else\n\
                      narrow\n#end\nlast";
        let words = |wide: &str| {
            [("N", "2".to_owned()), ("VALUE", "x + $".replace('$', "y")), ("WIDE", wide.to_owned())]
        };
        let expected = "let c00 = x + y;\nlet c01 = x + y;\nlet c10 = x + y;\nlet c11 = x + y;\n";
        assert_eq!(text(source, &words("1")).unwrap(), format!("{expected}wide\nlast\n"));
        assert_eq!(text(source, &words("0")).unwrap(), format!("{expected}narrow\nlast\n"));
        assert!(text("#repeat i N\n#end", &[]).is_err());
        assert!(text("#if A", &[]).is_err());
        assert!(text("let a = $B;", &[]).is_err());
    }
}
