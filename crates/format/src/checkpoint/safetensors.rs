//! Reading single and sharded safetensors checkpoints.
//!
//! The headers are parsed and validated by the `safetensors` crate; what it rejects without saying where is
//! looked at once more to name the tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorInfo};
use serde::Deserialize;

use super::directory::{Bytes, Directory, DirectoryError, check_name};
use super::files::{INDEX, WeightFiles, is_mlx_weights, weight_files};

/// A tensor in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// dtype as the header says.
    pub dtype: Dtype,
    /// Shape as the header says, outermost axis first.
    pub shape: Vec<usize>,
    shard: usize,
    start: usize,
    length: usize,
}

impl Tensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.length
    }
}

/// A checkpoint that cannot be used; every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Directory or file not readable.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// No safetensors files.
    #[error("{directory} has no safetensors files of a whole model; hint: {hint}")]
    NoWeights {
        /// The directory.
        directory: String,
        /// What to do.
        hint: &'static str,
    },
    /// A file that the safetensors format does not allow.
    #[error("{file}: {reason}; hint: the file is damaged or incomplete, download it again")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong, with the tensor where one is known.
        reason: String,
    },
    /// The index is not the JSON it should be.
    #[error("{file}: {reason}; hint: download the index again, or delete it if one file holds all tensors")]
    Index {
        /// The index file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The index names a shard that is not there.
    #[error("{file} names shard {shard}, which is missing; hint: download the missing shard")]
    MissingShard {
        /// The index file.
        file: String,
        /// The shard.
        shard: String,
    },
    /// The index names a tensor that its shard does not hold.
    #[error(
        "{file} puts tensor {tensor} into {shard}, which does not hold it; hint: index and shards are from different downloads, download both again"
    )]
    NotInShard {
        /// The index file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shard.
        shard: String,
    },
    /// A shard holds a tensor that the index does not name.
    #[error(
        "tensor {tensor} in {shard} is not in {file}; hint: index and shards are from different downloads; without the index, all tensors of model*.safetensors are used"
    )]
    NotInIndex {
        /// The index file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shard.
        shard: String,
    },
    /// Two shards hold the same tensor.
    #[error(
        "tensor {tensor} is in {first} and in {second}; hint: remove the file that does not belong to this model"
    )]
    Twice {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
}

/// A tensor as one file's header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderTensor {
    /// Name.
    pub name: String,
    /// dtype.
    pub dtype: Dtype,
    /// Shape, outermost axis first.
    pub shape: Vec<usize>,
    /// Byte range from the start of the file.
    pub range: std::ops::Range<usize>,
}

/// Every tensor of one safetensors file: name, dtype, shape, and byte range from the start of the file.
///
/// Validated: header length against the file, JSON, dtypes, shapes against sizes, overflow, and that the data
/// is covered exactly once (no overlap, no hole, nothing beyond the end).
///
/// # Errors
/// What is wrong, naming the tensor where one is to blame.
pub fn parse_header(bytes: &[u8]) -> Result<Vec<HeaderTensor>, String> {
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| explain(bytes, &error))?;
    let data = header + 8;
    let mut tensors: Vec<_> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            HeaderTensor {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data + start..data + end,
            }
        })
        .collect();
    tensors.sort_by(|a, b| (a.range.start, &a.name).cmp(&(b.range.start, &b.name)));
    Ok(tensors)
}

/// A reason that names the tensor, for what the crate rejects in general terms.
fn explain(bytes: &[u8], error: &SafeTensorError) -> String {
    let size = bytes.len();
    let declared = bytes.first_chunk::<8>().map(|raw| u64::from_le_bytes(*raw));
    match (error, declared) {
        (SafeTensorError::HeaderTooSmall, _) | (_, None) => {
            return format!("{size} bytes are too few for a safetensors file");
        }
        (SafeTensorError::HeaderTooLarge, Some(n)) => {
            return format!("the header claims {n} bytes, more than the format's 100 MB");
        }
        (SafeTensorError::InvalidHeaderLength, Some(n)) => {
            return format!("the header claims {n} bytes but the file has {size}");
        }
        (SafeTensorError::InvalidHeader(error), _) => return format!("the header is not UTF-8: {error}"),
        (SafeTensorError::InvalidHeaderDeserialization(error), _) => {
            return format!("the header is not valid: {error}");
        }
        _ => {}
    }
    let header = declared
        .and_then(|n| bytes.get(8..8usize.checked_add(usize::try_from(n).ok()?)?))
        .unwrap_or_default();
    let data = size.saturating_sub(8 + header.len());
    let infos: HashMap<String, serde_json::Value> = serde_json::from_slice(header).unwrap_or_default();
    let mut infos: Vec<(String, TensorInfo)> = infos
        .into_iter()
        .filter_map(|(name, value)| Some((name, serde_json::from_value(value).ok()?)))
        .collect();
    infos.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut covered = 0;
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        let about = format!("tensor {name} ({}, shape {:?}, bytes {start} to {end})", info.dtype, info.shape);
        let elements = info.shape.iter().try_fold(1usize, |n, axis| n.checked_mul(*axis));
        let Some(bits) = elements.and_then(|n| n.checked_mul(info.dtype.bitsize())) else {
            return format!("the size of {about} overflows");
        };
        if end < start || end - start != bits.div_ceil(8) {
            return format!("{about} should have {} bytes", bits.div_ceil(8));
        }
        if start < covered {
            return format!("{about} overlaps the tensor before it, which ends at {covered}");
        }
        if start > covered {
            return format!("{about} leaves a hole after byte {covered}");
        }
        if end > data {
            return format!("{about} ends beyond the {data} bytes of data in the file");
        }
        covered = end;
    }
    if covered < data {
        return format!("{} bytes after the last tensor belong to none", data - covered);
    }
    error.to_string()
}

/// The `weight_map` of an index: tensor name to shard file name.
///
/// # Errors
/// What is wrong; shard names that lead out of the directory are refused.
pub fn parse_index(bytes: &[u8], location: &str) -> Result<BTreeMap<String, String>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let damaged = |reason: String| CheckpointError::Index { file: location.to_owned(), reason };
    let index: Index = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(damaged("weight_map is empty".to_owned()));
    }
    for shard in index.weight_map.values().collect::<BTreeSet<_>>() {
        check_name(shard, location)?;
    }
    Ok(index.weight_map)
}

/// A directory without weights that can be read.
fn no_weights(directory: &Directory, files: &[String]) -> CheckpointError {
    let pickle = |name: &String| [".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
    let any =
        |start: &str| files.iter().any(|name| name.starts_with(start) && name.ends_with(".safetensors"));
    let hint = if any("adapter") {
        "it holds an adapter (LoRA); merge it into its base model first, and give the merged model"
    } else if any("consolidated") {
        "consolidated*.safetensors is Mistral's own form; get the model in the form of transformers (model*.safetensors)"
    } else if files.iter().any(pickle) {
        "it holds PyTorch pickles, which can run code when they are read and are never opened; \
         get the safetensors version of this model"
    } else {
        "give the directory that a model was downloaded to"
    };
    CheckpointError::NoWeights { directory: directory.display().into_owned(), hint }
}

/// An opened checkpoint: validated headers over mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    directory: Directory,
    shards: Vec<(String, Bytes)>,
    tensors: BTreeMap<String, Tensor>,
    ignored: Vec<String>,
    left_aside: Option<LeftAside>,
    indexed: bool,
    headers_only: bool,
}

/// An index that belongs to other files than those that are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftAside {
    /// The index file.
    pub file: String,
    /// A file that it names, which is not here.
    pub names: String,
    /// A tensor that it names and no file here holds, if there is one.
    pub lacks: Option<String>,
}

impl Checkpoint {
    /// Opens all weights of a directory: the files that `model.safetensors.index.json` names, whatever they are called, else
    /// those that [`weight_files`] finds. An index that names none of the files here is left aside ([`Self::left_aside`]).
    ///
    /// # Errors
    /// [`CheckpointError`] for whatever is missing, damaged or contradictory.
    pub fn open(directory: Directory) -> Result<Self, CheckpointError> {
        let files = directory.files()?;
        let location = directory.display_file(INDEX);
        let index = match directory.read(INDEX)? {
            Some(bytes) => Some(parse_index(&bytes, &location)?),
            None => None,
        };
        let WeightFiles { shards: names, ignored, missing, followed } = weight_files(&files, index.as_ref());
        if let Some(shard) = missing.first() {
            return Err(CheckpointError::MissingShard { file: location, shard: shard.clone() });
        }
        if names.is_empty() {
            return Err(no_weights(&directory, &files));
        }
        let mut checkpoint = Self { ignored, indexed: followed, ..Self::empty(directory) };
        for name in names {
            checkpoint.add_shard(name)?;
        }
        match &index {
            Some(index) if followed => checkpoint.check_index(index, &location)?,
            Some(index) => {
                let names = index.values().next().cloned().unwrap_or_default();
                let lacks = index.keys().find(|name| !checkpoint.tensors.contains_key(*name)).cloned();
                checkpoint.left_aside = Some(LeftAside { file: location, names, lacks });
            }
            None => {}
        }
        Ok(checkpoint)
    }

    fn empty(directory: Directory) -> Self {
        let (shards, tensors, ignored) = (Vec::new(), BTreeMap::new(), Vec::new());
        Self { directory, shards, tensors, ignored, left_aside: None, indexed: false, headers_only: false }
    }

    /// Opens every `model*.safetensors` as mlx_lm does, which never reads the index, or where there is none the files that
    /// [`Self::open`] takes. Files that are damaged or missing are left out and tensors that two files hold are taken from
    /// the second; both are returned as well.
    ///
    /// # Errors
    /// [`CheckpointError`] if the directory cannot be listed or has no weights.
    pub fn open_files(directory: Directory) -> Result<(Self, Vec<CheckpointError>), CheckpointError> {
        let mut files = directory.files()?;
        if files.iter().any(|name| is_mlx_weights(name)) {
            files.retain(|name| is_mlx_weights(name));
        } else {
            let index = directory.read(INDEX)?;
            let index = index.and_then(|bytes| parse_index(&bytes, INDEX).ok());
            let WeightFiles { shards, missing, .. } = weight_files(&files, index.as_ref());
            let here: Vec<String> = shards.into_iter().filter(|name| !missing.contains(name)).collect();
            if here.is_empty() {
                return Err(no_weights(&directory, &files));
            }
            files = here;
        }
        let mut checkpoint = Self::empty(directory);
        let problems = files.into_iter().filter_map(|name| checkpoint.add_shard(name).err()).collect();
        Ok((checkpoint, problems))
    }

    /// A checkpoint of headers without data, to plan with: names, dtypes and shapes are as given, [`Self::bytes`] must not be called.
    pub fn of_headers(
        directory: Directory,
        headers: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
    ) -> Self {
        let mut start = 0usize;
        let tensor = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
            let elements = shape.iter().fold(1usize, |all, axis| all.saturating_mul(*axis));
            let length = elements.saturating_mul(dtype.bitsize()) / 8;
            let tensor = Tensor { dtype, shape, shard: 0, start, length };
            start = start.saturating_add(length);
            (name, tensor)
        };
        let tensors = headers.into_iter().map(tensor).collect();
        let shards = vec![("model.safetensors".to_owned(), Bytes::Static(&[]))];
        Self { shards, tensors, headers_only: true, ..Self::empty(directory) }
    }

    fn add_shard(&mut self, name: String) -> Result<(), CheckpointError> {
        let bytes = self.directory.map(&name)?;
        let file = self.directory.display_file(&name);
        let header = parse_header(&bytes).map_err(|reason| CheckpointError::Damaged { file, reason })?;
        let shard = self.shards.len();
        self.shards.push((name.clone(), bytes));
        let mut twice = None;
        for HeaderTensor { name: tensor, dtype, shape, range } in header {
            let info = Tensor { dtype, shape, shard, start: range.start, length: range.len() };
            if let Some(other) = self.tensors.insert(tensor.clone(), info) {
                let (first, second) = (self.shards[other.shard].0.clone(), name.clone());
                twice.get_or_insert(CheckpointError::Twice { tensor, first, second });
            }
        }
        twice.map_or(Ok(()), Err)
    }

    fn check_index(&self, index: &BTreeMap<String, String>, file: &str) -> Result<(), CheckpointError> {
        let file = || file.to_owned();
        for (tensor, shard) in index {
            let held = self.tensors.get(tensor).map(|found| &self.shards[found.shard].0);
            if held != Some(shard) {
                return Err(CheckpointError::NotInShard {
                    file: file(),
                    tensor: tensor.clone(),
                    shard: shard.clone(),
                });
            }
        }
        match self.tensors.iter().find(|(name, _)| !index.contains_key(*name)) {
            Some((tensor, found)) => {
                let shard = self.shards[found.shard].0.clone();
                Err(CheckpointError::NotInIndex { file: file(), tensor: tensor.clone(), shard })
            }
            None => Ok(()),
        }
    }

    /// The directory that was opened.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Whether an index decided which files these are.
    pub fn is_indexed(&self) -> bool {
        self.indexed
    }

    /// An index that is not used, because it belongs to other files.
    pub fn left_aside(&self) -> Option<&LeftAside> {
        self.left_aside.as_ref()
    }

    /// `model*.safetensors` files that the index does not name and that are therefore not used.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// File names of the shards; none of headers without data.
    pub fn shards(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().map(|(name, _)| name.as_str()).filter(|_| !self.is_headers_only())
    }

    /// Whether there is nothing behind the headers ([`Self::of_headers`]).
    pub fn is_headers_only(&self) -> bool {
        self.headers_only
    }

    /// Name of the file that holds a tensor, and where in it, in bytes from its start.
    pub fn place(&self, tensor: &Tensor) -> (&str, std::ops::Range<u64>) {
        let start = tensor.start as u64;
        (&self.shards[tensor.shard].0, start..start + tensor.length as u64)
    }

    /// The file that holds a tensor, for messages.
    pub fn file_of(&self, tensor: &Tensor) -> String {
        self.directory.display_file(&self.shards[tensor.shard].0)
    }

    /// The bytes of a tensor, row-major, little-endian, at any alignment.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.shards[tensor.shard].1[tensor.start..][..tensor.length]
    }

    /// Gives the memory behind the mapped files back; what is needed again is read again. Whole files, because
    /// the system maps pages around those that are touched, also ones that were given back before.
    pub fn release(&self) {
        for (_, bytes) in &self.shards {
            bytes.release();
        }
    }

    /// Asks for a byte range of a tensor to be read ahead.
    pub fn prefetch(&self, tensor: &Tensor, range: std::ops::Range<usize>) {
        self.shards[tensor.shard].1.prefetch(tensor.start + range.start, range.len());
    }
}
