//! Numbers of config.json, and how large they can be.
//!
//! A bound on each keeps products of two of them, and tables that are made before the weights' shapes are compared,
//! within what a machine holds.

use mlx_format::checkpoint::{Config, ConfigError};

/// No dimension of a matrix is larger.
pub(crate) const MOST_WIDTH: usize = 1 << 24;

/// No model has more layers.
pub(crate) const MOST_LAYERS: usize = 1024;

/// No model has more heads.
pub(crate) const MOST_HEADS: usize = 1 << 16;

/// No layer has more experts.
pub(crate) const MOST_EXPERTS: usize = 4096;

/// Weights of all tensors together; a thousand times the largest model.
pub(crate) const MOST_WEIGHTS: usize = 1 << 50;

/// A key of config.json that cannot be used.
pub(crate) fn wrong(key: &str, reason: &str) -> ConfigError {
    ConfigError::Key { key: key.to_owned(), reason: reason.to_owned() }
}

/// A key of config.json that asks for something that is right but not described here.
pub(crate) fn undescribed(key: &str, reason: &str) -> ConfigError {
    ConfigError::Undescribed { key: key.to_owned(), reason: reason.to_owned() }
}

/// `count`, unless it is beyond what any model has.
///
/// # Errors
/// If it is.
pub(crate) fn at_most(most: usize, key: &str, count: usize) -> Result<usize, ConfigError> {
    if count > most { Err(wrong(key, &format!("is {count}, more than any model has"))) } else { Ok(count) }
}

/// A count, which may be said once or of every layer alike.
fn count_of_all(config: &Config, key: &str) -> Result<usize, ConfigError> {
    let list = config.get(key).and_then(serde_json::Value::as_array);
    let Some((first, others)) = list.and_then(|list| list.split_first()) else { return config.count(key) };
    match first.as_u64() {
        Some(count) if others.iter().all(|other| other == first) => Ok(count as usize),
        _ => Err(wrong(key, "differs from layer to layer")),
    }
}

/// The width under the first of `keys` that is there.
///
/// # Errors
/// If that one is no count: a key that is there and cannot be used is no reason to take another.
pub(crate) fn first_width(config: &Config, keys: &[&str]) -> Result<Option<usize>, ConfigError> {
    let key = keys.iter().find(|key| config.get(key).is_some());
    key.map(|key| at_most(MOST_WIDTH, key, count_of_all(config, key)?)).transpose()
}
