//! Models and data from the Hugging Face hub, and models to it.
//!
//! hf-hub speaks with the hub: its API, redirects, xet. What it leaves out is here: downloads that resume at the byte where they
//! broke, hashes that are checked, `Retry-After`, the offline switch, and errors that say what to do next. Downloads go into
//! the cache of Python's huggingface_hub. Nothing that is downloaded is ever run; `.bin` and `.pt` files are not even fetched.

mod cache;
mod card;
mod dataset;
mod direct;
mod explain;
mod fetch;
mod hash;
mod id;
mod listing;
mod model;
mod remote;
mod repository;
mod upload;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hf_hub::HFClient;
use mlx_quant::Observer;

use self::cache::Cache;
pub(crate) use self::explain::Trouble;
use self::explain::{Problem, Speaker, pause};
pub(crate) use self::id::{Address, check_revision};
use self::repository::Repository;
pub(crate) use self::upload::Upload;
use crate::interrupt::Interrupt;
use crate::printer::Printer;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A file as the hub lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) path: String,
    pub(crate) size: u64,
    /// What git calls the file, or for a large one the pointer that stands for it.
    pub(crate) id: String,
    /// Whether only a pointer is in git.
    pub(crate) large: bool,
}

/// A connection to the hub, as the environment describes it: HF_ENDPOINT, HF_TOKEN and the token file, HF_HOME, HF_HUB_CACHE,
/// HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT.
pub(crate) struct Hub {
    client: HFClient,
    /// For what hf-hub does not tell.
    direct: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    speaker: Speaker,
    offline: bool,
    /// Whether it was said that the cache knows no locks.
    told: AtomicBool,
    /// Longest silence of a connection.
    patience: Duration,
    printer: Printer,
    interrupt: Interrupt,
}

/// A repository at a commit.
pub(crate) struct Snapshot {
    pub(crate) address: Address,
    pub(crate) commit: String,
    kind: Kind,
    repository: Repository,
    cache: Cache,
}

impl Hub {
    /// Reads the environment; nothing is sent yet.
    pub(crate) fn open(printer: Printer) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let secret = token();
        let user_agent = concat!("mlx-quant/", env!("CARGO_PKG_VERSION"));
        let following = direct::following_client(user_agent)?;
        let mut builder = HFClient::builder().user_agent(user_agent).client(following).retry_max_attempts(0);
        if let Some(token) = &secret {
            builder = builder.token(token.clone());
        }
        if let Some(cache) = cache_directory() {
            builder = builder.cache_dir(cache);
        }
        let client = builder.build().map_err(|error| {
            let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
            crate::Refusal(format!("HF_ENDPOINT {endpoint:?} is no address ({error}); hint: unset it"))
        })?;
        let speaker = Speaker { endpoint: shown(client.endpoint()), secret };
        let seconds = std::env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().and_then(|text| text.parse().ok());
        let patience = Duration::from_secs(seconds.filter(|seconds| *seconds > 0).unwrap_or(10));
        let direct = direct::client(user_agent)?;
        Ok(Self {
            client,
            direct,
            runtime,
            speaker,
            offline: is_offline(),
            told: AtomicBool::new(false),
            patience,
            printer,
            interrupt: Interrupt::listen(),
        })
    }

    /// Runs a future to its end, or for as long as a connection may be silent.
    fn wait<T, E: Into<Problem>>(&self, future: impl Future<Output = Result<T, E>>) -> Result<T, Problem> {
        const LOOK: Duration = Duration::from_millis(200);
        let patience = self.patience;
        self.runtime.block_on(async move {
            let mut future = std::pin::pin!(future);
            let end = Instant::now() + patience;
            loop {
                match tokio::time::timeout(LOOK.min(patience), &mut future).await {
                    Ok(done) => return done.map_err(Into::into),
                    // Whoever asks finds out why.
                    Err(_) if self.interrupt.requested() => {
                        return Err(Problem::other("interrupted"));
                    }
                    Err(_) if Instant::now() >= end => {
                        return Err(Problem::other(format!("nothing came for {} s", patience.as_secs())));
                    }
                    Err(_) => {}
                }
            }
        })
    }

    /// Tries again what may go better the next time, after the time that the hub asks for.
    fn ask<T>(
        &self,
        address: &Address,
        observer: &dyn Observer,
        mut attempt: impl FnMut() -> Result<T, Problem>,
    ) -> Result<T, Trouble> {
        let mut tries = 0;
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(problem) => match pause(&problem, tries) {
                    Some(wait) => sleep(wait, observer)?,
                    None => return Err(self.speaker.explain(&problem, address)),
                },
            }
            tries += 1;
        }
    }

    /// Finds the commit of the wanted revision: from the hub, or offline (and where the hub cannot be reached) from the cache.
    fn find(
        &self,
        kind: Kind,
        address: &Address,
        observer: &dyn Observer,
    ) -> Result<(Snapshot, bool), Trouble> {
        let repository = Repository::new(&self.client, kind, address);
        let cache = Cache::new(self.client.cache_dir(), kind, address);
        let revision = address.revision().to_owned();
        let known =
            if id::is_commit(&revision) { Some(revision.clone()) } else { cache.commit_of(&revision) };
        let snapshot = |commit: String| Snapshot {
            address: address.clone(),
            commit,
            kind,
            repository: repository.clone(),
            cache: cache.clone(),
        };
        if self.offline {
            let commit = known.ok_or_else(|| {
                let place = self.client.cache_dir().display();
                Trouble::Refused(format!(
                    "{} is not in the cache ({place}), and HF_HUB_OFFLINE is set; hint: unset it, or download the model first",
                    address.id()
                ))
            })?;
            return Ok((snapshot(commit), false));
        }
        match self.ask(address, observer, || self.wait(repository.commit_of(&revision))) {
            Ok((commit, id)) => {
                if !id::is_commit(&commit) {
                    return Err(Trouble::Failed(format!(
                        "{} named no commit; hint: is HF_ENDPOINT right?",
                        self.speaker.endpoint
                    )));
                }
                if !id.eq_ignore_ascii_case(&address.id()) {
                    self.printer.warn(&format!("{} is now called {id}", address.id()));
                }
                Ok((snapshot(commit), true))
            }
            Err(Trouble::Unreachable(text)) => match known {
                Some(commit) if cache.snapshot(&commit).is_dir() => Ok((snapshot(commit), false)),
                _ => Err(Trouble::Unreachable(text)),
            },
            Err(trouble) => Err(trouble),
        }
    }

    /// Remembers where a branch is, once its files are in the cache.
    fn note(&self, snapshot: &Snapshot) -> Result<(), Trouble> {
        let revision = snapshot.address.revision();
        if id::is_commit(revision) {
            return Ok(());
        }
        snapshot.cache.note_commit(revision, &snapshot.commit).map_err(|error| self.speaker.local(&error))
    }
}

/// SHA-1 or SHA-256 in hexadecimal.
fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Waits, as long as nobody wants to stop.
fn sleep(wait: Duration, observer: &dyn Observer) -> Result<(), Trouble> {
    let end = Instant::now() + wait;
    while Instant::now() < end {
        if observer.cancelled() {
            return Err(Trouble::Interrupted);
        }
        std::thread::sleep(Duration::from_millis(100).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

fn is_set(name: &str) -> bool {
    std::env::var(name)
        .is_ok_and(|value| matches!(value.to_lowercase().as_str(), "1" | "on" | "yes" | "true"))
}

fn is_offline() -> bool {
    is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE")
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

fn cache_directory() -> Option<PathBuf> {
    path_of("HF_HUB_CACHE")
        .or_else(|| path_of("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| home().map(|home| home.join("hub")))
}

/// The token, as huggingface_hub finds it (`huggingface_hub/utils/_auth.py`): HF_TOKEN, or the file that `hf auth login` writes.
/// hf-hub is kept from looking for itself (`main.rs`), so that none is sent that is not known here.
fn token() -> Option<String> {
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

/// An address without what may be secret in it.
fn shown(endpoint: &str) -> String {
    let Ok(mut url) = reqwest::Url::parse(endpoint) else { return endpoint.to_owned() };
    if url.username().is_empty() && url.password().is_none() {
        return endpoint.to_owned();
    }
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.to_string()
}

/// The size of the file behind a path, 0 if there is none.
fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len())
}
