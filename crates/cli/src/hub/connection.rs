//! A connection to the hub, and the commit that a revision is at.

use std::future::Future;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hf_hub::HFClient;
use mlx_quant::Observer;

use super::cache::Cache;
use super::client;
use super::environment::{cache_directory, is_offline, token};
use super::explain::{Problem, Speaker, Trouble, pause};
use super::id::{self, Address};
use super::kind::Kind;
use super::repository::Repository;
use crate::interrupt::Interrupt;
use crate::printer::Printer;
use crate::refusal::Refusal;

/// A connection to the hub, as the environment describes it: HF_ENDPOINT, HF_TOKEN and the token file, HF_HOME, HF_HUB_CACHE,
/// HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT.
pub(crate) struct Hub {
    pub(super) client: HFClient,
    /// For what hf-hub does not tell.
    pub(super) direct: reqwest::Client,
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) speaker: Speaker,
    pub(super) offline: bool,
    /// Whether it was said that the cache knows no locks.
    pub(super) told: AtomicBool,
    /// Longest silence of a connection.
    pub(super) patience: Duration,
    pub(super) printer: Printer,
    pub(super) interrupt: Interrupt,
}

/// A repository at a commit.
pub(crate) struct Snapshot {
    pub(crate) address: Address,
    pub(crate) commit: String,
    pub(super) kind: Kind,
    pub(super) repository: Repository,
    pub(super) cache: Cache,
}

impl Hub {
    /// Reads the environment; nothing is sent yet.
    pub(crate) fn open(printer: Printer) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let secret = token();
        let user_agent = concat!("mlx-quant/", env!("CARGO_PKG_VERSION"));
        let following = client::following_client(user_agent)?;
        let mut builder = HFClient::builder().user_agent(user_agent).client(following).retry_max_attempts(0);
        if let Some(token) = &secret {
            builder = builder.token(token.clone());
        }
        if let Some(cache) = cache_directory() {
            builder = builder.cache_dir(cache);
        }
        let client = builder.build().map_err(|error| {
            let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
            Refusal(format!("HF_ENDPOINT {endpoint:?} is no address ({error}); hint: unset it"))
        })?;
        let speaker = Speaker { endpoint: shown(client.endpoint()), secret };
        let seconds = std::env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().and_then(|text| text.parse().ok());
        let patience = Duration::from_secs(seconds.filter(|seconds| *seconds > 0).unwrap_or(10));
        let direct = client::client(user_agent)?;
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
    pub(super) fn wait<T, E: Into<Problem>>(
        &self,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Problem> {
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
    pub(super) fn ask<T>(
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
    pub(super) fn find(
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
    pub(super) fn note(&self, snapshot: &Snapshot) -> Result<(), Trouble> {
        let revision = snapshot.address.revision();
        if id::is_commit(revision) {
            return Ok(());
        }
        snapshot.cache.note_commit(revision, &snapshot.commit).map_err(|error| self.speaker.local(&error))
    }
}

/// Waits, as long as nobody wants to stop.
pub(super) fn sleep(wait: Duration, observer: &dyn Observer) -> Result<(), Trouble> {
    let end = Instant::now() + wait;
    while Instant::now() < end {
        if observer.cancelled() {
            return Err(Trouble::Interrupted);
        }
        std::thread::sleep(Duration::from_millis(100).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// An address without what may be secret in it.
pub(super) fn shown(endpoint: &str) -> String {
    let Ok(mut url) = reqwest::Url::parse(endpoint) else { return endpoint.to_owned() };
    if url.username().is_empty() && url.password().is_none() {
        return endpoint.to_owned();
    }
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.to_string()
}
