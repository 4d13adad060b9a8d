//! What the environment says of the hub, as huggingface_hub reads it.

use std::path::{Path, PathBuf};

pub(super) fn is_set(name: &str) -> bool {
    std::env::var(name)
        .is_ok_and(|value| matches!(value.to_lowercase().as_str(), "1" | "on" | "yes" | "true"))
}

pub(super) fn is_offline() -> bool {
    is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE")
}

/// The hub that is asked instead of huggingface.co, without a slash behind it.
pub(super) fn endpoint() -> Option<String> {
    let endpoint = std::env::var("HF_ENDPOINT").ok()?;
    Some(endpoint.trim_end_matches('/').to_owned()).filter(|endpoint| !endpoint.is_empty())
}

/// A path from the environment, `~` expanded as huggingface_hub does.
fn path_of(name: &str) -> Option<PathBuf> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    let home = text.strip_prefix("~/").zip(std::env::var_os("HOME"));
    Some(home.map_or_else(|| PathBuf::from(&text), |(rest, home)| Path::new(&home).join(rest)))
}

/// Where huggingface_hub keeps its things (`huggingface_hub/constants.py`).
fn home() -> Option<PathBuf> {
    path_of("HF_HOME")
        .or_else(|| path_of("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
        .or_else(|| path_of("HOME").map(|home| home.join(".cache/huggingface")))
}

pub(super) fn cache_directory() -> Option<PathBuf> {
    path_of("HF_HUB_CACHE")
        .or_else(|| path_of("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| home().map(|home| home.join("hub")))
}

/// The token, as huggingface_hub finds it (`huggingface_hub/utils/_auth.py`): HF_TOKEN, or the file that `hf auth login` writes.
/// hf-hub is kept from looking for itself (`main.rs`), so that none is sent that is not known here.
pub(super) fn token() -> Option<String> {
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let tidy = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
    let named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
    named.into_iter().find_map(|name| std::env::var(name).ok().and_then(tidy)).or_else(|| {
        let file = path_of("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")))?;
        std::fs::read_to_string(file).ok().and_then(tidy)
    })
}
