//! One file from the hub: resumed where it broke, its size and hash checked before it gets its name.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use fs_err as fs;
use futures_util::StreamExt as _;
use mlx_format::checkpoint::Lock;
use mlx_quant::data::hexadecimal;
use mlx_quant::{Event, Observer};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::explain::{Problem, Trouble, pause};
use super::{Hub, RemoteFile, Snapshot, length, sleep};

/// Files that are fetched at the same time.
const WORKERS: usize = 8;

/// The hash by which the hub knows a file.
enum Hasher {
    Sha256(Sha256),
    /// Git's, of a header and the content.
    Git(Sha1),
}

impl Hasher {
    fn new(wanted: &Wanted<'_>) -> Self {
        if wanted.hash.len() == 64 {
            return Self::Sha256(Sha256::new());
        }
        let mut hash = Sha1::new();
        hash.update(format!("blob {}\0", wanted.size));
        Self::Git(hash)
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
        }
    }

    fn read(&mut self, file: &mut fs::File, mut bytes: u64) -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        while bytes > 0 {
            let part = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact(&mut buffer[..part])?;
            self.update(&buffer[..part]);
            bytes -= part as u64;
        }
        Ok(())
    }

    fn is(self, hash: &str) -> bool {
        let own = match self {
            Self::Sha256(own) => hexadecimal(&own.finalize()),
            Self::Git(own) => hexadecimal(&own.finalize()),
        };
        own.eq_ignore_ascii_case(hash)
    }
}

/// A file that is to come, and how it is known that it has.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    path: &'a str,
    size: u64,
    hash: &'a str,
}

/// Whether a local file has that size and hash.
pub(super) fn is_same(path: &Path, size: u64, hash: &str) -> std::io::Result<bool> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Hasher::new(&Wanted { path: "", size, hash });
    hasher.read(&mut file, size)?;
    Ok(hasher.is(hash))
}

/// Bytes that have come, of all files under way.
pub(super) struct Tally<'a> {
    observer: &'a dyn Observer,
    done: AtomicU64,
    stop: AtomicBool,
}

impl<'a> Tally<'a> {
    /// Counts from what was here before.
    pub(super) fn new(observer: &'a dyn Observer, before: u64) -> Self {
        Self { observer, done: AtomicU64::new(before), stop: AtomicBool::new(false) }
    }

    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.observer.event(Event::Progress { done });
    }

    fn forget(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Observer for Tally<'_> {
    fn event(&self, event: Event<'_>) {
        self.observer.event(event);
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.observer.cancelled()
    }
}

/// A file that is being written, and the hash of what is in it.
struct Growing {
    file: fs::File,
    have: u64,
    hasher: Hasher,
}

impl Growing {
    /// Opens what an earlier run left, or begins.
    fn open(path: &Path, remote: &Wanted<'_>) -> std::io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut hasher = Hasher::new(remote);
        let mut have = file.metadata()?.len();
        if have > remote.size {
            file.set_len(0)?;
            have = 0;
        }
        hasher.read(&mut file, have)?;
        Ok(Self { file, have, hasher })
    }

    fn begin_again(&mut self, remote: &Wanted<'_>) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.have = 0;
        self.hasher = Hasher::new(remote);
        Ok(())
    }

    fn push(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }
}

/// How one answer ended.
enum Ended {
    /// The file is as long as it should be.
    Complete,
    /// The answer was whole and too short.
    Short,
    /// More came than belongs to the file: what was asked for was not heeded.
    Long,
    Hub(Problem),
    Local(std::io::Error),
    Interrupted,
}

impl Hub {
    /// Downloads a file into `growing`, and gives it its name `to` once it is whole and has the right hash.
    pub(super) fn fetch(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        hash: &str,
        (growing, to): (&Path, &Path),
        tally: &Tally<'_>,
    ) -> Result<(), Trouble> {
        let remote = &Wanted { path: &file.path, size: file.size, hash };
        let local = |error: std::io::Error| self.speaker.local(&error);
        let name = format!("{}/{}", snapshot.address.id(), remote.path);
        // Once more from the beginning, if what came is not the file.
        for last in [false, true] {
            let mut file = Growing::open(growing, remote).map_err(local)?;
            self.fill(snapshot, remote, &mut file, tally)?;
            file.file.sync_data().map_err(local)?;
            if file.hasher.is(remote.hash) {
                return fs::rename(growing, to).map_err(local);
            }
            tally.forget(file.have);
            fs::remove_file(growing).map_err(local)?;
            if last {
                break;
            }
            tally.event(Event::Note { text: &format!("{name}: the hash is wrong, once more") });
        }
        Err(Trouble::Failed(format!(
            "{name}: what came is not the file that the hub lists (its hash differs), twice; hint: try again later, or tell the repository's owner"
        )))
    }

    /// Brings a file to its full length.
    fn fill(
        &self,
        snapshot: &Snapshot,
        remote: &Wanted<'_>,
        file: &mut Growing,
        tally: &Tally<'_>,
    ) -> Result<(), Trouble> {
        let local = |error: std::io::Error| self.speaker.local(&error);
        let (mut tries, mut odd, mut ranges, mut most) = (0, 0, true, file.have);
        while file.have < remote.size {
            if file.have > 0 && !ranges {
                tally.forget(file.have);
                file.begin_again(remote).map_err(local)?;
            }
            let ranged = file.have > 0;
            let ended = self.receive(snapshot, remote, file, tally);
            if file.have > most {
                (tries, most) = (0, file.have);
            }
            let error = match ended {
                Ended::Complete => return Ok(()),
                Ended::Interrupted => return Err(Trouble::Interrupted),
                Ended::Local(error) => return Err(local(error)),
                Ended::Short | Ended::Long => None,
                Ended::Hub(error) => Some(error),
            };
            let unheeded = error.as_ref().and_then(Problem::status) == Some(416);
            if error.is_none() || unheeded {
                // The part that is here may belong to something else, or parts are not to be had.
                odd += 1;
                ranges &= !ranged;
                if odd > 3 {
                    return Err(Trouble::Failed(format!(
                        "{}/{}: the hub lists {} bytes and sends another number; hint: try again later, or tell the repository's owner",
                        snapshot.address.id(),
                        remote.path,
                        remote.size
                    )));
                }
                continue;
            }
            let error = error.unwrap_or_else(|| Problem::other("the answer ended too early"));
            let Some(wait) = pause(&error, tries) else {
                return Err(self.speaker.explain(&error, &snapshot.address));
            };
            tries += 1;
            sleep(wait, tally)?;
        }
        Ok(())
    }

    /// One request for the rest of a file.
    fn receive(
        &self,
        snapshot: &Snapshot,
        remote: &Wanted<'_>,
        file: &mut Growing,
        tally: &Tally<'_>,
    ) -> Ended {
        let rest = (file.have > 0).then_some(file.have..remote.size);
        let answer = self.wait(snapshot.repository.stream(&snapshot.commit, remote.path, rest));
        let mut stream = match answer {
            Ok(stream) => stream,
            Err(error) => return Ended::Hub(error),
        };
        loop {
            if tally.cancelled() {
                return Ended::Interrupted;
            }
            let chunk = match self.wait(async { stream.next().await.transpose() }) {
                Ok(Some(chunk)) => chunk,
                Ok(None) if file.have == remote.size => return Ended::Complete,
                Ok(None) => return Ended::Short,
                Err(error) => return Ended::Hub(error),
            };
            if file.have + chunk.len() as u64 > remote.size {
                return Ended::Long;
            }
            if let Err(error) = file.push(&chunk) {
                return Ended::Local(error);
            }
            tally.add(chunk.len() as u64);
        }
    }

    /// Brings files into the cache, several at a time, and gives their paths in the snapshot.
    pub(super) fn fetch_all(
        &self,
        snapshot: &Snapshot,
        files: &[RemoteFile],
        observer: &dyn Observer,
    ) -> Result<Vec<PathBuf>, Trouble> {
        let cache = &snapshot.cache;
        let missing = |file: &&RemoteFile| cache.file(&snapshot.commit, &file.path, file.size).is_none();
        let mut missing: Vec<&RemoteFile> = files.iter().filter(missing).collect();
        if let (Some(first), Some(place)) = (missing.first(), cache.unwritable(&snapshot.commit)) {
            return Err(Trouble::Refused(format!(
                "{} lacks {} of {} ({} file(s) in all) and cannot be written; hint: set HF_HOME or HF_HUB_CACHE to a directory that can",
                place.display(),
                first.path,
                snapshot.address.id(),
                missing.len()
            )));
        }
        // The longest first, so that they do not come last alone.
        missing.sort_by_key(|file| std::cmp::Reverse(file.size));
        let hashes: Vec<OnceLock<String>> = missing.iter().map(|_| OnceLock::new()).collect();
        let places: Vec<usize> = (0..missing.len()).collect();
        let tally = Tally::new(observer, 0);
        each(&places, &tally, |at| {
            let hash = self.hash(snapshot, missing[*at], &tally)?;
            let _ = hashes[*at].set(hash);
            Ok(())
        })?;
        let coming: Vec<(&RemoteFile, &str)> = missing
            .iter()
            .zip(&hashes)
            .filter_map(|(file, hash)| Some((*file, hash.get()?.as_str())))
            .collect();
        let (mut total, mut resumed) = (0, 0);
        for (file, hash) in coming.iter().filter(|(file, hash)| !is_whole(&cache.blob(hash), file.size)) {
            total = file.size.saturating_add(total);
            resumed += cache.begun(hash).min(file.size);
        }
        check_room(cache.root(), total.saturating_sub(resumed))?;
        if total > 0 {
            observer.event(Event::Started { total, resumed });
        }
        let tally = Tally::new(observer, resumed);
        each(&coming, &tally, |(file, hash)| {
            tally.event(Event::Working { name: &file.path });
            self.fetch_into(snapshot, file, hash, &tally)
        })?;
        Ok(files.iter().map(|file| cache.snapshot(&snapshot.commit).join(&file.path)).collect())
    }

    /// Brings one file into the cache.
    fn fetch_into(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        hash: &str,
        tally: &Tally<'_>,
    ) -> Result<(), Trouble> {
        let cache = &snapshot.cache;
        let local = |error: std::io::Error| self.speaker.local(&error);
        let mut waited = false;
        let (_open, lock) = loop {
            match cache.lock(hash).map_err(local)? {
                (file, lock @ (Lock::Held | Lock::Unknown)) => break (file, lock),
                (_, Lock::Busy) if waited => {}
                (_, Lock::Busy) => {
                    let text = format!("another process is downloading {}; waiting for it", file.path);
                    tally.event(Event::Note { text: &text });
                    waited = true;
                }
            }
            sleep(Duration::from_millis(200), tally)?;
        };
        if lock == Lock::Unknown && !self.told.swap(true, Ordering::Relaxed) {
            self.printer.warn(&format!(
                "{} is on a disk that knows no locks; a second process would download the same once more",
                cache.root().display()
            ));
        }
        let here = || cache.file(&snapshot.commit, &file.path, file.size).is_some();
        if here() {
            return Ok(());
        }
        let blob = cache.blob(hash);
        let new = !is_whole(&blob, file.size);
        if new {
            let growing = cache.growing(hash, lock);
            self.fetch(snapshot, file, hash, (&growing.path, &blob), tally)?;
        }
        if cache.link(&snapshot.commit, &file.path, hash, new).map_err(local)? {
            return Ok(());
        }
        check_room(cache.root(), file.size)?;
        match cache.copy(&snapshot.commit, &file.path, hash) {
            // Another process without a lock took the blob for the same file.
            Err(error) if !here() => Err(local(error)),
            _ => Ok(()),
        }
    }

    /// Leaves out README.md where the cache lacks it and cannot be written: mlx_lm and transformers do not fetch it, and only the card
    /// tells of it.
    pub(super) fn spare_card(&self, snapshot: &Snapshot, files: &mut Vec<RemoteFile>) {
        let cache = &snapshot.cache;
        let spared = |file: &RemoteFile| {
            file.path == "README.md" && cache.file(&snapshot.commit, &file.path, file.size).is_none()
        };
        if files.iter().any(spared)
            && let Some(place) = cache.unwritable(&snapshot.commit)
        {
            let place = place.display();
            self.printer.warn(&format!(
                "{place} lacks README.md and cannot be written: licence and language are not known"
            ));
            files.retain(|file| !spared(file));
        }
    }
}

/// Refuses what does not fit on the disk, before any of it is fetched.
pub(super) fn check_room(place: &Path, needed: u64) -> Result<(), Trouble> {
    let mut existing = place;
    while !existing.exists() {
        let Some(parent) = existing.parent() else { return Ok(()) };
        existing = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    }
    let Ok(found) = rustix::fs::statvfs(existing) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if needed <= free {
        return Ok(());
    }
    let bytes = mlx_quant::numbers::bytes;
    Err(Trouble::Refused(format!(
        "{} are to be downloaded and {} has room for {}; hint: make room, set HF_HOME to a larger disk, or use `convert --stream`",
        bytes(needed),
        existing.display(),
        bytes(free)
    )))
}

fn is_whole(path: &Path, size: u64) -> bool {
    path.is_file() && length(path) == size
}

/// Does something for each of `items`, several at a time; the first failure in their order counts, and stops the rest.
pub(super) fn each<T: Sync>(
    items: &[T],
    tally: &Tally<'_>,
    work: impl Fn(&T) -> Result<(), Trouble> + Sync,
) -> Result<(), Trouble> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Vec<(usize, Trouble)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= items.len() || tally.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(trouble) = work(&items[at]) {
                        tally.stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push((at, trouble));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Those that only stopped because another failed say nothing.
    let asked = tally.observer.cancelled();
    failed.retain(|(_, trouble)| asked || !matches!(trouble, Trouble::Interrupted));
    failed.sort_by_key(|(at, _)| *at);
    failed.into_iter().next().map_or(Ok(()), |(_, trouble)| Err(trouble))
}
