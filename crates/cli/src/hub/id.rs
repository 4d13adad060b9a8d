//! Addresses of repositories as people type them: ids, and the addresses of pages that a browser shows.

use std::path::Path;

use super::environment;

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
    /// Reads `ORG/NAME` or `ORG/NAME@REVISION`, for data also `ORG/NAME/PATH`, or the URL of a page of the repository. Nothing if it
    /// can only be meant as a path on this machine; an error says what is wrong with what can only be meant as an id.
    pub(crate) fn parse(text: &Path, data: bool) -> Option<Result<Self, String>> {
        let text = text.to_str()?;
        if let Some(page) = Page::of(text) {
            return Some(page.and_then(|page| page.address(data)));
        }
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
        Some(Self::checked(owner, name, revision.map(str::to_owned), path.map(str::to_owned)))
    }

    fn checked(
        owner: &str,
        name: &str,
        revision: Option<String>,
        path: Option<String>,
    ) -> Result<Self, String> {
        check_name(owner)?;
        check_name(name)?;
        if owner.len() + 1 + name.len() > MAX_LENGTH {
            return Err(format!("it is longer than {MAX_LENGTH} characters"));
        }
        revision.as_deref().map_or(Ok(()), check_revision)?;
        path.as_deref().map_or(Ok(()), check_path)?;
        Ok(Self { owner: owner.to_owned(), name: name.to_owned(), revision, path })
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

/// Hosts of the hub's pages.
const HOSTS: [&str; 4] = ["huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co"];

/// What stands first in the path of pages that are no repository of a model.
const OTHER_PAGES: [&str; 7] = ["spaces", "docs", "blog", "papers", "collections", "api", "models"];

/// A page of the hub: what follows the host in its URL.
struct Page<'t>(&'t str);

impl<'t> Page<'t> {
    /// Nothing if the text is no URL; an error if it leads elsewhere.
    fn of(text: &'t str) -> Option<Result<Self, String>> {
        if let Some(rest) =
            environment::endpoint().and_then(|endpoint| text.strip_prefix(&endpoint)?.strip_prefix('/'))
        {
            return Some(Ok(Self(rest)));
        }
        let lower = text.to_ascii_lowercase();
        let scheme = ["https://", "http://"].into_iter().find(|scheme| lower.starts_with(scheme));
        let rest = &text[scheme.map_or(0, str::len)..];
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        if HOSTS.iter().any(|known| host.eq_ignore_ascii_case(known)) {
            return Some(Ok(Self(path)));
        }
        scheme.map(|_| Err(format!("{host} is not the hub (HF_ENDPOINT sets another one)")))
    }

    /// The repository, with the revision that the page shows; for data also the file or folder.
    fn address(&self, data: bool) -> Result<Address, String> {
        let path = self.0.split(['?', '#']).next().unwrap_or_default();
        let mut parts: Vec<String> =
            path.split('/').filter(|part| !part.is_empty()).map(|part| part.replace("%2F", "/")).collect();
        let first = parts.first().map(String::as_str).unwrap_or_default();
        match (first, data) {
            ("datasets", true) => drop(parts.remove(0)),
            ("datasets", false) => return Err("it is the page of a dataset, not of a model".to_owned()),
            (other, _) if OTHER_PAGES.contains(&other) => {
                return Err("it is not the page of a repository".to_owned());
            }
            (_, true) => return Err("it is not the page of a dataset".to_owned()),
            (_, false) => {}
        }
        let [owner, name, rest @ ..] = parts.as_slice() else {
            return Err("it names no repository of the form ORG/NAME".to_owned());
        };
        let (revision, path) = match rest {
            [view, revision, path @ ..]
                if ["tree", "blob", "resolve", "raw", "commit", "commits"].contains(&view.as_str()) =>
            {
                (Some(revision.clone()), Some(path.join("/")))
            }
            _ => (None, None),
        };
        let path = path.filter(|path| data && !path.is_empty());
        Address::checked(owner, name, revision, path)
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

    /// As they are copied from a browser.
    #[test]
    fn pages_are_addresses() {
        let page = |text: &str| {
            let address = parse(text).unwrap().unwrap();
            (address.id(), address.revision)
        };
        for text in [
            "https://huggingface.co/Qwen/Qwen3-8B",
            "https://huggingface.co/Qwen/Qwen3-8B/",
            "http://www.huggingface.co/Qwen/Qwen3-8B?library=mlx#files",
            "HTTPS://hf.co/Qwen/Qwen3-8B",
            "hf.co/Qwen/Qwen3-8B",
            "huggingface.co/Qwen/Qwen3-8B/discussions/4",
        ] {
            assert_eq!(page(text), ("Qwen/Qwen3-8B".to_owned(), None), "{text}");
        }
        for (text, revision) in [
            ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "main"),
            ("https://huggingface.co/Qwen/Qwen3-8B/tree/refs%2Fpr%2F1", "refs/pr/1"),
            ("https://huggingface.co/Qwen/Qwen3-8B/blob/v1.0/config.json", "v1.0"),
            ("hf.co/Qwen/Qwen3-8B/resolve/main/model.safetensors?download=true", "main"),
        ] {
            assert_eq!(page(text), ("Qwen/Qwen3-8B".to_owned(), Some(revision.to_owned())), "{text}");
        }
        let data = |text: &str| Address::parse(Path::new(text), true).unwrap();
        let found = data("https://huggingface.co/datasets/allenai/c4/tree/main/en").unwrap();
        assert_eq!((found.id().as_str(), found.path.as_deref()), ("allenai/c4", Some("en")));
        assert_eq!(data("hf.co/datasets/allenai/c4").unwrap().path, None);
        assert!(data("https://huggingface.co/Qwen/Qwen3-8B").is_err());
        for text in [
            "https://huggingface.co",
            "https://huggingface.co/gpt2",
            "https://huggingface.co/datasets/allenai/c4",
            "https://huggingface.co/spaces/a/b",
            "https://huggingface.co/a/../b",
            "https://huggingface.co/a/b/tree/..%2Fc",
            "https://example.com/Qwen/Qwen3-8B",
            "https://huggingface.co.example.com/Qwen/Qwen3-8B",
        ] {
            assert!(matches!(parse(text), Some(Err(_))), "{text}");
        }
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
