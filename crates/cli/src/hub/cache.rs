//! The cache on disk, in the layout that Python's huggingface_hub uses, so that a model which one has downloaded is there for the
//! other (`huggingface_hub/file_download.py`; its docs, "Understand caching").
//!
//! `models--ORG--NAME/blobs/HASH` holds content, `snapshots/COMMIT/FILE` are links to it, `refs/BRANCH` names commits. Where a disk has
//! no symbolic links the snapshot has the files themselves, where it has no locks every process writes a file of its own, and where it
//! cannot be written what is there is used.

use std::path::{Path, PathBuf};

use fs_err as fs;
use mlx_format::checkpoint::{Lock, try_lock};
use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;

use super::environment::is_set;
use super::id::{Address, is_commit};
use super::kind::Kind;

/// The cache of one repository.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
}

/// Where a blob grows. Without a lock the file has a name that no other process writes to; when this is dropped before the blob is
/// whole, the next process may go on with it.
pub(super) struct Growing {
    pub(super) path: PathBuf,
    left: Option<PathBuf>,
}

impl Drop for Growing {
    fn drop(&mut self) {
        if let Some(left) = &self.left {
            // It is not there any more once it is whole.
            let _ = std::fs::rename(&self.path, left);
        }
    }
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

    fn locks(&self) -> PathBuf {
        self.root.join(".locks").join(&self.folder)
    }

    /// The commit that a branch or tag was at when it was last looked at.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.directory().join("refs").join(revision)).ok()?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    /// Notes where a branch is; a cache that cannot be written stays as it is.
    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> std::io::Result<()> {
        let place = self.directory().join("refs").join(revision);
        if self.commit_of(revision).as_deref() == Some(commit) || !is_writable(&place) {
            return Ok(());
        }
        write_whole(&place, commit.as_bytes())
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.directory().join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(hash)
    }

    /// Where a blob is being downloaded to by whoever has the lock.
    pub(super) fn incomplete(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(format!("{hash}.incomplete"))
    }

    /// What a process without a lock leaves of a blob.
    fn left(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(format!("{hash}.unlocked.incomplete"))
    }

    /// Bytes of a blob with which a download can go on.
    pub(super) fn begun(&self, hash: &str) -> u64 {
        length(&self.incomplete(hash)).max(length(&self.left(hash)))
    }

    /// Where a blob may be downloaded to.
    pub(super) fn growing(&self, hash: &str, lock: Lock) -> Growing {
        if lock != Lock::Unknown {
            return Growing { path: self.incomplete(hash), left: None };
        }
        let left = self.left(hash);
        let path = left.with_file_name(format!("{hash}.{:016x}.incomplete", unique()));
        // Only one process can take it away from there.
        let _ = std::fs::rename(&left, &path);
        Growing { path, left: Some(left) }
    }

    /// A file of a snapshot, if it is there with that size.
    pub(super) fn file(&self, commit: &str, path: &str, size: u64) -> Option<PathBuf> {
        let file = self.snapshot(commit).join(path);
        std::fs::metadata(&file).is_ok_and(|found| found.is_file() && found.len() == size).then_some(file)
    }

    /// Makes a snapshot's file from a blob: a relative link, as huggingface_hub does. Without links it is the blob itself if that is `new`, so
    /// that a model is on the disk once. False where it has to be copied, because it may belong to other snapshots as well.
    pub(super) fn link(&self, commit: &str, path: &str, hash: &str, new: bool) -> std::io::Result<bool> {
        let pointer = self.snapshot(commit).join(path);
        if let Some(parent) = pointer.parent() {
            fs::create_dir_all(parent)?;
        }
        let up = "../".repeat(2 + path.split('/').count() - 1);
        let linked = symlink(Path::new(&format!("{up}blobs/{hash}")), &pointer);
        Ok(linked || (new && std::fs::rename(self.blob(hash), &pointer).is_ok()))
    }

    /// Makes a snapshot's file by copying a blob.
    pub(super) fn copy(&self, commit: &str, path: &str, hash: &str) -> std::io::Result<()> {
        copy(&self.blob(hash), &self.snapshot(commit).join(path), &self.blob(hash))
    }

    /// The first directory that would have to be written to for files of a snapshot to come, and cannot be.
    pub(super) fn unwritable(&self, commit: &str) -> Option<PathBuf> {
        let places =
            [self.directory().join("blobs/x"), self.snapshot(commit).join("x"), self.locks().join("x")];
        places.into_iter().find(|place| !is_writable(place)).map(|place| existing(&place))
    }

    /// Keeps other processes, huggingface_hub's included, from downloading the same blob for as long as the file is open.
    pub(super) fn lock(&self, hash: &str) -> std::io::Result<(fs::File, Lock)> {
        let path = self.locks().join(format!("{hash}.lock"));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        let lock = try_lock(file.file())?;
        Ok((file, lock))
    }
}

/// Puts a link in the place of whatever is at `link`; false where there are to be none, or can be none.
fn symlink(target: &Path, link: &Path) -> bool {
    if is_set("HF_HUB_DISABLE_SYMLINKS") {
        return false;
    }
    let next = beside(link);
    if std::os::unix::fs::symlink(target, &next).is_err() {
        // exFAT, SMB, and whatever else: if nothing can be written here at all, a copy fails as well and says why.
        return false;
    }
    let done = std::fs::rename(&next, link).is_ok();
    if !done {
        let _ = std::fs::remove_file(next);
    }
    done
}

/// Puts a link to `target`, or a copy of it, in the place of whatever is at `link`.
pub(super) fn link_or_copy(target: &Path, link: &Path) -> std::io::Result<()> {
    if symlink(target, link) { Ok(()) } else { copy(target, link, link) }
}

/// Puts a copy in the place of whatever is at `to`. It is made under a name like that of `like`, on the same disk.
fn copy(from: &Path, to: &Path, like: &Path) -> std::io::Result<()> {
    let next = beside(like);
    let done = fs::copy(from, &next).and_then(|_| fs::rename(&next, to));
    if done.is_err() {
        let _ = std::fs::remove_file(next);
    }
    done
}

/// A hidden name in the same directory that nobody else has.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Long names have no room for more.
    let start: String = name.chars().take(40).collect();
    path.with_file_name(format!(".{start}.{:016x}.new", unique()))
}

/// The size of the file behind a path, 0 if there is none.
pub(super) fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len())
}

/// A number that no other process draws, on whatever machine.
fn unique() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// The path itself, or the closest directory above it that is there.
fn existing(path: &Path) -> PathBuf {
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok());
    there.filter(|path| !path.as_os_str().is_empty()).map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// Whether a file can be made at a path, as far as that shows without making it.
fn is_writable(path: &Path) -> bool {
    let above = path.parent().map_or_else(|| PathBuf::from("."), existing);
    let access = Access::WRITE_OK | Access::EXEC_OK;
    match rustix::fs::accessat(CWD, &above, access, AtFlags::EACCESS) {
        // What is no refusal shows when it is tried.
        Err(Errno::ACCESS | Errno::ROFS | Errno::PERM) => false,
        _ => true,
    }
}

/// Writes a small file at once.
fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let next = beside(path);
    fs::write(&next, content)?;
    fs::rename(next, path)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use super::*;

    fn cache(root: &Path) -> Cache {
        let address = Address::parse(Path::new("a/b"), false).unwrap().unwrap();
        let cache = Cache::new(root, Kind::Model, &address);
        std::fs::create_dir_all(cache.directory().join("blobs")).unwrap();
        cache
    }

    /// Without locks two writers never have the same file, and what one of them leaves only one other takes.
    #[test]
    fn without_locks_every_writer_has_a_file_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        let (one, two) = (cache.growing("hash", Lock::Unknown), cache.growing("hash", Lock::Unknown));
        assert_ne!(one.path, two.path);
        std::fs::write(&one.path, b"part").unwrap();
        drop(one);
        let (three, four) = (cache.growing("hash", Lock::Unknown), cache.growing("hash", Lock::Unknown));
        assert_eq!(std::fs::read(&three.path).unwrap(), b"part");
        assert!(!two.path.exists() && !four.path.exists());
        std::fs::rename(&three.path, cache.blob("hash")).unwrap();
        drop((two, three, four));
        let left: Vec<_> = std::fs::read_dir(cache.directory().join("blobs")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    /// A link or a copy replaces whatever stands in its place, and leaves nothing beside it.
    #[test]
    fn links_and_copies_replace_what_is_there() {
        let root = tempfile::tempdir().unwrap();
        let (target, link) = (root.path().join("target"), root.path().join("link"));
        std::fs::write(&target, b"content").unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        copy(&target, &link, &link).unwrap();
        assert!(!link.is_symlink());
        assert_eq!(std::fs::read(&link).unwrap(), b"content");
        link_or_copy(&target, &link).unwrap();
        assert_eq!(std::fs::read(&link).unwrap(), b"content");
        assert!(copy(&root.path().join("missing"), &link, &link).is_err());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
    }
}
