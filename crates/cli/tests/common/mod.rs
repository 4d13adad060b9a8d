//! Shared by the tests of the binary.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use mlx_quant_hub_fixture::Hub;
use serde_json::Value;

/// The binary, with a cache directory of its own, and without a hub.
pub(crate) fn mlx_quant() -> Command {
    let mut command = Command::cargo_bin("mlx-quant").unwrap();
    command.env("XDG_CACHE_HOME", cache());
    // Tables are as wide as where there is no terminal.
    command.env_remove("COLUMNS");
    // Whoever wants a hub says which one (`knows`); nothing leaves this machine.
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", cache().join("huggingface"));
    command
}

/// The one token that hubs of tests accept.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) const TOKEN: &str = "hf_fakeTokenThatNobodyMaySee4711";

/// A hub that holds nothing.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn hub() -> Hub {
    let hub = Hub::start();
    hub.accept(TOKEN);
    hub
}

/// Lets a command know a hub, and nothing of the one that is meant elsewhere.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn knows<'a>(command: &'a mut Command, hub: &Hub, home: &Path) -> &'a mut Command {
    for name in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
    {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", hub.endpoint())
        .env("HF_HOME", home.join("huggingface"))
        .env("HF_TOKEN", TOKEN);
    command.env("HF_HUB_DOWNLOAD_TIMEOUT", "2").env("NO_PROXY", "*")
}

/// Where this test run measures the machine once.
pub(crate) fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")
}

/// What a successful run prints with `--json`.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn document(run: &mut Command) -> Value {
    serde_json::from_slice(&run.args(["--json", "--quiet"]).assert().success().get_output().stdout).unwrap()
}

/// The built-in model as a directory.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn dense(directory: &Path, name: &str) -> PathBuf {
    let target = directory.join(name);
    mlx_quant().args(["convert", "--quiet", "--mlx-path"]).arg(&target).assert().success();
    target
}

#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn weights(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

/// The built-in model's first two blocks as a directory: enough for what is not about quality.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn two_blocks(directory: &Path, name: &str) -> PathBuf {
    let target = dense(directory, name);
    let file = target.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let kept = |name: &str| {
        let block =
            name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        block.is_none_or(|block| block < 2)
    };
    let (mut data, mut kept_header) = (Vec::new(), serde_json::Map::new());
    for (name, mut entry) in header.into_iter().filter(|(name, _)| name != "__metadata__" && kept(name)) {
        let offset = |at: usize| usize::try_from(entry["data_offsets"][at].as_u64().unwrap()).unwrap();
        let range = 8 + length + offset(0)..8 + length + offset(1);
        let start = data.len();
        data.extend_from_slice(&bytes[range]);
        entry["data_offsets"] = serde_json::json!([start, data.len()]);
        kept_header.insert(name, entry);
    }
    let header = Value::Object(kept_header).to_string();
    let mut written = (header.len() as u64).to_le_bytes().to_vec();
    written.extend(header.as_bytes());
    written.extend(data);
    std::fs::write(file, written).unwrap();
    std::fs::remove_file(target.join("model.safetensors.index.json")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = serde_json::json!(2);
    std::fs::write(target.join("config.json"), config.to_string()).unwrap();
    target
}

/// A small Qwen3-Next with a multi-token-prediction head, as the hub has it, that takes the built-in model's tokens; `change` may
/// alter config.json and shapes before numbers are drawn.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn with_heads(
    directory: &Path,
    name: &str,
    change: impl FnOnce(&mut Value, &mut std::collections::BTreeMap<String, Vec<usize>>),
) -> PathBuf {
    let target = two_blocks(directory, name);
    let read = |path: PathBuf| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let vocabulary = read(target.join("config.json"))["vocab_size"].as_u64().unwrap();
    let listing =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/drafters/qwen3_next.json");
    let listing = read(listing);
    let mut config = listing["config"].clone();
    config["vocab_size"] = vocabulary.into();
    let mut shapes = std::collections::BTreeMap::new();
    for (tensor, entry) in listing["source"].as_object().unwrap() {
        let axes = entry.as_str().unwrap().split(' ').skip(1);
        let mut shape: Vec<usize> = axes.map(|axis| axis.parse().unwrap()).collect();
        if tensor.contains("embed_tokens") || tensor.contains("lm_head") {
            shape[0] = usize::try_from(vocabulary).unwrap();
        }
        shapes.insert(tensor.clone(), shape);
    }
    change(&mut config, &mut shapes);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut state = 1u32;
    for (tensor, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // The upper half of a float32 is a bfloat16.
            let number = ((state >> 16) as f32 - 32768.0) / 262_144.0;
            data.extend_from_slice(&number.to_le_bytes()[2..]);
        }
        let offsets = serde_json::json!([start, data.len()]);
        header.insert(tensor, serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets}));
    }
    let header = Value::Object(header).to_string();
    let padding = " ".repeat((8 - header.len() % 8) % 8);
    let mut written = ((header.len() + padding.len()) as u64).to_le_bytes().to_vec();
    written.extend(header.as_bytes());
    written.extend(padding.as_bytes());
    written.extend(data);
    std::fs::write(target.join("model.safetensors"), written).unwrap();
    std::fs::write(target.join("config.json"), config.to_string()).unwrap();
    target
}
