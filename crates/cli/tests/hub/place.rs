//! A hub, and a user's directories beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use mlx_quant_hub_fixture::{Hub, Kind, Request, Server};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) use crate::common::TOKEN;
use crate::common::{knows, mlx_quant};

/// The id of the model of most tests.
pub(crate) const ID: &str = "some-org/Tiny-0.1B";

/// A hub, and a user's directories beside it.
pub(crate) struct Place {
    pub(crate) hub: Hub,
    directory: TempDir,
}

impl Place {
    /// A hub that accepts [`TOKEN`], and holds nothing.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["home", "work"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let hub = crate::common::hub();
        // Large files then come from the CDN, whose faults are what most tests are about.
        hub.offer_xet(false);
        Self { hub, directory }
    }

    /// The same with a small model at [`ID`].
    pub(crate) fn with_model() -> Self {
        let place = Self::new();
        place.hub.add(Kind::Model, ID, files(&fixture("llama_tied")));
        place
    }

    /// A path in the directory in which commands run.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join("work").join(name)
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// HF_HOME.
    pub(crate) fn hf_home(&self) -> PathBuf {
        self.home().join("huggingface")
    }

    /// The cache of a repository.
    pub(crate) fn cache(&self, kind: &str, id: &str) -> PathBuf {
        self.hf_home().join("hub").join(format!("{kind}--{}", id.replace('/', "--")))
    }

    /// The path of the only snapshot of a model in the cache.
    pub(crate) fn snapshot(&self, id: &str) -> PathBuf {
        let snapshots = self.cache("models", id).join("snapshots");
        let mut found: Vec<_> =
            std::fs::read_dir(snapshots).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    /// A command that knows this hub.
    pub(crate) fn command(&self, line: &str) -> assert_cmd::Command {
        let mut command = mlx_quant();
        knows(&mut command, &self.hub, &self.home()).current_dir(self.at(""));
        // Xet waits for seconds between its tries, and writes down what was sent every twenty.
        command.env("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms").env("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2");
        command.env("HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_MAX_COUNT", "1");
        command.args(line.split_whitespace());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, line: &str) -> Output {
        finish(&mut self.command(line))
    }

    /// Runs what must succeed, and gives what it says to people.
    pub(crate) fn succeed(&self, line: &str) -> String {
        let output = self.run(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}\n{said}");
        said
    }

    /// Runs what must fail with that code, a hint, and all those words.
    pub(crate) fn fail(&self, line: &str, code: i32, words: &[&str]) {
        failed(line, &self.run(line), code, words);
    }

    /// Starts a command, to be killed.
    pub(crate) fn start(&self, line: &str) -> Child {
        self.start_with(line, &[])
    }

    /// The same with more in its environment.
    pub(crate) fn start_with(&self, line: &str, environment: &[(&str, &str)]) -> Child {
        let mut given = self.command(line);
        given.envs(environment.iter().copied());
        let mut command = std::process::Command::new(given.get_program());
        command.args(given.get_args()).current_dir(self.at(""));
        for (name, value) in given.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Requests for contents: of files at the hub, and at the CDN.
    pub(crate) fn downloads(&self) -> Vec<Request> {
        let contents = |request: &Request| {
            request.method == "GET" && (request.server == Server::Cdn || request.path.contains("/resolve/"))
        };
        self.hub.requests().into_iter().filter(contents).collect()
    }

    /// Requests to the CDN, which serves weights.
    pub(crate) fn weights(&self) -> Vec<Request> {
        let mut requests = self.hub.requests();
        requests.retain(|request| request.server == Server::Cdn && request.method == "GET");
        requests
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let stray = |request: &Request| {
            let brought = request.token || request.path.contains(TOKEN);
            (brought && request.server != Server::Hub)
                || (request.authorization && request.server == Server::Elsewhere)
        };
        let strays: Vec<Request> = self.hub.requests().into_iter().filter(stray).collect();
        assert!(strays.is_empty(), "the token went elsewhere than to the hub: {strays:?}");
        let mut left = vec![self.directory.path().to_owned()];
        while let Some(path) = left.pop() {
            if path.is_dir() && !path.is_symlink() {
                left.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else if path.is_file() && path != self.hf_home().join("token") {
                assert!(!holds_token(&std::fs::read(&path).unwrap()), "the token is in {}", path.display());
            }
        }
    }
}

fn holds_token(bytes: &[u8]) -> bool {
    bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes())
}

/// Runs a command to its end, and looks that it does not show the token.
pub(crate) fn finish(command: &mut assert_cmd::Command) -> Output {
    let output = command.output().unwrap();
    assert!(!holds_token(&output.stdout) && !holds_token(&output.stderr), "the token was shown");
    output
}

pub(crate) fn failed(line: &str, output: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}\n{said}");
    assert!(said.contains("hint:") || code == 130, "{line} gives no hint\n{said}");
    for word in words {
        assert!(said.contains(word), "{line} does not say {word:?}\n{said}");
    }
}

/// A small checkpoint of the library's tests.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo").join(name)
}

/// The files of a directory that a model repository would have.
pub(crate) fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.starts_with("convert_") && !name.starts_with("oracle") {
            files.push((name, std::fs::read(path).unwrap()));
        }
    }
    files.sort();
    files
}

/// All files of an output, by name.
pub(crate) fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap()))
        .collect()
}

/// Two outputs hold the same, but for the card, which names the source.
pub(crate) fn assert_same(one: &Path, other: &Path) {
    let without_card = |directory: &Path| {
        let mut files = contents(directory);
        files.remove("README.md");
        files
    };
    let (one, other) = (without_card(one), without_card(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(other[name] == *bytes, "{name} differs");
    }
}

/// A checkpoint's tensors, in the order of their names, spread over so many shards.
pub(crate) fn sharded(directory: &Path, count: usize) -> Vec<(String, Vec<u8>)> {
    let mut tensors: BTreeMap<String, (Value, Vec<u8>)> = BTreeMap::new();
    let (mut others, mut weights) = (Vec::new(), Vec::new());
    for (name, bytes) in files(directory) {
        if name.ends_with(".safetensors") { weights.push(bytes) } else { others.push((name, bytes)) }
    }
    for bytes in weights {
        let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let offset = |at: usize| usize::try_from(entry["data_offsets"][at].as_u64().unwrap()).unwrap();
            let data = bytes[8 + length + offset(0)..8 + length + offset(1)].to_vec();
            tensors.insert(name, (entry, data));
        }
    }
    let per_shard = tensors.len().div_ceil(count);
    let mut map = serde_json::Map::new();
    let mut shards: Vec<(serde_json::Map<String, Value>, Vec<u8>)> = Vec::new();
    for (at, (name, (mut entry, bytes))) in tensors.into_iter().enumerate() {
        if at % per_shard == 0 {
            shards.push(Default::default());
        }
        let number = shards.len();
        let (header, data) = shards.last_mut().unwrap();
        entry["data_offsets"] = serde_json::json!([data.len(), data.len() + bytes.len()]);
        data.extend(bytes);
        map.insert(name.clone(), Value::String(format!("model-{number:05}-of-{count:05}.safetensors")));
        header.insert(name, entry);
    }
    assert_eq!(shards.len(), count);
    others.retain(|(name, _)| name != "model.safetensors.index.json");
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    others.push(("model.safetensors.index.json".to_owned(), index.to_string().into_bytes()));
    for (at, (header, data)) in shards.into_iter().enumerate() {
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        others.push((format!("model-{:05}-of-{count:05}.safetensors", at + 1), bytes));
    }
    others
}
