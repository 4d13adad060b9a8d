//! Gram matrices kept for later runs, with other bits, groups or methods.
//!
//! They are those of the full-precision model: of each site's inputs as if nothing were quantized. So they serve any
//! recipe on the same weights and windows; a key in the directory says which these are. A run that finds all matrices
//! takes no window through the model.

use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{Array, Arrays, array_shapes};
use mlx_quant_engine::Tensor;
use mlx_quant_model::{Parameters, Site, WeightsError};
use serde::{Deserialize, Serialize};

use super::Visitor;
use crate::data::Windows;
use crate::device::{Device, identity};
use crate::kept::{self, Keyed};
use crate::methods::Gram;
use crate::{Error, Model};

const KEY: &str = "statistics.json";
/// Raised when the form or the meaning of what is kept changes.
const VERSION: u32 = 2;

/// What the matrices were made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    version: u32,
    /// [`Model::hash`].
    model: String,
    /// SHA-256 of the windows' tokens.
    windows: String,
    sequence_length: usize,
    /// [`identity`].
    engine: String,
}

/// A directory of Gram matrices.
#[derive(Debug)]
pub(crate) struct Statistics {
    directory: PathBuf,
    device: Device,
}

impl Statistics {
    /// Makes the directory, or checks that what is in it was made from the same model and windows. Several processes
    /// may work in it at once: what they write follows from the key.
    pub(crate) fn open(directory: &Path, model: &Model, windows: &Windows) -> Result<Self, Error> {
        let key = Key {
            version: VERSION,
            model: model.hash()?,
            windows: windows.tokens_hash(),
            sequence_length: windows.sequence_length,
            engine: identity(&model.device),
        };
        let keyed = Keyed { directory, file: KEY, version: VERSION.into() };
        let found = keyed.read().and_then(|found| found.map_or_else(|| keyed.make(&key), Ok));
        let found: Key = found.map_err(|reason| refused(directory, reason))?;
        if found != key {
            let what = if found.model != key.model {
                "another model"
            } else if found.engine != key.engine {
                "another engine or instruction set"
            } else {
                "other calibration windows"
            };
            return Err(refused(directory, format!("the statistics in it are of {what}")));
        }
        Ok(Self { directory: directory.to_owned(), device: model.device.clone() })
    }

    fn path(&self, block: usize, site: usize) -> PathBuf {
        self.directory.join(format!("block-{block}-site-{site}.safetensors"))
    }

    /// Whether a block's matrices are all there.
    pub(crate) fn has(&self, block: usize) -> bool {
        self.directory.join(format!("block-{block}.done")).is_file()
    }

    /// All matrices of a block are there, and on the disk before this is said of them.
    fn finish(&self, block: usize) -> Result<(), Error> {
        let path = self.directory.join(format!("block-{block}.done"));
        let written = kept::sync_directory(&self.directory).and_then(|()| kept::write(&path, b""));
        written.map_err(|error| Error::state(&path, &error))
    }

    fn store(&self, block: usize, site: usize, gram: &Gram) -> Result<(), Error> {
        let path = self.path(block, site);
        let tokens = vec![i64::try_from(gram.tokens).unwrap_or(i64::MAX)];
        let values = gram.values.to_vec().map_err(WeightsError::from)?;
        let arrays = Arrays::from([
            ("gram".to_owned(), Array::new([gram.size, gram.size], values)),
            ("tokens".to_owned(), Array::flat(tokens)),
        ]);
        kept::store(&path, &arrays).map_err(|error| Error::state(&path, &error))
    }

    /// The one matrix of what is no block (number `block` lies behind the last one). If it is not there it is made and
    /// kept. `size` as in [`Statistics::load`].
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
        let shapes = std::fs::File::open(&path).and_then(array_shapes);
        let mut shapes = shapes.map_err(|error| refused(&path, error.to_string()))?;
        let shape = shapes.remove("gram").ok_or_else(|| refused(&path, "it has no matrix".to_owned()))?;
        if shape == [size, size] { Ok(()) } else { Err(misshapen(&path, &shape, size)) }
    }

    /// The matrix of a site with `size` features; `None` where no token came to it.
    pub(crate) fn load(&self, block: usize, site: usize, size: usize) -> Result<Option<Gram>, Error> {
        let path = self.path(block, site);
        if !path.is_file() {
            return Ok(None);
        }
        let mut all = kept::load(&path).map_err(|error| refused(&path, error.to_string()))?;
        let none = || refused(&path, "it holds no mean of products of inputs".to_owned());
        let gram = all.remove("gram").ok_or_else(none)?;
        if gram.shape != [size, size] {
            return Err(misshapen(&path, &gram.shape, size));
        }
        let values = gram.into_f32().ok_or_else(none)?;
        let tokens = all.remove("tokens").and_then(Array::into_i64).ok_or_else(none)?;
        // Sums of squares on the diagonal.
        let sound = values.iter().all(|value| value.is_finite())
            && values.iter().step_by(size + 1).all(|square| *square >= 0.0);
        match tokens[..] {
            [tokens] if tokens >= 0 && sound => {
                let values = Tensor::from_vec(values, (size, size), &self.device);
                let values = values.map_err(WeightsError::from)?;
                Ok(Some(Gram { size, tokens: tokens.unsigned_abs(), values }))
            }
            _ => Err(none()),
        }
    }
}

fn misshapen(path: &Path, shape: &[usize], size: usize) -> Error {
    refused(path, format!("its matrix is {shape:?}, {size} inputs need [{size}, {size}]"))
}

fn refused(path: &Path, reason: String) -> Error {
    Error::Statistics { path: path.display().to_string(), reason }
}

/// The visitor that keeps matrices and changes nothing.
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
        let weight = |path: &str| -> mlx_quant_engine::Result<Tensor> {
            let weight = self.parameters.tensor(&format!("{path}.weight"))?;
            match site.slice {
                Some(slice) => weight.get(slice),
                None => Ok(weight.clone()),
            }
        };
        let weights =
            site.readers.iter().map(|reader| weight(&reader.path)).collect::<mlx_quant_engine::Result<_>>();
        Ok(weights.map_err(WeightsError::from)?)
    }

    fn cancelled(&self) -> bool {
        self.observer.cancelled()
    }
}
