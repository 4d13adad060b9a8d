//! Where every output tensor will stand, known before any work.

use std::collections::HashMap;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::config::python_json;

/// mlx-lm's shard limit: 5 GiB (`mlx_lm/utils.py`, `make_shards`).
pub const SHARD_BYTES: u64 = 5 << 30;

/// An output tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// MLX name.
    pub name: String,
    /// dtype.
    pub dtype: Dtype,
    /// Shape, outermost axis first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Stored bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// Where a tensor stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Index into [`Layout::shards`].
    pub shard: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One output file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shard {
    pub(super) file: String,
    pub(super) header: Vec<u8>,
    pub(super) bytes: u64,
}

/// All output files: names, headers, offsets. Tensors keep the order given, as mlx-lm's greedy sharding does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    specs: Vec<TensorSpec>,
    by_name: HashMap<String, usize>,
    placements: Vec<Placement>,
    shards: Vec<Shard>,
}

impl Layout {
    /// Distributes tensors over shards: a new one starts when the sum of tensor bytes would exceed
    /// `shard_bytes`; a larger tensor has a shard to itself.
    pub fn new(specs: Vec<TensorSpec>, shard_bytes: u64) -> Self {
        let mut members: Vec<Vec<usize>> = Vec::new();
        let mut filled = 0;
        for (index, spec) in specs.iter().enumerate() {
            match members.last_mut() {
                Some(shard) if filled + spec.bytes() <= shard_bytes => shard.push(index),
                _ => {
                    members.push(vec![index]);
                    filled = 0;
                }
            }
            filled += spec.bytes();
        }
        let mut placements = vec![Placement { shard: 0, offset: 0, bytes: 0 }; specs.len()];
        let count = members.len();
        let mut shards = Vec::with_capacity(count);
        for (shard, members) in members.iter().enumerate() {
            let header = header(&specs, members);
            let mut offset = header.len() as u64;
            for &member in members {
                placements[member] = Placement { shard, offset, bytes: specs[member].bytes() };
                offset += specs[member].bytes();
            }
            let file = if count == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", shard + 1)
            };
            shards.push(Shard { file, header, bytes: offset });
        }
        let by_name = specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        Self { specs, by_name, placements, shards }
    }

    /// The tensors, in the order given.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Which of the tensors has this name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Where tensor `index` stands.
    pub fn placement(&self, index: usize) -> Placement {
        self.placements[index]
    }

    /// File names and sizes in bytes.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.shards.iter().map(|shard| (shard.file.as_str(), shard.bytes))
    }

    pub(super) fn shard_headers(&self) -> &[Shard] {
        &self.shards
    }

    /// Whether every shard is in a directory, of the right length and with its header.
    pub(super) fn is_intact_in(&self, directory: &Path) -> bool {
        self.shards.iter().all(|shard| {
            let mut header = vec![0u8; shard.header.len()];
            std::fs::File::open(directory.join(&shard.file)).is_ok_and(|file| {
                let length = file.metadata().map(|metadata| metadata.len()).ok();
                length == Some(shard.bytes)
                    && file.read_exact_at(&mut header, 0).is_ok()
                    && header == shard.header
            })
        })
    }

    /// Bytes of all tensors, without headers.
    pub fn tensor_bytes(&self) -> u64 {
        self.specs.iter().map(TensorSpec::bytes).sum()
    }

    /// Bytes of all safetensors files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// `model.safetensors.index.json` as mlx-lm writes it; `parameters` counts unquantized weights.
    pub fn index_json(&self, parameters: u64) -> String {
        let mut map: Vec<(&str, &str)> = (self.specs.iter().zip(&self.placements))
            .map(|(spec, placement)| (spec.name.as_str(), self.shards[placement.shard].file.as_str()))
            .collect();
        map.sort_unstable();
        let map: Map<String, Value> =
            map.into_iter().map(|(name, file)| (name.to_owned(), file.into())).collect();
        let metadata = json!({"total_size": self.tensor_bytes(), "total_parameters": parameters});
        python_json(&json!({"metadata": metadata, "weight_map": map}))
    }
}

/// Length and JSON of a safetensors header, padded with spaces so that data starts at a multiple of 8.
fn header(specs: &[TensorSpec], members: &[usize]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), json!({"format": "mlx"}));
    let mut start = 0;
    for spec in members.iter().map(|&member| &specs[member]) {
        let end = start + spec.bytes();
        let entry =
            json!({"data_offsets": [start, end], "dtype": spec.dtype.to_string(), "shape": spec.shape});
        map.insert(spec.name.clone(), entry);
        start = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, rows: usize) -> TensorSpec {
        TensorSpec { name: name.to_owned(), dtype: Dtype::BF16, shape: vec![rows, 8] }
    }

    #[test]
    fn shards_are_greedy_and_headers_valid() {
        let specs =
            vec![spec("a", 4), spec("b", 2), spec("c", 3), spec("huge", 100), spec("d", 0), spec("e", 1)];
        let layout = Layout::new(specs, 96);
        let members: Vec<usize> = (0..6).map(|index| layout.placement(index).shard).collect();
        assert_eq!(members, [0, 0, 1, 2, 3, 3]);
        assert_eq!((layout.index_of("huge"), layout.index_of("none")), (Some(3), None));
        let names: Vec<&str> = layout.shards().map(|(name, _)| name).collect();
        assert_eq!(names[0], "model-00001-of-00004.safetensors");
        for shard in layout.shard_headers() {
            let mut file = shard.header.clone();
            assert!(file.len().is_multiple_of(8));
            file.resize(shard.bytes as usize, 0);
            super::super::safetensors::parse_header(&file).unwrap();
        }
        assert_eq!(layout.tensor_bytes(), 110 * 16);
    }

    #[test]
    fn one_shard_has_the_plain_name() {
        let layout = Layout::new(vec![spec("a", 1)], SHARD_BYTES);
        assert_eq!(layout.shards().next().unwrap().0, "model.safetensors");
        assert!(layout.index_json(7).contains("\"total_parameters\": 7"));
    }
}
