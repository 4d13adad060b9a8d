//! Gram matrices kept for later runs, with other bits, groups or methods.
//!
//! They are those of the full-precision model (each site's inputs as if nothing were quantized), so that they serve any recipe on
//! the same weights and windows, which a key in the directory makes sure of. A run that finds all of them
//! passes no window through the model.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fs_err as fs;
use mlx_quant_model::{Parameters, Site, WeightsError};
use serde::{Deserialize, Serialize};

use super::Visitor;
use crate::data::Windows;
use crate::methods::Gram;
use crate::{Error, Model};

const KEY: &str = "statistics.json";

/// Longest header of a file of ours that is looked at; theirs have some hundred bytes.
const HEADER_BYTES: u64 = 1 << 20;

/// What the matrices were made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    version: u32,
    /// [`Model::hash`].
    model: String,
    /// SHA-256 of the windows' tokens.
    windows: String,
    sequence_length: usize,
}

/// A directory of Gram matrices.
#[derive(Debug)]
pub(crate) struct Statistics {
    directory: PathBuf,
}

impl Statistics {
    /// Makes the directory, or checks that what is in it was made from the same model and windows.
    pub(crate) fn open(directory: &Path, model: &Model, windows: &Windows) -> Result<Self, Error> {
        let refused = |reason: String| Error::Statistics { path: directory.display().to_string(), reason };
        let key = Key {
            version: 1,
            model: model.hash()?,
            windows: windows.tokens_hash(),
            sequence_length: windows.sequence_length,
        };
        fs::create_dir_all(directory).map_err(|error| refused(error.to_string()))?;
        let path = directory.join(KEY);
        if path.is_file() {
            let text = fs::read_to_string(&path).map_err(|error| refused(error.to_string()))?;
            let found: Key =
                serde_json::from_str(&text).map_err(|error| refused(format!("{KEY}: {error}")))?;
            if found != key {
                let what =
                    if found.model == key.model { "other calibration windows" } else { "another model" };
                return Err(refused(format!("the statistics in it are of {what}")));
            }
        } else {
            if fs::read_dir(directory).map_err(|error| refused(error.to_string()))?.next().is_some() {
                return Err(refused(format!("it is not empty and has no {KEY}")));
            }
            let text = serde_json::to_string_pretty(&key).unwrap_or_default();
            let partial = directory.join("statistics.partial");
            let written = fs::write(&partial, text + "\n").and_then(|()| fs::rename(&partial, &path));
            written.map_err(|error| refused(error.to_string()))?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    fn path(&self, block: usize, site: usize) -> PathBuf {
        self.directory.join(format!("block-{block}-site-{site}.safetensors"))
    }

    /// Whether a block's matrices are all there.
    pub(crate) fn has(&self, block: usize) -> bool {
        self.directory.join(format!("block-{block}.done")).is_file()
    }

    fn finish(&self, block: usize) -> Result<(), Error> {
        let path = self.directory.join(format!("block-{block}.done"));
        fs::write(&path, "").map_err(|error| failed(&path, &error))
    }

    fn store(&self, block: usize, site: usize, gram: &Gram) -> Result<(), Error> {
        let path = self.path(block, site);
        let partial = path.with_extension("partial");
        let tensors = || -> candle_core::Result<_> {
            let values = Tensor::from_slice(&gram.values, (gram.size, gram.size), &Device::Cpu)?;
            let tokens =
                Tensor::from_slice(&[i64::try_from(gram.tokens).unwrap_or(i64::MAX)], 1, &Device::Cpu)?;
            Ok([("gram".to_owned(), values), ("tokens".to_owned(), tokens)].into_iter().collect())
        };
        let all: std::collections::HashMap<String, Tensor> = tensors().map_err(WeightsError::from)?;
        candle_core::safetensors::save(&all, &partial).map_err(|error| failed(&path, &error))?;
        fs::rename(&partial, &path).map_err(|error| failed(&path, &error))
    }

    /// The one matrix of what is no block (`block` lies behind the last), made and kept if it is not there. `size` as in
    /// [`Statistics::load`].
    pub(crate) fn or_make(
        &self,
        block: usize,
        size: usize,
        make: impl FnOnce() -> Result<Gram, Error>,
    ) -> Result<Gram, Error> {
        if self.has(block)
            && let Some(gram) = self.load(block, 0, size)?
        {
            return Ok(gram);
        }
        let gram = make()?;
        self.store(block, 0, &gram)?;
        self.finish(block)?;
        Ok(gram)
    }

    /// Refuses from headers alone a matrix that is not one of `size` features.
    pub(crate) fn check(&self, block: usize, site: usize, size: usize) -> Result<(), Error> {
        let path = self.path(block, site);
        if !path.is_file() {
            return Ok(());
        }
        let shape = shape(&path).map_err(|reason| refused(&path, reason))?;
        if shape == [size, size] { Ok(()) } else { Err(misshapen(&path, &shape, size)) }
    }

    /// A site's matrix, of a site with `size` features; `None` where no token came by.
    pub(crate) fn load(&self, block: usize, site: usize, size: usize) -> Result<Option<Gram>, Error> {
        let path = self.path(block, site);
        if !path.is_file() {
            return Ok(None);
        }
        let read = || -> candle_core::Result<(Tensor, Vec<i64>)> {
            let mut all = candle_core::safetensors::load(&path, &Device::Cpu)?;
            let missing = || candle_core::Error::msg("gram or tokens are missing");
            let values = all.remove("gram").ok_or_else(missing)?;
            Ok((values, all.get("tokens").ok_or_else(missing)?.to_vec1::<i64>()?))
        };
        let (values, tokens) = read().map_err(|error| refused(&path, error.to_string()))?;
        if values.dims() != [size, size] {
            return Err(misshapen(&path, values.dims(), size));
        }
        let values = values.flatten_all().and_then(|values| values.to_vec1());
        let values: Vec<f32> = values.map_err(|error| refused(&path, error.to_string()))?;
        // Sums of squares on the diagonal.
        let sound = values.iter().all(|value| value.is_finite())
            && values.iter().step_by(size + 1).all(|square| *square >= 0.0);
        match tokens[..] {
            [tokens] if tokens >= 0 && sound => {
                Ok(Some(Gram { size, tokens: tokens.unsigned_abs(), values }))
            }
            _ => Err(refused(&path, "it holds no mean of products of inputs".to_owned())),
        }
    }
}

/// The shape of the matrix in a file, from its header.
fn shape(path: &Path) -> Result<Vec<usize>, String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = Vec::new();
        file.take(u64::from_le_bytes(length).min(HEADER_BYTES)).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read().map_err(|error| error.to_string())?;
    let header: serde_json::Value = serde_json::from_slice(&header).map_err(|error| error.to_string())?;
    let shape = header["gram"]["shape"].as_array().ok_or("it has no matrix")?;
    let axis = |axis: &serde_json::Value| axis.as_u64().map(|axis| axis as usize);
    shape.iter().map(axis).collect::<Option<_>>().ok_or_else(|| "its shape is none".to_owned())
}

fn misshapen(path: &Path, shape: &[usize], size: usize) -> Error {
    refused(path, format!("its matrix is {shape:?}, {size} inputs need [{size}, {size}]"))
}

fn refused(path: &Path, reason: String) -> Error {
    Error::Statistics { path: path.display().to_string(), reason }
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::State { path: path.display().to_string(), reason: error.to_string() }
}

/// Keeps matrices and lets windows pass as they are.
pub(crate) struct Collector<'c> {
    pub(crate) statistics: &'c Statistics,
    pub(crate) block: usize,
    pub(crate) sites: &'c [Site<'c>],
    pub(crate) parameters: &'c Parameters,
    pub(crate) observer: &'c dyn crate::Observer,
}

impl Collector<'_> {
    pub(crate) fn finish(self) -> Result<(), Error> {
        self.statistics.finish(self.block)
    }
}

impl Visitor for Collector<'_> {
    fn visit(&mut self, index: usize, gram: Gram, _: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        self.statistics.store(self.block, index, &gram)?;
        let site = &self.sites[index];
        let weight = |path: &str| -> candle_core::Result<Tensor> {
            let weight = self.parameters.tensor(&format!("{path}.weight"))?;
            match site.expert {
                Some(expert) => weight.get(expert),
                None => Ok(weight.clone()),
            }
        };
        let weights =
            site.readers.iter().map(|reader| weight(&reader.path)).collect::<candle_core::Result<_>>();
        Ok(weights.map_err(WeightsError::from)?)
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }
}
