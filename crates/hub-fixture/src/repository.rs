//! What the hub holds: repositories, their revisions, and the files in them.
//!
//! A revision is a whole set of files, as in git, and a commit makes the next one from the last. Everything is
//! in memory and deterministic: the same calls give the same commit names, so that a test can compare two runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;

use crate::encoding::{git_blob, sha1, sha256};

/// The date of everything.
pub(crate) const DATE: &str = "2025-01-01T00:00:00.000Z";

/// The branch that a repository starts with.
pub(crate) const MAIN: &str = "main";

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Served at `/ID`.
    Model,
    /// Served at `/datasets/ID`.
    Dataset,
}

impl Kind {
    /// Its name in the API's paths.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What comes before the id in the paths of files.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// One commit of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its name, 40 hexadecimal digits.
    pub sha: String,
    /// The first line of its message.
    pub title: String,
    /// The files that it wrote or deleted.
    pub paths: Vec<String>,
}

/// One file's content.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) bytes: Bytes,
    pub(crate) sha256: String,
    /// What git calls it: the content's name, or that of the pointer to it.
    pub(crate) git: String,
    /// The text that stands in git for a large file; `None` for a file that is in git itself.
    pub(crate) pointer: Option<String>,
    /// The name of the content in the xet store, where it is there.
    pub(crate) xet: Option<String>,
}

impl Blob {
    pub(crate) fn plain(bytes: Bytes) -> Self {
        Self { sha256: sha256(&bytes), git: git_blob(&bytes), pointer: None, xet: None, bytes }
    }

    pub(crate) fn large(bytes: Bytes, xet: Option<String>) -> Self {
        let sha256 = sha256(&bytes);
        let size = bytes.len();
        let pointer =
            format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
        Self { git: git_blob(pointer.as_bytes()), sha256, pointer: Some(pointer), xet, bytes }
    }

    /// The name by which clients cache it.
    pub(crate) fn etag(&self) -> &str {
        if self.pointer.is_some() { &self.sha256 } else { &self.git }
    }
}

/// Whether the hub keeps a file outside of git.
pub(crate) fn is_large(path: &str, size: u64) -> bool {
    let named = [".safetensors", ".parquet", ".bin"].iter().any(|suffix| path.ends_with(suffix));
    size > 0 && (named || size > 1_000_000)
}

pub(crate) type Files = BTreeMap<String, Arc<Blob>>;

pub(crate) struct Snapshot {
    pub(crate) commit: Commit,
    pub(crate) files: Files,
}

pub(crate) struct Repository {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) private: bool,
    pub(crate) gated: bool,
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) branches: BTreeMap<String, String>,
}

impl Repository {
    fn new(kind: Kind, id: &str) -> Self {
        Self {
            kind,
            id: id.to_owned(),
            private: false,
            gated: false,
            snapshots: Vec::new(),
            branches: BTreeMap::new(),
        }
    }

    /// The snapshot that a branch or a commit's name means.
    pub(crate) fn snapshot(&self, revision: &str) -> Option<&Snapshot> {
        let revision = revision.strip_prefix("refs/heads/").unwrap_or(revision);
        let sha = self.branches.get(revision).map_or(revision, String::as_str);
        self.snapshots.iter().find(|snapshot| snapshot.commit.sha == sha)
    }

    /// Puts a commit onto a branch and gives its name.
    pub(crate) fn commit(&mut self, branch: &str, title: &str, paths: Vec<String>, files: Files) -> String {
        let mut text = format!(
            "{} {}\nparent {}\n{title}\n",
            self.kind.plural(),
            self.id,
            self.branches.get(branch).map_or("none", String::as_str)
        );
        for (path, blob) in &files {
            let _ = writeln!(text, "{} {path}", blob.git);
        }
        let sha = sha1(text.as_bytes());
        let commit = Commit { sha: sha.clone(), title: title.to_owned(), paths };
        self.snapshots.push(Snapshot { commit, files });
        self.branches.insert(branch.to_owned(), sha.clone());
        sha
    }

    /// Puts a commit onto the main branch that holds exactly these files.
    pub(crate) fn replace(&mut self, title: &str, files: Files) -> String {
        let mut paths: Vec<String> = files.keys().cloned().collect();
        if let Some(last) = self.snapshot(MAIN) {
            paths.extend(last.files.keys().filter(|path| !files.contains_key(*path)).cloned());
        }
        self.commit(MAIN, title, paths, files)
    }
}

/// Where an id leads.
pub(crate) enum Place<'a> {
    Here(&'a mut Repository),
    Moved(String),
    Nowhere,
}

/// Everything that the hub holds.
#[derive(Default)]
pub(crate) struct Store {
    repositories: BTreeMap<(Kind, String), Repository>,
    renames: BTreeMap<String, String>,
    /// The one valid token.
    pub(crate) token: Option<String>,
    /// Contents that came in by the basic LFS transfer, by their SHA-256.
    pub(crate) uploads: BTreeMap<String, Bytes>,
    /// The size of a listing's pages, and the form of their links.
    pub(crate) pages: Option<(usize, String)>,
    /// Whether the hub hides that it has a xet store.
    pub(crate) without_xet: bool,
}

impl Store {
    /// The repository of this id, made if there is none.
    pub(crate) fn make(&mut self, kind: Kind, id: &str) -> &mut Repository {
        self.renames.remove(id);
        self.repositories.entry((kind, id.to_owned())).or_insert_with(|| Repository::new(kind, id))
    }

    pub(crate) fn place(&mut self, kind: Kind, id: &str) -> Place<'_> {
        if let Some(new) = self.renames.get(id) {
            return Place::Moved(new.clone());
        }
        let key = (kind, id.to_owned());
        if !self.repositories.contains_key(&key) {
            let other =
                self.repositories.keys().find(|(k, name)| *k == kind && name.eq_ignore_ascii_case(id));
            return other.map_or(Place::Nowhere, |(_, name)| Place::Moved(name.clone()));
        }
        self.repositories.get_mut(&key).map_or(Place::Nowhere, Place::Here)
    }

    /// The repository that a test means: `datasets/ID` is a dataset, and an id alone a model or else a dataset.
    pub(crate) fn named(&mut self, id: &str) -> Option<&mut Repository> {
        let keys = match id.strip_prefix("datasets/") {
            Some(id) => vec![(Kind::Dataset, id.to_owned())],
            None => vec![(Kind::Model, id.to_owned()), (Kind::Dataset, id.to_owned())],
        };
        let key = keys.into_iter().find(|key| self.repositories.contains_key(key))?;
        self.repositories.get_mut(&key)
    }

    pub(crate) fn rename(&mut self, old: &str, new: &str) {
        for kind in [Kind::Model, Kind::Dataset] {
            if let Some(mut repository) = self.repositories.remove(&(kind, old.to_owned())) {
                new.clone_into(&mut repository.id);
                self.repositories.insert((kind, new.to_owned()), repository);
            }
        }
        self.renames.remove(new);
        for target in self.renames.values_mut().filter(|target| *target == old) {
            new.clone_into(target);
        }
        self.renames.insert(old.to_owned(), new.to_owned());
    }

    /// A large file that the hub has, by its SHA-256.
    pub(crate) fn large(&self, sha256: &str) -> Option<Arc<Blob>> {
        self.repositories
            .values()
            .flat_map(|repository| &repository.snapshots)
            .flat_map(|snapshot| snapshot.files.values())
            .find(|blob| blob.pointer.is_some() && blob.sha256 == sha256)
            .cloned()
    }
}
