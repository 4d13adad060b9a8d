//! A model's files: which of a repository's are needed, and where they are once they are here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mlx_format::checkpoint::parse_index;
use mlx_quant::Observer;

use super::explain::Trouble;
use super::{Address, Hub, Kind, RemoteFile, Snapshot};

const INDEX: &str = "model.safetensors.index.json";

/// The files of a model repository that a conversion reads.
pub(super) struct Parts {
    /// config.json, tokenizer, templates, the index; Python files as data.
    pub(super) small: Vec<RemoteFile>,
    /// The shards.
    pub(super) weights: Vec<RemoteFile>,
}

/// Whether a file beside the weights is wanted.
fn is_small(name: &str) -> bool {
    matches!(name, "config.json" | INDEX | "README.md") || mlx_quant::is_companion(name)
}

fn is_weights(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

impl Hub {
    /// The directory of a model, all of whose files are brought here first.
    pub(crate) fn model(&self, address: &Address, observer: &dyn Observer) -> Result<PathBuf, Trouble> {
        let (snapshot, online) = self.find(Kind::Model, address, observer)?;
        if !online {
            return cached(&snapshot);
        }
        let parts = self.parts(&snapshot, observer)?;
        self.fetch_all(&snapshot, &parts.weights, observer)?;
        self.note(&snapshot)?;
        Ok(snapshot.cache.snapshot(&snapshot.commit))
    }

    /// Lists a model's files and brings the small ones into the cache.
    pub(super) fn parts(&self, snapshot: &Snapshot, observer: &dyn Observer) -> Result<Parts, Trouble> {
        let mut files = self.list(snapshot, observer)?;
        self.spare_card(snapshot, &mut files);
        let id = snapshot.address.id();
        let (mut small, mut weights) = (Vec::new(), Vec::new());
        let mut others = Vec::new();
        for file in files.into_iter().filter(|file| !file.path.contains('/')) {
            match file.path.as_str() {
                name if is_small(name) => small.push(file),
                name if is_weights(name) => weights.push(file),
                _ => others.push(file.path),
            }
        }
        let has = |name: &str| small.iter().any(|file| file.path == name);
        if !has("config.json") {
            return Err(Trouble::Refused(format!(
                "{id} has no config.json: it is no model in the form of transformers; hint: give the repository of the original model"
            )));
        }
        if weights.is_empty() {
            let unsafe_ones = others
                .iter()
                .find(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth"));
            let why = match (unsafe_ones, others.iter().find(|name| name.ends_with(".gguf"))) {
                (Some(name), _) => format!(", only {name}, and such files can run code when they are read"),
                (None, Some(name)) => format!(", only {name}"),
                (None, None) => String::new(),
            };
            return Err(Trouble::Refused(format!(
                "{id} has no safetensors{why}; hint: look for a conversion on its page (--revision refs/pr/N), or for the original model"
            )));
        }
        self.fetch_all(snapshot, &small, observer)?;
        let directory = snapshot.cache.snapshot(&snapshot.commit);
        if has(INDEX) {
            let path = directory.join(INDEX);
            let index = std::fs::read(&path).map_err(|error| self.speaker.local(&error))?;
            let named = shards_of(&index, &path)?;
            if let Some(shard) = named.iter().find(|shard| !weights.iter().any(|file| file.path == **shard)) {
                return Err(Trouble::Refused(format!(
                    "{id}: its index names {shard}, which it does not have; hint: the repository is incomplete, tell its owner"
                )));
            }
            weights.retain(|file| named.contains(&file.path));
        }
        Ok(Parts { small, weights })
    }
}

/// A model that the cache must hold whole.
fn cached(snapshot: &Snapshot) -> Result<PathBuf, Trouble> {
    let directory = snapshot.cache.snapshot(&snapshot.commit);
    let missing = |what: &str| {
        Trouble::Refused(format!(
            "{} is only partly in the cache ({what} is missing in {}), and the hub is out of reach; hint: connect, unset HF_HUB_OFFLINE, and repeat the command",
            snapshot.address.id(),
            directory.display()
        ))
    };
    if !directory.join("config.json").is_file() {
        return Err(missing("config.json"));
    }
    let shards = match std::fs::read(directory.join(INDEX)) {
        Ok(index) => shards_of(&index, &directory.join(INDEX))?,
        Err(_) => BTreeSet::new(),
    };
    if let Some(shard) = shards.iter().find(|shard| !directory.join(shard).is_file()) {
        return Err(missing(shard));
    }
    let any = || {
        std::fs::read_dir(&directory)
            .ok()?
            .flatten()
            .find(|entry| entry.file_name().to_str().is_some_and(is_weights))
    };
    if shards.is_empty() && any().is_none() {
        return Err(missing("a safetensors file"));
    }
    Ok(directory)
}

/// The files that an index names.
fn shards_of(index: &[u8], path: &Path) -> Result<BTreeSet<String>, Trouble> {
    let index = parse_index(index, &path.display().to_string())
        .map_err(|error| Trouble::Refused(error.to_string()))?;
    Ok(index.into_values().collect())
}
