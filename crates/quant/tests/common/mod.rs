//! Shared by the integration tests.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{Checkpoint, Directory};
use mlx_quant::{Error, Model, Plan, Settings, Silent, convert, open};
use sha2::{Digest, Sha256};

/// Data copied into the repository.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The project's shared data, where it is present.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared")
}

pub(crate) fn open_path(path: &Path) -> Result<Model, Error> {
    open(&Directory::open(path)?)
}

/// Converts into `target` and opens the result.
pub(crate) fn convert_to(model: &Model, settings: Settings, target: &Path) -> Result<Checkpoint, Error> {
    let plan = Plan::new(&model.checkpoint, &model.config, settings)?;
    convert(model, &plan, target, 2, &Silent)?;
    Ok(Checkpoint::open(Directory::open(target)?)?)
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
