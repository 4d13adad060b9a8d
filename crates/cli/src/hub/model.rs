//! A model's files: which of a repository's are needed, and where they are once they are here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{INDEX, WeightFiles, parse_index, weight_files};
use mlx_quant::Observer;

use super::explain::Trouble;
use super::{Address, Hub, Kind, RemoteFile, Snapshot};

/// The files of a model repository that a conversion reads.
pub(super) struct Parts {
    /// config.json, tokenizer, templates, the index; Python files as data.
    pub(super) small: Vec<RemoteFile>,
    /// The shards.
    pub(super) weights: Vec<RemoteFile>,
}

/// Whether a file beside the weights is wanted; the last three tell who quantized a model.
fn is_small(name: &str) -> bool {
    const OTHERS: [&str; 6] = [
        "config.json",
        INDEX,
        "README.md",
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
    ];
    OTHERS.contains(&name) || mlx_quant::source::is_companion(name)
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
                name if name.ends_with(".safetensors") => weights.push(file),
                _ => others.push(file.path),
            }
        }
        let has = |name: &str| small.iter().any(|file| file.path == name);
        if !has("config.json") {
            return Err(Trouble::Refused(format!(
                "{id} has no config.json: it is no model in the form of transformers; hint: give the repository of the original model"
            )));
        }
        self.fetch_all(snapshot, &small, observer)?;
        let index = if has(INDEX) {
            let path = snapshot.cache.snapshot(&snapshot.commit).join(INDEX);
            let bytes = std::fs::read(&path).map_err(|error| self.speaker.local(&error))?;
            Some(index_of(&bytes, &path)?)
        } else {
            None
        };
        let names: Vec<String> = weights.iter().map(|file| file.path.clone()).collect();
        let WeightFiles { shards, missing, .. } = weight_files(&names, index.as_ref());
        if shards.is_empty() {
            let unsafe_ones = others
                .iter()
                .find(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth"));
            let why = match (unsafe_ones, others.iter().find(|name| name.ends_with(".gguf"))) {
                (Some(name), _) => format!(", only {name}, and such files can run code when they are read"),
                (None, Some(name)) => format!(", only {name}"),
                (None, None) => names.first().map_or_else(String::new, |name| format!(", only {name}")),
            };
            return Err(Trouble::Refused(format!(
                "{id} has no safetensors of a whole model{why}; hint: look for a conversion on its page (--revision refs/pr/N), or for the original model"
            )));
        }
        if let Some(shard) = missing.first() {
            return Err(Trouble::Refused(format!(
                "{id}: its index names {shard}, which it does not have; hint: the repository is incomplete, tell its owner"
            )));
        }
        weights.retain(|file| shards.contains(&file.path));
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
    let index = match std::fs::read(directory.join(INDEX)) {
        Ok(bytes) => Some(index_of(&bytes, &directory.join(INDEX))?),
        Err(_) => None,
    };
    let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
    let here = entries.filter(|entry| entry.path().is_file());
    let names: Vec<String> = here.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let WeightFiles { shards, missing: absent, .. } = weight_files(&names, index.as_ref());
    if let Some(shard) = absent.first() {
        return Err(missing(shard));
    }
    if shards.is_empty() {
        return Err(missing("a safetensors file"));
    }
    Ok(directory)
}

/// Which file an index names for each tensor.
fn index_of(index: &[u8], path: &Path) -> Result<BTreeMap<String, String>, Trouble> {
    parse_index(index, &path.display().to_string()).map_err(|error| Trouble::Refused(error.to_string()))
}
