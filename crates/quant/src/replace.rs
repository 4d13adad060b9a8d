//! What may be replaced by a new model.
//!
//! Nothing is lost that was not made here: a directory is replaced only where its card says that mlx-quant wrote it, and
//! where nothing lies in it that mlx-quant does not write. Links are not followed.

use std::path::Path;

use mlx_format::checkpoint::{INDEX, is_mlx_weights};

use crate::card::is_own_card;
use crate::source::is_companion;

/// What a model of ours has beside weights and companions.
const OWN: [&str; 4] = ["config.json", "README.md", "recipe.toml", INDEX];

/// Agrees to replacing a directory that holds a model written by mlx-quant and nothing else.
///
/// # Errors
/// In words: what it is instead.
pub fn replaceable(path: &Path) -> Result<(), String> {
    let told = |error: std::io::Error| error.to_string();
    if !path.symlink_metadata().map_err(told)?.is_dir() {
        return Err("it is no directory".to_owned());
    }
    let card = std::fs::read(path.join("README.md")).unwrap_or_default();
    let card = String::from_utf8_lossy(&card);
    if !(path.join("config.json").is_file() && is_own_card(&card) && card.contains("with mlx-quant ")) {
        return Err("it is no model that mlx-quant wrote (its README.md does not say so)".to_owned());
    }
    for entry in std::fs::read_dir(path).map_err(told)? {
        let entry = entry.map_err(told)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = OWN.contains(&name.as_str()) || is_mlx_weights(&name) || is_companion(&name);
        if !(ours && entry.file_type().map_err(told)?.is_file()) {
            return Err(format!("{name} in it was not written by mlx-quant"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_models_of_ours_and_nothing_else_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let refused = |words: &str| {
            let reason = replaceable(&path).unwrap_err();
            assert!(reason.contains(words), "{reason}");
        };
        std::fs::write(&path, "a file").unwrap();
        refused("no directory");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused("no model that mlx-quant wrote");
        let write = |name: &str, text: &str| std::fs::write(path.join(name), text).unwrap();
        write("config.json", "{}");
        write("README.md", "A model of somebody");
        refused("README.md does not say so");
        write("README.md", "Converted from `x` with mlx-quant 0.1.0\n\n| stored as | tensors |\n");
        for name in ["model.safetensors", INDEX, "tokenizer.json", "recipe.toml"] {
            write(name, "");
        }
        assert_eq!(replaceable(&path), Ok(()));
        write("notes.txt", "mine");
        refused("notes.txt in it");
        std::fs::remove_file(path.join("notes.txt")).unwrap();
        std::fs::create_dir(path.join("model.safetensors.d")).unwrap();
        refused("model.safetensors.d");
        std::fs::remove_dir(path.join("model.safetensors.d")).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(replaceable(&link).unwrap_err().contains("no directory"));
        std::os::unix::fs::symlink("/etc/hosts", path.join("vocab.json")).unwrap();
        refused("vocab.json");
    }
}
