//! Shared by the integration tests.

pub(crate) mod listing;
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) mod seeds;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use mlx_format::checkpoint::{Checkpoint, Directory};
use mlx_format::{Dtype, Scheme};
use mlx_quant::data::Window;
use mlx_quant::{Error, Event, Model, Observer, Pick, Plan, Settings, Silent, Windows, convert, open};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Data copied into the repository.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The project's shared data, where it is present: beside the repository, or where `MLX_QUANT_SHARED` says.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn shared() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    std::env::var_os("MLX_QUANT_SHARED").map_or_else(beside, PathBuf::from)
}

pub(crate) fn open_path(path: &Path) -> Result<Model, Error> {
    open(&Directory::open(path)?)
}

/// Converts into `target` and opens the result.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn convert_to(model: &Model, settings: Settings, target: &Path) -> Result<Checkpoint, Error> {
    let plan = Plan::new(&model.checkpoint, &model.config, settings)?;
    convert(model, &plan, target, 2, &Silent)?;
    Ok(Checkpoint::open(Directory::open(target)?)?)
}

#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Settings of `-q` with these bits and group size.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn quantize(bits: u32, group_size: usize) -> Settings {
    Settings { quantize: Some(Scheme::affine(bits, group_size).unwrap()), ..Settings::default() }
}

/// A checkpoint of the given tensors beside a config.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn write_checkpoint(
    directory: &Path,
    config: &str,
    tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)],
) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("config.json"), config).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        header.insert(
            (*name).to_owned(),
            serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": range}),
        );
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(directory.join("model.safetensors"), file).unwrap();
}

/// bfloat16 elements.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn bf16_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
}

/// config.json of a type that has no description, so that a checkpoint of any tensors is a model.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) const PLAIN: &str = r#"{"model_type": "minimax", "num_hidden_layers": 0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

/// config.json of a llama without layers.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "vocab_size": 64}"#;

/// Windows of tokens that look random; a seed's windows are the same everywhere.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn random_windows(model: &Model, seed: u64, count: usize, tokens: usize) -> Windows {
    let vocabulary = model.vocabulary().unwrap() as u64;
    let mut state = seed;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    };
    let window = |index| Window { source: 0, index, tokens: (0..tokens).map(|_| token()).collect() };
    let picked = (0..count).map(window).collect();
    let pick = Pick::Sampled { windows: count, seed };
    Windows { sequence_length: tokens, pick, picked, sources: Vec::new(), data_hash: seed.to_string() }
}

/// Stops a run after so many progress events.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) struct Stopper(pub(crate) AtomicU64);

impl Observer for Stopper {
    fn event(&self, event: Event<'_>) {
        if let Event::Progress { .. } = event {
            let left = self.0.load(Ordering::Relaxed);
            self.0.store(left.saturating_sub(1), Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// Keeps what everybody should know.
#[allow(dead_code, reason = "not every test binary uses it")]
#[derive(Default)]
pub(crate) struct Warned(pub(crate) Mutex<Vec<String>>);

impl Observer for Warned {
    fn event(&self, event: Event<'_>) {
        if let Event::Warning { text } = event {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }
}
