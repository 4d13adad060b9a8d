//! `--recipe-file`: per-layer settings by path pattern.

use globset::{Glob, GlobSet};
use mlx_format::{Mode, Scheme, SchemeError};
use serde::Deserialize;

/// A recipe file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OverridesError {
    /// Not the TOML it should be.
    #[error("{0}; hint: entries look like\n[[layer]]\npath = \"*.mlp.down_proj\"\nbits = 6")]
    Toml(#[from] toml::de::Error),
    /// Not a pattern.
    #[error("path {path:?}: {reason}; hint: `*` stands for any characters, as in \"*.mlp.down_proj\"")]
    Pattern {
        /// As written.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Not a mode.
    #[error("path {path:?}: unknown mode {mode:?}; hint: affine, mxfp4, mxfp8 or nvfp4")]
    Mode {
        /// As written.
        path: String,
        /// As written.
        mode: String,
    },
    /// Bits or group size that MLX does not have.
    #[error("path {path:?}: {source}")]
    Scheme {
        /// As written.
        path: String,
        /// Why.
        source: SchemeError,
    },
    /// `keep` beside a scheme.
    #[error("path {0:?} is kept and quantized at once; hint: leave out keep, or bits, group_size and mode")]
    Contradiction(String),
    /// Nothing in the model has such a path.
    #[error(
        "path {0:?} matches no linear or embedding layer of this model that is still to be quantized; hint: --dry-run lists the paths"
    )]
    Unused(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    layer: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    path: String,
    bits: Option<u32>,
    group_size: Option<usize>,
    mode: Option<String>,
    #[serde(default)]
    keep: bool,
}

#[derive(Clone, Debug)]
struct Override {
    path: String,
    matcher: GlobSet,
    scheme: Option<Scheme>,
}

/// A parsed recipe file. Later entries win.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The text of the file, to be copied into the output.
    pub text: String,
    entries: Vec<Override>,
}

impl Overrides {
    /// Parses the file; what an entry leaves out is taken from `base`, the scheme of the command line.
    ///
    /// # Errors
    /// [`OverridesError`].
    pub fn parse(text: &str, base: Scheme) -> Result<Self, OverridesError> {
        let file: File = toml::from_str(text)?;
        let entries =
            file.layer.into_iter().map(|entry| Override::new(entry, base)).collect::<Result<_, _>>()?;
        Ok(Self { text: text.to_owned(), entries })
    }

    /// What the file says of the module at `path`: nothing, keep it (`Some(None)`), or a scheme.
    pub fn get(&self, path: &str) -> Option<Option<Scheme>> {
        self.entries.iter().rev().find(|entry| entry.matcher.is_match(path)).map(|entry| entry.scheme)
    }

    /// Refuses patterns that match none of the paths: they are misspelt.
    ///
    /// # Errors
    /// [`OverridesError::Unused`].
    pub fn check_used<'p>(&self, paths: impl Iterator<Item = &'p str> + Clone) -> Result<(), OverridesError> {
        match self.entries.iter().find(|entry| !paths.clone().any(|path| entry.matcher.is_match(path))) {
            Some(unused) => Err(OverridesError::Unused(unused.path.clone())),
            None => Ok(()),
        }
    }
}

impl Override {
    fn new(entry: Entry, base: Scheme) -> Result<Self, OverridesError> {
        let Entry { path, bits, group_size, mode, keep } = entry;
        // A set of one, because a matcher panics where a pattern is too long or too deeply nested to be compiled.
        let matcher = match Glob::new(&path).and_then(|glob| GlobSet::builder().add(glob).build()) {
            Ok(matcher) => matcher,
            Err(error) => return Err(OverridesError::Pattern { path, reason: error.kind().to_string() }),
        };
        if keep {
            if bits.is_some() || group_size.is_some() || mode.is_some() {
                return Err(OverridesError::Contradiction(path));
            }
            return Ok(Self { path, matcher, scheme: None });
        }
        let mode = match mode {
            None => base.mode(),
            Some(name) => match Mode::from_name(&name) {
                Some(mode) => mode,
                None => return Err(OverridesError::Mode { path, mode: name }),
            },
        };
        // Bits and group size of another mode than the base's are that mode's own.
        let inherit = mode == base.mode();
        let bits = bits.or(inherit.then_some(base.bits()));
        let group_size = group_size.or(inherit.then_some(base.group_size()));
        match Scheme::new(mode, bits, group_size).and_then(Scheme::widely_loaded) {
            Ok(scheme) => Ok(Self { path, matcher, scheme: Some(scheme) }),
            Err(source) => Err(OverridesError::Scheme { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Overrides, OverridesError> {
        Overrides::parse(text, Scheme::affine(4, 64).unwrap())
    }

    #[test]
    fn later_entries_win_and_inherit() {
        let overrides = parse(
            "[[layer]]\npath = \"*\"\nbits = 3\n[[layer]]\npath = \"lm_head\"\nmode = \"mxfp8\"\n[[layer]]\npath = \"*.gate\"\nkeep = true",
        )
        .unwrap();
        assert_eq!(overrides.get("model.layers.0.mlp.up_proj"), Some(Some(Scheme::affine(3, 64).unwrap())));
        assert_eq!(overrides.get("lm_head").unwrap().unwrap().mode(), Mode::Mxfp8);
        assert_eq!(overrides.get("model.layers.0.mlp.gate"), Some(None));
        overrides.check_used(["a.gate", "lm_head"].into_iter()).unwrap();
        assert!(matches!(overrides.check_used(["a.gate"].into_iter()), Err(OverridesError::Unused(_))));
    }

    #[test]
    fn patterns_that_cannot_be_compiled_are_refused() {
        for path in [
            format!("{}a{}", "{".repeat(300), "}".repeat(300)),
            format!("{}a{}", "{a,".repeat(400), "}".repeat(400)),
            "?".repeat(1_000_000),
        ] {
            let refused = parse(&format!("[[layer]]\npath = '{path}'\nbits = 3"));
            assert!(matches!(refused, Err(OverridesError::Pattern { .. })), "{path:.9}");
        }
        let deep = format!("[[layer]]\npath = '{}a{}'\nbits = 3", "{".repeat(20), "}".repeat(20));
        assert!(parse(&deep).unwrap().get("a").is_some());
    }

    #[test]
    fn mistakes_are_named() {
        assert!(matches!(parse("[[layer]]\npath = \"a\"\nbit = 3"), Err(OverridesError::Toml(_))));
        assert!(matches!(parse("[[layer]]\npath = \"a[\""), Err(OverridesError::Pattern { .. })));
        assert!(matches!(parse("[[layer]]\npath = \"a\"\nmode = \"q\""), Err(OverridesError::Mode { .. })));
        assert!(matches!(parse("[[layer]]\npath = \"a\"\nbits = 7"), Err(OverridesError::Scheme { .. })));
        assert!(matches!(
            parse("[[layer]]\npath = \"a\"\nbits = 7\nkeep = true"),
            Err(OverridesError::Contradiction(_))
        ));
    }
}
