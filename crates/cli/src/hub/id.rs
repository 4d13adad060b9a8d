//! Addresses of repositories as people type them.

use std::path::Path;

/// Longest id that the hub gives.
const MAX_LENGTH: usize = 96;

/// A repository on the hub, the revision that is wanted of it, and for data a file or folder in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) owner: String,
    pub(crate) name: String,
    pub(crate) revision: Option<String>,
    pub(crate) path: Option<String>,
}

impl Address {
    /// Reads `ORG/NAME` or `ORG/NAME@REVISION`, for data also `ORG/NAME/PATH`. Nothing if it can only be meant as a path on this
    /// machine; an error says what is wrong with what can only be meant as an id.
    pub(crate) fn parse(text: &Path, data: bool) -> Option<Result<Self, String>> {
        let text = text.to_str()?;
        if text.starts_with(['.', '/', '~']) || text.contains('\\') {
            return None;
        }
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let mut parts = id.trim_end_matches('/').splitn(3, '/');
        let (owner, name, path) = (parts.next()?, parts.next()?, parts.next());
        if path.is_some() && !data {
            return None;
        }
        let checked = || {
            check_name(owner)?;
            check_name(name)?;
            if owner.len() + 1 + name.len() > MAX_LENGTH {
                return Err(format!("it is longer than {MAX_LENGTH} characters"));
            }
            revision.map_or(Ok(()), check_revision)?;
            path.map_or(Ok(()), check_path)
        };
        Some(checked().map(|()| Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
            revision: revision.map(str::to_owned),
            path: path.map(str::to_owned),
        }))
    }

    /// `ORG/NAME`.
    pub(crate) fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The wanted revision, or the main branch.
    pub(crate) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// One half of an id, by the hub's rules (`huggingface_hub/utils/_validators.py`, `validate_repo_id`).
fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() {
        return Err("one half of it is empty".to_owned());
    }
    if let Some(odd) = name.chars().find(|c| !allowed(*c)) {
        return Err(format!("{name:?} holds {odd:?}"));
    }
    if let Some(run) = ["..", "--"].into_iter().find(|run| name.contains(run)) {
        return Err(format!("{name:?} holds {run:?}"));
    }
    if name.starts_with(['-', '.']) || name.ends_with(['-', '.']) || name.ends_with(".git") {
        return Err(format!("{name:?} begins or ends as no name does"));
    }
    Ok(())
}

/// A branch, tag or commit; it also names a file in the cache.
pub(crate) fn check_revision(revision: &str) -> Result<(), String> {
    let odd =
        |c: char| c.is_control() || c.is_whitespace() || matches!(c, '\\' | '?' | '#' | ':' | '~' | '^');
    let plain = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && !part.contains("..");
    if revision.chars().any(odd) || !revision.split('/').all(plain) {
        return Err(format!("{revision:?} is no branch, tag or commit"));
    }
    Ok(())
}

/// A file's path in a repository, which must not lead out of it.
pub(super) fn check_path(path: &str) -> Result<(), String> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    if path.contains(['\\', '\0', ':']) || !path.split('/').all(plain) {
        return Err(format!("{path:?} is no path in a repository"));
    }
    Ok(())
}

/// Whether a revision is a commit already.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// SHA-1 or SHA-256 in hexadecimal.
pub(super) fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Result<Address, String>> {
        Address::parse(Path::new(text), false)
    }

    #[test]
    fn ids_and_paths_are_told_apart() {
        for path in ["./a/b", "/a/b", "../a", "~/a/b", "model", "a/", "a/b/c", "a\\b/c"] {
            assert_eq!(parse(path), None, "{path}");
        }
        let address = parse("meta-llama/Llama-3.2-3B@refs/pr/1").unwrap().unwrap();
        assert_eq!((address.id().as_str(), address.revision()), ("meta-llama/Llama-3.2-3B", "refs/pr/1"));
        assert_eq!(parse("Qwen/Qwen3-8B/").unwrap().unwrap().revision(), "main");
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        let long = format!("a/{}", "b".repeat(100));
        for id in [
            "a/..",
            "a/b c",
            "a/.b",
            "a/b..c",
            "a/b--c",
            "a/b?x",
            "a/b%2f",
            "a/-b",
            "a/b.git",
            &long,
            "a/b@../x",
            "a/b@",
            "a/b@x y",
            "a/b@.x",
            "a/b@x/../y",
        ] {
            let parsed = parse(id);
            assert!(matches!(parsed, Some(Err(_))), "{id}: {parsed:?}");
        }
    }

    #[test]
    fn data_may_name_a_file() {
        let data = |text: &str| Address::parse(Path::new(text), true).unwrap();
        assert_eq!(data("a/b/c/d.jsonl").unwrap().path.as_deref(), Some("c/d.jsonl"));
        assert!(data("a/b/../d.jsonl").is_err());
    }
}
