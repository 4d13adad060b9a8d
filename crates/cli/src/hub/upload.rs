//! A model to the hub: the files that differ, in one commit at the end, so that nobody ever sees half of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hf_hub::HFError;
use hf_hub::progress::{Progress, ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::{CommitInfo, CommitOperation, RepoTypeModel};
use mlx_quant::{Event, Observer};

use super::explain::{Problem, Trouble, pause};
use super::fetch::is_same;
use super::{Address, Hub, Kind, RemoteFile, Repository, Snapshot, length, sleep};

/// What is to be uploaded, and where to.
pub(crate) struct Upload<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) address: &'a Address,
    /// Whether a repository that is created is private.
    pub(crate) private: bool,
    pub(crate) message: &'a str,
}

/// What an upload did.
pub(crate) struct Uploaded {
    pub(crate) url: String,
    /// Nothing if everything was there already.
    pub(crate) commit: Option<String>,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    /// Files that were there already.
    pub(crate) kept: usize,
}

/// A commit that is to be made.
struct Sending<'a> {
    /// On which it is made.
    snapshot: &'a Snapshot,
    files: &'a [(String, PathBuf)],
    operations: Vec<CommitOperation>,
    bytes: u64,
    message: &'a str,
}

/// How far an upload is; written by the hub's library, read by ours.
#[derive(Clone, Copy, Default, PartialEq)]
struct State {
    done: u64,
    committing: bool,
}

struct Handler(Arc<Mutex<State>>);

impl ProgressHandler for Handler {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Upload(event) = event else { return };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            UploadEvent::Progress { bytes_completed, .. } => state.done = *bytes_completed,
            UploadEvent::Committing => state.committing = true,
            UploadEvent::Start { .. } | UploadEvent::Complete => {}
        }
    }
}

impl Hub {
    /// Refuses what cannot be uploaded, as far as that shows before any work: without a token that the hub knows nothing can.
    pub(crate) fn check_upload(&self, address: &Address, observer: &dyn Observer) -> Result<(), Trouble> {
        if self.offline {
            return Err(Trouble::Refused("HF_HUB_OFFLINE is set; hint: unset it to upload".to_owned()));
        }
        if self.speaker.secret.is_none() {
            return Err(Trouble::Refused(
                "uploading needs a token with write access; hint: log in with `hf auth login`, or set HF_TOKEN"
                    .to_owned(),
            ));
        }
        self.ask(address, observer, || self.wait(self.client.whoami().send())).map(|_| ())
    }

    /// Creates the repository, unless it is there: a token may be allowed to write it, but not to create any.
    fn create(&self, upload: &Upload<'_>, observer: &dyn Observer) -> Result<(), Trouble> {
        let (address, id) = (upload.address, upload.address.id());
        let repository = Repository::new(&self.client, Kind::Model, address);
        if self.ask(address, observer, || self.wait(repository.commit_of("main"))).is_ok() {
            return Ok(());
        }
        self.ask(address, observer, || {
            self.wait(async {
                let create = self.client.create_repository().repo_id(&id).repo_type(RepoTypeModel);
                create.private(upload.private).exist_ok(true).send().await
            })
        })
        .map(|_| ())
    }

    /// Creates the repository where it is not there, and commits all files that it does not have.
    pub(crate) fn upload(&self, upload: &Upload<'_>, observer: &dyn Observer) -> Result<Uploaded, Trouble> {
        let address = upload.address;
        let id = address.id();
        self.create(upload, observer)?;
        self.check_xet(address, observer)?;
        let (snapshot, _) = self.find(Kind::Model, address, observer)?;
        let there = self.list(&snapshot, observer)?;
        let files = local_files(upload.directory).map_err(|error| self.speaker.local(&error))?;
        let (mut operations, mut bytes, mut kept) = (Vec::new(), 0, 0);
        for (name, path) in &files {
            let known = there.iter().find(|file| file.path == *name);
            if self.has(&snapshot, known, path, observer)? {
                kept += 1;
            } else {
                operations.push(CommitOperation::add_file(name.clone(), path.clone()));
                bytes += length(path);
            }
        }
        // Shards of a model that was there before would be read as part of this one.
        let stale = |file: &&RemoteFile| {
            let weights = file.path.starts_with("model") && file.path.ends_with(".safetensors");
            let index = file.path == "model.safetensors.index.json";
            (weights || index) && !files.iter().any(|(name, _)| *name == file.path)
        };
        operations.extend(there.iter().filter(stale).map(|file| CommitOperation::delete(file.path.clone())));
        let url = format!("{}/{id}", self.speaker.endpoint);
        if operations.is_empty() {
            return Ok(Uploaded { url, commit: None, files: 0, bytes: 0, kept });
        }
        let count = files.len() - kept;
        observer.event(Event::Started { total: bytes, resumed: 0 });
        let sending =
            Sending { snapshot: &snapshot, files: &files, operations, bytes, message: upload.message };
        let commit = Some(self.commit_all(&sending, observer)?);
        Ok(Uploaded { url, commit, files: count, bytes, kept })
    }

    /// Whether the hub has this very file.
    fn has(
        &self,
        snapshot: &Snapshot,
        known: Option<&RemoteFile>,
        path: &Path,
        observer: &dyn Observer,
    ) -> Result<bool, Trouble> {
        let Some(known) = known.filter(|known| known.size == length(path)) else { return Ok(false) };
        let hash = self.hash(snapshot, known, observer)?;
        is_same(path, known.size, &hash).map_err(|error| self.speaker.local(&error))
    }

    /// Refuses a hub that takes large files in another way than the one that hf-hub knows: it would send them as text in the commit.
    fn check_xet(&self, address: &Address, observer: &dyn Observer) -> Result<(), Trouble> {
        let answer = self.ask(address, observer, || {
            let parts = ["api", "models", &address.owner, &address.name, "xet-write-token", "main"];
            Ok(self.ask_once(self.direct.get(self.url(parts)?))?.status())
        })?;
        match answer.as_u16() {
            404 => Err(Trouble::Refused(format!(
                "{} does not take large files by xet, and this program knows no other way; hint: upload with `hf upload`",
                self.speaker.endpoint
            ))),
            403 => Err(Trouble::Refused(format!(
                "{} does not let this token write to {}; hint: use a token with write access",
                self.speaker.endpoint,
                address.id()
            ))),
            _ => Ok(()),
        }
    }

    /// Sends contents, then the commit, and gives its name. Contents that reached the hub before an interruption are recognised there, and
    /// so is a commit whose answer was lost.
    fn commit_all(&self, sending: &Sending<'_>, observer: &dyn Observer) -> Result<String, Trouble> {
        let address = &sending.snapshot.address;
        let mut tries = 0;
        loop {
            let error = match self.send(sending, observer)? {
                Ok(info) => {
                    let (after, there) = self.arrived(sending, observer)?;
                    return if there {
                        Ok(info.commit_oid.unwrap_or(after))
                    } else {
                        Err(Trouble::Failed(format!(
                            "{} was committed, but not all files are there; hint: repeat the command",
                            address.id()
                        )))
                    };
                }
                Err(error) => error,
            };
            // Xet tries by itself.
            let by_itself = matches!(error, HFError::Xet { .. });
            let why = format!("once more, because: {}", self.speaker.scrub(&error.to_string()));
            let problem = Problem::Hub(error);
            let wait = pause(&problem, tries).filter(|_| !by_itself);
            let Some(wait) = wait else { return Err(self.speaker.explain(&problem, address)) };
            observer.event(Event::Note { text: &why });
            tries += 1;
            sleep(wait, observer)?;
            if let (after, true) = self.arrived(sending, observer)? {
                return Ok(after);
            }
        }
    }

    /// One try; the outer error is for what no other try can help.
    fn send(
        &self,
        sending: &Sending<'_>,
        observer: &dyn Observer,
    ) -> Result<Result<CommitInfo, HFError>, Trouble> {
        // Contents are read and hashed before the first of them is sent.
        let silence = (self.patience * 30).max(Duration::from_secs(sending.bytes / 100_000_000));
        let state = Arc::new(Mutex::new(State::default()));
        let progress = Progress::new(Handler(Arc::clone(&state)));
        let (repository, operations) = (sending.snapshot.repository.clone(), sending.operations.clone());
        let (message, parent) = (sending.message.to_owned(), sending.snapshot.commit.clone());
        let commit = async move { repository.commit(operations, message, parent, progress).await };
        let task = self.runtime.spawn(commit);
        let (mut before, mut since) = (State::default(), Instant::now());
        while !task.is_finished() {
            let now = *state.lock().unwrap_or_else(PoisonError::into_inner);
            if now != before {
                (before, since) = (now, Instant::now());
            }
            if observer.cancelled() {
                task.abort();
                return Err(Trouble::Interrupted);
            }
            if since.elapsed() > silence {
                task.abort();
                return Ok(Err(HFError::Other(format!("nothing moved for {} s", silence.as_secs()))));
            }
            observer.event(Event::Progress { done: now.done });
            if now.committing {
                observer.event(Event::Working { name: "committing" });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(self.runtime.block_on(task).unwrap_or_else(|error| Err(HFError::Other(error.to_string()))))
    }

    /// The newest commit, and whether everything is in it.
    fn arrived(&self, sending: &Sending<'_>, observer: &dyn Observer) -> Result<(String, bool), Trouble> {
        let (after, _) = self.find(Kind::Model, &sending.snapshot.address, observer)?;
        if after.commit == sending.snapshot.commit {
            return Ok((after.commit, false));
        }
        let there = self.list(&after, observer)?;
        let is_there = |(name, path): &(String, PathBuf)| {
            there.iter().any(|file| file.path == *name && file.size == length(path))
        };
        Ok((after.commit, sending.files.iter().all(is_there)))
    }
}

/// Plain files of a directory, hidden ones left out, sorted.
fn local_files(directory: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs_err::read_dir(directory)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
            && entry.path().is_file()
        {
            files.push((name, entry.path()));
        }
    }
    files.sort();
    Ok(files)
}
