//! A model to the hub: the files that differ, in one commit at the end, so that nobody ever sees half of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hf_hub::HFError;
use hf_hub::progress::{Progress, ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::{CommitInfo, CommitOperation, RepoTypeModel};
use mlx_quant::{Event, Observer};

use super::explain::{Trouble, pause};
use super::fetch::is_same;
use super::{Address, Hub, Kind, RemoteFile, Snapshot, length, sleep};

/// What is to be uploaded, and where to.
pub(crate) struct Upload<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) address: &'a Address,
    /// Whether a repository that is created is private.
    pub(crate) private: bool,
    pub(crate) message: String,
    /// README.md, where it is not to be the directory's.
    pub(crate) card: Option<String>,
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

/// How far an upload is; written by the hub's library, read by ours.
#[derive(Clone, Copy, Default)]
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
    /// Refuses what cannot be uploaded, before any work.
    pub(crate) fn check_upload(&self) -> Result<(), Trouble> {
        if self.offline {
            return Err(Trouble::Refused("HF_HUB_OFFLINE is set; hint: unset it to upload".to_owned()));
        }
        if self.speaker.secret.is_none() {
            return Err(Trouble::Refused(
                "uploading needs a token with write access; hint: log in with `hf auth login`, or set HF_TOKEN".to_owned(),
            ));
        }
        Ok(())
    }

    /// Creates the repository where it is not there, and commits all files that it does not have.
    pub(crate) fn upload(&self, upload: &Upload<'_>, observer: &dyn Observer) -> Result<Uploaded, Trouble> {
        self.check_upload()?;
        let address = upload.address;
        let id = address.id();
        self.ask(address, observer, || {
            self.wait(async {
                let create = self.client.create_repository().repo_id(&id).repo_type(RepoTypeModel);
                create.private(upload.private).exist_ok(true).send().await
            })
        })?;
        let (snapshot, _) = self.find(Kind::Model, address, observer)?;
        let there = self.list(&snapshot, observer)?;
        let files = local_files(upload.directory).map_err(|error| self.speaker.local(&error))?;
        let (mut operations, mut bytes, mut kept) = (Vec::new(), 0, 0);
        for (name, path) in &files {
            let own_card = upload.card.as_ref().filter(|_| name == "README.md");
            let known = there.iter().find(|file| file.path == *name);
            if let Some(card) = own_card {
                operations.push(CommitOperation::add_bytes(name.clone(), card.clone().into_bytes()));
                bytes += card.len() as u64;
            } else if self.has(&snapshot, known, path, observer)? {
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
        let info = self.commit_all(&snapshot, &operations, upload, observer)?;
        let (after, _) = self.find(Kind::Model, address, observer)?;
        self.check_there(&after, &files, upload, observer)?;
        let commit = info.commit_oid.or(Some(after.commit));
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

    /// Sends contents, then the commit. Contents that reached the hub before an interruption are recognised there.
    fn commit_all(
        &self,
        snapshot: &Snapshot,
        operations: &[CommitOperation],
        upload: &Upload<'_>,
        observer: &dyn Observer,
    ) -> Result<CommitInfo, Trouble> {
        let mut tries = 0;
        loop {
            let state = Arc::new(Mutex::new(State::default()));
            let progress = Progress::new(Handler(Arc::clone(&state)));
            let (repository, operations) = (snapshot.repository.clone(), operations.to_vec());
            let message = upload.message.clone();
            let task =
                self.runtime.spawn(async move { repository.commit(operations, message, progress).await });
            while !task.is_finished() {
                if observer.cancelled() {
                    task.abort();
                    return Err(Trouble::Interrupted);
                }
                let now = *state.lock().unwrap_or_else(PoisonError::into_inner);
                observer.event(Event::Progress { done: now.done });
                if now.committing {
                    observer.event(Event::Working { name: "committing" });
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let error = match self.runtime.block_on(task) {
                Ok(Ok(info)) => return Ok(info),
                Ok(Err(error)) => error,
                Err(error) => HFError::Other(error.to_string()),
            };
            let Some(wait) = pause(&error, tries) else {
                return Err(self.speaker.explain(&error, &snapshot.address));
            };
            let why = format!("once more, because: {}", self.speaker.scrub(&error.to_string()));
            observer.event(Event::Note { text: &why });
            tries += 1;
            sleep(wait, observer)?;
        }
    }

    /// Looks whether everything arrived.
    fn check_there(
        &self,
        after: &Snapshot,
        files: &[(String, PathBuf)],
        upload: &Upload<'_>,
        observer: &dyn Observer,
    ) -> Result<(), Trouble> {
        let there = self.list(after, observer)?;
        for (name, path) in files {
            let own_card = upload.card.as_ref().filter(|_| name == "README.md");
            let size = own_card.map_or_else(|| length(path), |card| card.len() as u64);
            if !there.iter().any(|file| file.path == *name && file.size == size) {
                return Err(Trouble::Failed(format!(
                    "{} was committed, but {name} is not there with its {size} bytes; hint: repeat the command",
                    upload.address.id()
                )));
            }
        }
        Ok(())
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
