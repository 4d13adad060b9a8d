//! What every command that made a model ends with: how good it is, where it lies, how it is run.

use std::path::Path;

use mlx_format::checkpoint::Config;
use mlx_quant::evaluate::{Against, reading};
use mlx_quant::model::arch::{Loader, loader};

use super::source::Asked;
use crate::printer::Printer;
use crate::typed::quoted;

/// A model that was made.
pub(super) struct Ending<'e> {
    /// Where it lies.
    pub(super) path: &'e Path,
    /// What it is, in a few words.
    pub(super) what: String,
    /// What was measured of it.
    pub(super) quality: Option<&'e Against>,
    /// What it was made from.
    pub(super) original: Asked<'e>,
}

impl Ending<'_> {
    /// Three lines.
    pub(super) fn say(&self, printer: Printer) {
        let path = typed_path(self.path);
        printer.say(&format!("quality  {}", self.quality()));
        printer.say(&format!("output   {path}: {}", self.what));
        printer.say(&format!("run it   {}", generate(self.path)));
    }

    fn quality(&self) -> String {
        if let Some(against) = self.quality {
            let error = against.kl_stderr.map_or_else(String::new, |error| format!(" ± {error:.4}"));
            let (kl, words) = (against.kl_mean, reading(against.kl_mean).words);
            return format!("KL {kl:.4}{error} on held-out text: {words}");
        }
        let original = self.original.word();
        let original = original.map_or_else(String::new, |path| format!(" --reference {}", quoted(&path)));
        format!("not measured; `mlx-quant eval --model {}{original}` measures it", typed_path(self.path))
    }
}

/// The command that runs the model at `path`.
pub(super) fn generate(path: &Path) -> String {
    let config = std::fs::read(path.join("config.json")).ok().and_then(|bytes| Config::parse(&bytes).ok());
    let loader = config.map_or(Loader::MlxLm, |config| loader(&config)).name();
    format!("{loader}.generate --model {} --prompt \"Hello\"", typed_path(path))
}

/// As one types it, so that nobody takes it for a name on the hub.
fn typed_path(path: &Path) -> String {
    let begins = |start: &str| path.starts_with(start);
    if path.is_absolute() || begins(".") || begins("..") {
        quoted(path)
    } else {
        quoted(&Path::new(".").join(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_says_how_to() {
        let model = Path::new("Org/My Model");
        let against = Against { kl_mean: 0.0415, kl_stderr: Some(0.0021), ..Against::default() };
        let path = Path::new("out 4bit");
        let ending = |quality, original| {
            Ending { path, what: String::new(), quality, original: Asked::new(original, None) }.quality()
        };
        assert_eq!(
            ending(Some(&against), None),
            "KL 0.0415 ± 0.0021 on held-out text: very close to the original"
        );
        assert_eq!(
            ending(None, Some(model)),
            "not measured; `mlx-quant eval --model './out 4bit' --reference 'Org/My Model'` measures it"
        );
        assert_eq!(ending(None, None), "not measured; `mlx-quant eval --model './out 4bit'` measures it");
        for (path, typed) in [("/a/b", "/a/b"), ("../b", "../b"), ("./b", "./b"), ("a/b", "./a/b")] {
            assert_eq!(typed_path(Path::new(path)), typed);
        }
    }
}
