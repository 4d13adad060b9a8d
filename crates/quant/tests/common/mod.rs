//! Shared by the integration tests.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use half::bf16;
use mlx_format::checkpoint::{Checkpoint, Directory};
use mlx_format::{Dtype, Scheme};
use mlx_quant::{Error, Model, Plan, Settings, Silent, convert, open};
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

/// config.json of a llama without layers.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
