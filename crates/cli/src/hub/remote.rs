//! Models of which only the headers are here: for plans, and for `convert --stream`, which brings one shard at a time.

use std::path::{Path, PathBuf};

use fs_err as fs;
use futures_util::StreamExt as _;
use mlx_format::checkpoint::{MAX_HEADER_BYTES, make_hollow};
use mlx_quant::{Event, Observer};

use super::cache::link_or_copy;
use super::explain::{Problem, Trouble};
use super::fetch::{Tally, check_room, each};
use super::{Address, Hub, Kind, RemoteFile, Snapshot, length};

/// What is fetched of a shard at first; most headers are shorter.
const FIRST_BYTES: u64 = 256 << 10;

/// A directory with a model's small files and hollow shards.
pub(crate) struct Hollow {
    hub: Hub,
    snapshot: Snapshot,
    /// The directory, made as in a cache, so that the model knows its id.
    pub(crate) directory: PathBuf,
    /// Revision and hashes of the shards.
    pub(crate) identity: String,
    weights: Vec<RemoteFile>,
}

impl Hub {
    /// Brings headers alone into a directory below `root`. Nothing where the whole model is in the cache: use [`Self::model`] then.
    pub(crate) fn hollow(
        self,
        address: &Address,
        root: &Path,
        observer: &dyn Observer,
    ) -> Result<Option<Hollow>, Trouble> {
        let (snapshot, online) = self.find(Kind::Model, address, observer)?;
        if !online {
            return Ok(None);
        }
        let parts = self.parts(&snapshot, observer)?;
        let here = |file: &RemoteFile| snapshot.cache.file(&snapshot.commit, &file.path, file.size).is_some();
        if parts.weights.iter().all(here) {
            return Ok(None);
        }
        let folder = format!("models--{}--{}", address.owner, address.name);
        let directory = root.join(folder).join("snapshots").join(&snapshot.commit);
        let local = |error: std::io::Error| self.speaker.local(&error);
        fs::create_dir_all(&directory).map_err(local)?;
        for file in &parts.small {
            let source = fs::canonicalize(snapshot.cache.snapshot(&snapshot.commit).join(&file.path))
                .map_err(local)?;
            let link = directory.join(&file.path);
            if link.symlink_metadata().is_err() {
                link_or_copy(&source, &link).map_err(local)?;
            }
        }
        let tally = Tally::new(observer, 0);
        each(&parts.weights, &tally, |file| {
            let path = directory.join(&file.path);
            if length(&path) == file.size {
                return Ok(());
            }
            let head = self.head(&snapshot, file, &tally)?;
            let made = path.with_extension("made");
            make_hollow(&made, &head, file.size).and_then(|()| fs::rename(&made, &path)).map_err(local)
        })?;
        let identity = std::iter::once(format!("{} {}", address.id(), snapshot.commit))
            .chain(parts.weights.iter().map(|file| format!("{} {} {}", file.path, file.size, file.id)))
            .collect::<Vec<_>>()
            .join(";");
        Ok(Some(Hollow { hub: self, snapshot, directory, identity, weights: parts.weights }))
    }

    /// The first bytes of a shard: the header's length and the header.
    fn head(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        observer: &dyn Observer,
    ) -> Result<Vec<u8>, Trouble> {
        // Always from the beginning, so that a server that knows no ranges is as good.
        let first = |count: u64| {
            self.ask(&snapshot.address, observer, || {
                let stream = snapshot.repository.stream(&snapshot.commit, &file.path, Some(0..count));
                let (mut stream, mut bytes) = (self.wait(stream)?, Vec::new());
                while (bytes.len() as u64) < count {
                    match self.wait(async { stream.next().await.transpose() })? {
                        Some(chunk) => bytes.extend_from_slice(&chunk),
                        None => {
                            return Err(Problem::other(format!("a part of {} came too short", file.path)));
                        }
                    }
                }
                Ok(bytes)
            })
        };
        let damaged = || {
            Trouble::Refused(format!(
                "{}/{} is no safetensors file: its header does not fit into it; hint: tell the repository's owner",
                snapshot.address.id(),
                file.path
            ))
        };
        if file.size < 8 {
            return Err(damaged());
        }
        let mut head = first(file.size.min(FIRST_BYTES))?;
        let length = head.first_chunk::<8>().map_or(u64::MAX, |length| u64::from_le_bytes(*length));
        let end = length.saturating_add(8);
        if length > MAX_HEADER_BYTES || end > file.size {
            return Err(damaged());
        }
        if end > head.len() as u64 {
            head = first(end)?;
        }
        head.truncate(usize::try_from(end).unwrap_or(usize::MAX));
        Ok(head)
    }
}

impl Hollow {
    /// Puts the whole of a shard in the place of the hollow one.
    pub(crate) fn fetch(&self, shard: &str, observer: &dyn Observer) -> Result<(), Trouble> {
        let file = self.weights.iter().find(|file| file.path == shard);
        let file =
            file.ok_or_else(|| Trouble::Failed(format!("{shard} is not in {}", self.snapshot.address.id())))?;
        let path = self.directory.join(shard);
        let cached = self.snapshot.cache.file(&self.snapshot.commit, shard, file.size);
        if let Some(cached) = cached {
            let local = |error: std::io::Error| self.hub.speaker.local(&error);
            let cached = fs::canonicalize(cached).map_err(local)?;
            return link_or_copy(&cached, &path).map_err(local);
        }
        let growing = self.directory.join(format!("{shard}.incomplete"));
        check_room(&self.directory, file.size.saturating_sub(length(&growing)))?;
        let watcher = Watcher { observer, shard, size: file.size };
        let tally = Tally::new(&watcher, length(&growing).min(file.size));
        let hash = self.hub.hash(&self.snapshot, file, &tally)?;
        self.hub.fetch(&self.snapshot, file, &hash, (&growing, &path), &tally)
    }
}

/// Says how far a shard has come, beside a bar that counts what is converted.
struct Watcher<'a> {
    observer: &'a dyn Observer,
    shard: &'a str,
    size: u64,
}

impl Observer for Watcher<'_> {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Progress { done } => {
                let bytes = mlx_quant::numbers::bytes;
                let text = format!("fetching {}: {} of {}", self.shard, bytes(done), bytes(self.size));
                self.observer.event(Event::Working { name: &text });
            }
            other => self.observer.event(other),
        }
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }
}
