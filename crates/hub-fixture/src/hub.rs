//! The handle by which a test starts a hub, fills it, and looks at what happened.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, process};

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use crate::card::Verdict;
use crate::cas::Cas;
use crate::fault::Fault;
use crate::record::{Request, Server};
use crate::repository::{Blob, Commit, Files, Kind, Repository, is_large};
use crate::server::serve;
use crate::state::{Addresses, RUN, Shared};

/// A running hub, on four free ports of 127.0.0.1; it stops when it is dropped.
///
/// Ids are as on the hub, `ORG/NAME` or `NAME`. Where a method takes an id without a [`Kind`], it means the model
/// of that id, or else the dataset; `datasets/ID` means the dataset.
pub struct Hub {
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
    // Dropping it stops the xet store.
    _stop: oneshot::Sender<()>,
}

impl Hub {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// If there is no free port.
    pub fn start() -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime can be started");
        let (hub, cdn, xet, inner) = (listener(), listener(), listener(), listener());
        let other = listener();
        let addresses = Addresses {
            hub: url(&hub),
            cdn: url(&cdn),
            xet: format!("{}{}", url(&xet), unique()),
            elsewhere: url(&other),
        };
        let (stop, stopped) = oneshot::channel();
        // Within the runtime, because xet's client takes the runtime that it finds.
        let cas = wait(&runtime, async move { Cas::start(inner, stopped) });
        let shared = Arc::new(Shared::new(addresses, cas));
        let servers =
            [(hub, Server::Hub), (cdn, Server::Cdn), (xet, Server::Xet), (other, Server::Elsewhere)];
        for (listener, server) in servers {
            runtime.spawn(serve(listener, server, Arc::clone(&shared)));
        }
        Self { shared, runtime: Some(runtime), _stop: stop }
    }

    /// The hub's address, for `HF_ENDPOINT`.
    pub fn endpoint(&self) -> &str {
        &self.shared.addresses.hub
    }

    /// Makes a commit on `main` that holds exactly these files, and the repository if there is none; gives the
    /// commit's name, which depends on nothing but what was committed.
    ///
    /// # Panics
    ///
    /// If the xet store refuses a file.
    pub fn add(&self, kind: Kind, id: &str, files: Vec<(String, Vec<u8>)>) -> String {
        let files: Files = files
            .into_iter()
            .map(|(path, bytes)| {
                let bytes = Bytes::from(bytes);
                let blob = if is_large(&path, bytes.len() as u64) {
                    let hash = self.store(bytes.clone());
                    Blob::large(bytes, Some(hash))
                } else {
                    Blob::plain(bytes)
                };
                (path, Arc::new(blob))
            })
            .collect();
        self.shared.store().make(kind, id).replace("Add files", files)
    }

    /// [`Hub::add`] with all plain files below a directory; links are followed.
    ///
    /// # Panics
    ///
    /// If a file cannot be read.
    pub fn add_directory(&self, kind: Kind, id: &str, directory: &Path) -> String {
        let mut files = Vec::new();
        collect(directory, "", &mut files);
        self.add(kind, id, files)
    }

    /// Lets a branch, new or not, point to a commit.
    ///
    /// # Panics
    ///
    /// If there is no such repository.
    pub fn branch(&self, id: &str, name: &str, commit: &str) {
        self.with(id, |repository| repository.branches.insert(name.to_owned(), commit.to_owned()));
    }

    /// Gives a repository another id; the old one answers with a redirect.
    pub fn rename(&self, old: &str, new: &str) {
        self.shared.store().rename(old, new);
    }

    /// Gates a repository: what it holds can be seen, but its files are refused, with any token.
    ///
    /// # Panics
    ///
    /// If there is no such repository.
    pub fn gate(&self, id: &str) {
        self.with(id, |repository| repository.gated = true);
    }

    /// Makes a repository private: without the token it does not seem to be there.
    ///
    /// # Panics
    ///
    /// If there is no such repository.
    pub fn hide(&self, id: &str) {
        self.with(id, |repository| repository.private = true);
    }

    /// Sets the one valid token. Without this call every token is wrong.
    pub fn accept(&self, token: &str) {
        self.shared.store().token = Some(token.to_owned());
    }

    /// Whether clients are told of the xet store. They are, at first; without it large files come from the CDN
    /// and are uploaded by the basic transfer.
    pub fn offer_xet(&self, offer: bool) {
        self.shared.store().without_xet = !offer;
    }

    /// The address of a host that is none of the hub's.
    pub fn elsewhere(&self) -> &str {
        &self.shared.addresses.elsewhere
    }

    /// Serves listings in pages of at most so many entries, each with that `Link` header to the next one, where
    /// `{hub}`, `{elsewhere}`, `{path}` and `{query}` stand for the addresses, the path of the request, and the query of
    /// the next page.
    pub fn pages(&self, entries: usize, link: &str) {
        self.shared.store().pages = Some((entries, link.to_owned()));
    }

    /// Judges model cards by a rule, when clients ask and when they commit. Without one all are taken.
    pub fn judge_cards(&self, rule: impl Fn(&str) -> Verdict + Send + 'static) {
        self.shared.cards.set(rule);
    }

    /// Plans a fault for the next `times` requests whose line contains `path_part`. The line is
    /// `hub GET /org/name/resolve/main/file` (or `cdn`, or `xet`), with the path as it comes and its query; the
    /// CDN's queries name the file. Only GET and POST are meant, unless `path_part` names another method, as in
    /// `HEAD /org/name`. Of several plans for one request the first counts.
    pub fn fault(&self, path_part: &str, times: usize, fault: Fault) {
        self.shared.faults.plan(path_part, times, fault);
    }

    /// Forgets all faults that are planned.
    pub fn calm(&self) {
        self.shared.faults.forget();
    }

    /// What was asked so far, in the order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.record.requests()
    }

    /// What a revision holds.
    ///
    /// # Panics
    ///
    /// If there is no such revision.
    pub fn files(&self, id: &str, revision: &str) -> BTreeMap<String, Vec<u8>> {
        self.with(id, |repository| {
            let snapshot = repository.snapshot(revision).expect("the repository has this revision");
            snapshot.files.iter().map(|(path, blob)| (path.clone(), blob.bytes.to_vec())).collect()
        })
    }

    /// A repository's commits, the newest last.
    ///
    /// # Panics
    ///
    /// If there is no such repository.
    pub fn commits(&self, id: &str) -> Vec<Commit> {
        self.with(id, |repository| {
            repository.snapshots.iter().map(|snapshot| snapshot.commit.clone()).collect()
        })
    }

    fn with<T>(&self, id: &str, work: impl FnOnce(&mut Repository) -> T) -> T {
        work(self.shared.store().named(id).expect("the hub has this repository"))
    }

    fn store(&self, bytes: Bytes) -> String {
        let shared = Arc::clone(&self.shared);
        let runtime = self.runtime.as_ref().expect("the hub is running");
        wait(runtime, async move { shared.cas.put(bytes).await }).expect("the xet store takes the file")
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not a wait: a test may drop the hub within a runtime of its own, where waiting panics.
            runtime.shutdown_background();
        }
    }
}

/// The result of a future, for a thread that may itself belong to a runtime.
fn wait<T: Send + 'static>(runtime: &Runtime, work: impl Future<Output = T> + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    runtime.spawn(async move {
        let _ = sender.send(work.await);
    });
    receiver.recv().expect("the work gives a result")
}

fn listener() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.set_nonblocking(true).expect("a listener can be asynchronous");
    listener
}

fn url(listener: &TcpListener) -> String {
    format!("http://{}", listener.local_addr().expect("a bound listener has an address"))
}

/// A path that no other run had.
///
/// Clients remember on disk what a store of some address has, and never send it that again. Ports come back, and
/// the store behind one is new: only another path makes it another address.
fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("/{RUN}{now:x}-{:x}", process::id())
}

fn collect(directory: &Path, prefix: &str, files: &mut Vec<(String, Vec<u8>)>) {
    let mut entries: Vec<_> = fs::read_dir(directory)
        .and_then(Iterator::collect::<Result<_, _>>)
        .unwrap_or_else(|error| panic!("{} can be listed: {error}", directory.display()));
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if path.is_dir() {
            collect(&path, &format!("{name}/"), files);
        } else if path.is_file() {
            let bytes =
                fs::read(&path).unwrap_or_else(|error| panic!("{} can be read: {error}", path.display()));
            files.push((name, bytes));
        }
    }
}
