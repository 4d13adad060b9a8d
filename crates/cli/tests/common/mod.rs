//! Shared by the tests of the binary.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

/// The binary, with a cache directory of its own.
pub(crate) fn mlx_quant() -> Command {
    let mut command = Command::cargo_bin("mlx-quant").unwrap();
    command.env("XDG_CACHE_HOME", cache());
    command
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
