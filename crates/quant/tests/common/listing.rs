//! Tiny checkpoints that a listing describes: numbers follow from names, so that no weights have to be kept.
#![allow(dead_code, reason = "not every test binary uses all of it")]

use std::collections::BTreeMap;
use std::path::Path;

use mlx_format::Dtype;
use mlx_format::checkpoint::Checkpoint;
use mlx_quant::Model;
use serde_json::Value;

use super::{bf16_bytes, fixtures, open_path, sha256, write_checkpoint};

/// The CRC-32 of zip files.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Numbers that follow from a tensor's name and an element's index; of norms' weights around 1. `scripts/vision.py` makes
/// the same.
pub(crate) fn values(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let segments: Vec<&str> = name.rsplitn(3, '.').collect();
    let around_one = segments[0] == "weight" && segments.get(1).is_some_and(|module| module.contains("norm"));
    let (seed, middle) = (crc32(name.as_bytes()), if around_one { 1.0 } else { 0.0 });
    (0..count as u32).map(move |index| {
        let mut hash = index.wrapping_mul(2_654_435_761).wrapping_add(seed);
        hash = (hash ^ (hash >> 15)).wrapping_mul(2_246_822_519);
        hash ^= hash >> 13;
        ((hash >> 16) as f32 - 32768.0) / 262_144.0 + middle
    })
}

/// A listing: what is made of which tensors.
pub(crate) struct Listing {
    pub(crate) name: String,
    /// The whole file.
    pub(crate) all: Value,
    pub(crate) config: Value,
    /// dtype and shape by the hub's names.
    pub(crate) source: BTreeMap<String, (Dtype, Vec<usize>)>,
    /// dtype, shape and the beginning of the SHA-256 by the names of what is made of it.
    pub(crate) right: BTreeMap<String, String>,
}

impl Listing {
    /// Those of a folder of fixtures, which say under `key` what is made.
    pub(crate) fn all(folder: &str, key: &str) -> Vec<Self> {
        let entries = std::fs::read_dir(fixtures().join(folder)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names.iter().map(|path| Self::read(path, key)).collect()
    }

    pub(crate) fn read(path: &Path, key: &str) -> Self {
        let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let text =
            |key: &str| -> BTreeMap<String, String> { serde_json::from_value(all[key].clone()).unwrap() };
        let tensor = |entry: String| {
            let mut words = entry.split(' ');
            let dtype = if words.next() == Some("F32") { Dtype::F32 } else { Dtype::BF16 };
            (dtype, words.map(|axis| axis.parse().unwrap()).collect())
        };
        let source = text("source").into_iter().map(|(name, entry)| (name, tensor(entry))).collect();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        Self { name, config: all["config"].clone(), source, right: text(key), all }
    }

    /// Writes the checkpoint.
    pub(crate) fn write(&self, at: &Path) -> Model {
        let bytes = |name: &str, dtype: Dtype, shape: &[usize]| -> Vec<u8> {
            let count = shape.iter().product();
            let bound =
                if name.ends_with("_max") { Some(8.0) } else { name.ends_with("_min").then_some(-8.0) };
            let numbers: Vec<f32> = match bound {
                Some(bound) => vec![bound; count],
                None => values(name, count).collect(),
            };
            match dtype {
                Dtype::F32 => numbers.into_iter().flat_map(f32::to_le_bytes).collect(),
                _ => bf16_bytes(numbers),
            }
        };
        let tensors: Vec<_> = self
            .source
            .iter()
            .map(|(name, (dtype, shape))| (name.as_str(), *dtype, shape.clone(), bytes(name, *dtype, shape)))
            .collect();
        write_checkpoint(at, &self.config.to_string(), &tensors);
        open_path(at).unwrap()
    }
}

/// Dtype, shape and the beginning of the SHA-256 of every tensor.
pub(crate) fn listed(written: &Checkpoint) -> BTreeMap<String, String> {
    let entry = |(name, tensor): (&String, &mlx_format::checkpoint::Tensor)| {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        let words =
            [vec![tensor.dtype.to_string()], shape, vec![sha256(written.bytes(tensor))[..16].to_owned()]];
        (name.clone(), words.concat().join(" "))
    };
    written.tensors().iter().map(entry).collect()
}
