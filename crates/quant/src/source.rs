//! Opening a model: weights, config, and the small files that go along.

use std::sync::Arc;

use mlx_format::Dtype;
use mlx_format::checkpoint::{Checkpoint, Config, Directory, tidy};
use mlx_quant_model::{Named, SharedNames, SourceError, Tokenizer, Weights, WeightsError};
use sha2::{Digest as _, Sha256};

use crate::Error;
use crate::device::Device;

/// An opened model.
#[derive(Debug)]
pub struct Model {
    /// Weights.
    pub checkpoint: Checkpoint,
    /// config.json, with generation_config.json's `eos_token_id`.
    pub config: Config,
    /// Whether tensors that no part of the model reads are let pass; they are refused otherwise.
    pub allow_unread: bool,
    /// What computes with it; decides bytes.
    pub device: Device,
    /// Devices of the same kind that help it where a walk knows how; they decide no bytes.
    pub helpers: Vec<Device>,
    /// Its tensors by MLX's names, once they were asked for.
    pub names: SharedNames,
}

/// Opens a model directory and validates everything in it. What a run that was killed at its very end left in a model of ours
/// is removed, where the disk lets it ([`tidy`]).
///
/// # Errors
/// [`Error`] for whatever is missing, unreadable or damaged.
pub fn open(directory: &Directory) -> Result<Model, Error> {
    relieve(directory);
    // The config first: without one, a directory of weights is not a model.
    let config = Config::load(directory)?;
    Ok(Model::new(Checkpoint::open(directory.clone())?, config))
}

/// A model is read all the same where nothing can be removed.
fn relieve(directory: &Directory) {
    if let Directory::Path(path) = directory {
        let _ = tidy(path);
    }
}

/// Opens a model directory as mlx_lm does: every `model*.safetensors`, whatever the index says, damaged files left out; where there
/// are none, the files that the index names.
/// For [`crate::inspect`], which tells what is wrong with the rest.
///
/// # Errors
/// [`Error`] if config.json or all weights are missing or unreadable.
pub fn open_files(directory: &Directory) -> Result<Model, Error> {
    relieve(directory);
    let config = Config::load(directory)?;
    let (checkpoint, _) = Checkpoint::open_files(directory.clone())?;
    Ok(Model::new(checkpoint, config))
}

/// A model of which only config.json is here: names and shapes as the config describes them, no weights. For
/// [`crate::forecast`] and [`Plan`](crate::Plan) alone; nothing of it can be converted or run.
///
/// # Errors
/// If config.json is missing or damaged, or its model type has no decoder description.
pub fn open_config(directory: &Directory) -> Result<Model, Error> {
    let config = Config::load(directory)?;
    let headers = mlx_quant_model::expected_headers(&config)?;
    let model_type = config.model_type()?.to_owned();
    let headers =
        headers.ok_or(mlx_quant_model::WeightsError::Undescribed { model_type, reason: String::new() })?;
    let dtype = match config.str("torch_dtype").or_else(|| config.str("dtype")) {
        Some("float32") => Dtype::F32,
        Some("float16") => Dtype::F16,
        _ => Dtype::BF16,
    };
    let headers = headers.into_iter().map(|(name, shape)| (name, dtype, shape));
    let checkpoint = Checkpoint::of_headers(directory.clone(), headers);
    Ok(Model::new(checkpoint, config))
}

/// The built-in demo model: llama, 7.9 million weights, bfloat16.
#[cfg(feature = "demo")]
pub fn demo() -> Directory {
    Directory::Embedded { name: "demo model (built in)", files: mlx_quant_demo::FILES }
}

impl Model {
    fn new(checkpoint: Checkpoint, config: Config) -> Self {
        let (device, names) = (mlx_quant_engine::cpu(), SharedNames::default());
        Self { checkpoint, config, allow_unread: false, device, helpers: Vec::new(), names }
    }

    /// Computed on another device than the processor.
    #[must_use]
    pub fn on(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Computed on several devices of one kind, the first of which leads.
    #[must_use]
    pub fn on_all(mut self, devices: &[Device]) -> Self {
        if let [first, helpers @ ..] = devices {
            self.device = first.clone();
            self.helpers = helpers.to_vec();
        }
        self
    }

    /// All that compute with it, the one that leads first.
    pub fn devices(&self) -> Vec<Device> {
        std::iter::once(&self.device).chain(&self.helpers).cloned().collect()
    }

    /// Its id on the hub where it lies in a hub cache (`models--ORG--NAME/snapshots/COMMIT`), with the commit.
    pub fn hub_id(&self) -> Option<(String, String)> {
        let Directory::Path(path) = self.checkpoint.directory() else { return None };
        let commit = path.file_name()?.to_str()?;
        let snapshots = path.parent().filter(|parent| parent.ends_with("snapshots"))?;
        let folder = snapshots.parent()?.file_name()?.to_str()?;
        let (owner, name) = folder.strip_prefix("models--")?.split_once("--")?;
        Some((format!("{owner}/{name}"), commit.to_owned()))
    }

    /// Its id on the hub, or the name of its directory.
    pub fn name(&self) -> String {
        if let Some((id, _)) = self.hub_id() {
            return id;
        }
        let source = self.checkpoint.directory().display();
        let name = std::path::Path::new(&*source).file_name();
        name.map_or_else(|| source.to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// What it is called in results: its id on the hub, or where it is.
    pub(crate) fn label(&self) -> String {
        self.hub_id().map_or_else(|| self.checkpoint.directory().display().into_owned(), |(id, _)| id)
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or damaged.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        Ok(Tokenizer::load(self.checkpoint.directory())?)
    }

    /// Its tensors by MLX's names.
    ///
    /// # Errors
    /// As [`Named::read`].
    pub fn named(&self) -> Result<Arc<Named>, SourceError> {
        self.names.of(&self.checkpoint, &self.config)
    }

    /// Its weights.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn weights(&self) -> Result<Weights<'_>, WeightsError> {
        Weights::of(&self.checkpoint, self.named()?)
    }

    /// Token ids that it knows.
    ///
    /// # Errors
    /// If the model type has no decoder description, or weights and config do not fit together.
    pub fn vocabulary(&self) -> Result<usize, Error> {
        Ok(self.weights()?.decoder(&self.config, self.allow_unread)?.vocabulary)
    }

    /// Recognises this very checkpoint again: SHA-256 over config.json and, for each file of weights, its name, size, time of change
    /// and tensors (for the built-in model, its bytes).
    ///
    /// # Errors
    /// If a file cannot be looked at.
    pub fn hash(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        hash.update(self.config.to_mlx_json());
        let directory = self.checkpoint.directory();
        for shard in self.checkpoint.shards() {
            match directory {
                Directory::Embedded { files, .. } => {
                    let own = files.iter().filter(|(name, _)| *name == shard);
                    own.for_each(|(_, bytes)| hash.update(bytes));
                }
                Directory::Path(_) => hash.update(format!("{shard} {:?};", directory.identity(shard)?)),
            }
        }
        hash.update(format!("{:?}", self.checkpoint.tensors()));
        Ok(crate::data::hexadecimal(&hash.finalize()))
    }

    /// Files that are copied as they are: tokenizer, chat template, generation settings, settings of images and sound, and
    /// Python files, which are data here and never run.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn companions(&self) -> Result<Vec<String>, Error> {
        let mut files = self.checkpoint.directory().files()?;
        files.retain(|name| is_companion(name));
        Ok(files)
    }
}

/// Whether a file of that name goes along with the weights ([`Model::companions`]).
pub fn is_companion(name: &str) -> bool {
    const NAMES: [&str; 13] = [
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ];
    let python = name.ends_with(".py") && !name.starts_with('.');
    NAMES.contains(&name)
        || is_processor(name)
        || python
        || name.ends_with(".tiktoken")
        || name == "tiktoken.model"
}

/// Whether a file says how images and sound are brought into the form that a model takes.
pub fn is_processor(name: &str) -> bool {
    matches!(name, "preprocessor_config.json" | "processor_config.json" | "video_preprocessor_config.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_chosen_by_name() {
        for name in [
            "tokenizer.json",
            "modeling_x.py",
            "qwen.tiktoken",
            "chat_template.jinja",
            "preprocessor_config.json",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in
            ["config.json", "README.md", "LICENSE", "pytorch_model.bin", "model.safetensors", ".hidden.py"]
        {
            assert!(!is_companion(name), "{name}");
        }
    }
}
