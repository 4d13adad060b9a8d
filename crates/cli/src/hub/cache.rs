//! The cache on disk, in the layout that Python's huggingface_hub uses, so that a model which one has downloaded is there for the
//! other (`huggingface_hub/file_download.py`; its docs, "Understand caching").
//!
//! `models--ORG--NAME/blobs/HASH` holds content, `snapshots/COMMIT/FILE` are links to it, `refs/BRANCH` names commits.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::Kind;
use super::id::Address;

/// The cache of one repository.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
}

impl Cache {
    pub(super) fn new(root: &Path, kind: Kind, address: &Address) -> Self {
        let folder = format!("{}--{}--{}", kind.plural(), address.owner, address.name);
        Self { root: root.to_owned(), folder }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn directory(&self) -> PathBuf {
        self.root.join(&self.folder)
    }

    /// The commit that a branch or tag was at when it was last looked at.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.directory().join("refs").join(revision)).ok()?;
        let commit = text.trim();
        super::id::is_commit(commit).then(|| commit.to_owned())
    }

    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> std::io::Result<()> {
        if self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.directory().join("refs").join(revision), commit.as_bytes())
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.directory().join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(hash)
    }

    /// Where a blob is being downloaded to.
    pub(super) fn incomplete(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(format!("{hash}.incomplete"))
    }

    /// A file of a snapshot, if it is there with that size.
    pub(super) fn file(&self, commit: &str, path: &str, size: u64) -> Option<PathBuf> {
        let file = self.snapshot(commit).join(path);
        std::fs::metadata(&file).is_ok_and(|found| found.is_file() && found.len() == size).then_some(file)
    }

    /// Makes a snapshot's file from a blob: a relative link, as huggingface_hub does.
    pub(super) fn link(&self, commit: &str, path: &str, hash: &str) -> std::io::Result<PathBuf> {
        let pointer = self.snapshot(commit).join(path);
        if let Some(parent) = pointer.parent() {
            fs::create_dir_all(parent)?;
        }
        let up = "../".repeat(2 + path.split('/').count() - 1);
        match fs::remove_file(&pointer) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match std::os::unix::fs::symlink(format!("{up}blobs/{hash}"), &pointer) {
            // Another process has made it in the meantime.
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(pointer),
        }
    }

    /// Keeps other processes, huggingface_hub's included, from downloading the same blob until the file is dropped; nothing while one
    /// of them does.
    pub(super) fn lock(&self, hash: &str) -> std::io::Result<Option<fs::File>> {
        let path = self.root.join(".locks").join(&self.folder).join(format!("{hash}.lock"));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.file().try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Writes a small file at once.
fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let next = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&next, content)?;
    fs::rename(next, path)
}
