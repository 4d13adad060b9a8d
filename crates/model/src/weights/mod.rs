//! Weights as float32 tensors: dense ones widened, packed ones decoded, one module, block or row at a time.
//!
//! Nothing is held here: a [`Weights`] knows where everything lies and reads what it is asked for from the mapped
//! files. Names are MLX's. Decoding is done in float32 (code times scale plus bias, not rounded to the
//! stored dtype), so that what is measured is the stored numbers and not some kernel's rounding.

mod packed;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use mlx_format::checkpoint::{Checkpoint, Config};
use mlx_format::{Dtype, FloatType, Mode, PackedRef, Scheme};
use mlx_quant_engine::{Device, Tensor};
use rayon::prelude::*;

use crate::decoder::Decoder;
use crate::fit::{Fault, Misfit, Misfits};
use crate::{Named, Parameters, SourceError, View};

pub use self::packed::PackedRows;

/// Elements that one task decodes.
const TASK_ELEMENTS: usize = 1 << 18;

/// A weight that cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum WeightsError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("tensor {tensor} is missing from {model}; hint: the checkpoint is incomplete, download it again")]
    Missing { tensor: String, model: String },
    #[error(
        "tensor {tensor} in {file}: element {element} is {value}; hint: the model is damaged, quantize or download it again"
    )]
    NonFinite { tensor: String, file: String, element: usize, value: f32 },
    #[error(
        "model type {model_type:?} has no decoder description{reason}, so that it cannot be run; hint: convert works without one; ARCHITECTURE.md says how a type is added"
    )]
    Undescribed { model_type: String, reason: String },
    #[error(
        "windows of {tokens} tokens, but the model knows {known} positions; hint: give a shorter --sequence-length"
    )]
    Positions { tokens: usize, known: usize },
    #[error(
        "windows of {tokens} tokens: beyond {dense} the model chooses the tokens that it looks at, which is not computed here; hint: give a \
         --sequence-length of at most {dense}"
    )]
    Sparse { tokens: usize, dense: usize },
    #[error(
        "token {token} lies outside the {rows} rows of {tensor}; hint: tokenizer and model do not belong together"
    )]
    Token { token: u32, rows: usize, tensor: String },
    #[error("{0}; hint: config.json does not describe these weights")]
    Tensor(#[from] mlx_quant_engine::Error),
}

/// Where one float32 tensor is read from.
#[derive(Clone, Debug)]
struct Entry {
    shape: Vec<usize>,
    stored: Stored,
}

#[derive(Clone, Debug)]
enum Stored {
    Dense {
        view: View,
        float: FloatType,
    },
    Packed {
        weight: View,
        scales: View,
        biases: Option<View>,
        /// nvfp4: one number for each expert, over which its scales are spread.
        global: Option<View>,
        scheme: Scheme,
        float: FloatType,
    },
}

/// The weights of a model, on disk.
#[derive(Debug)]
pub struct Weights<'c> {
    checkpoint: &'c Checkpoint,
    /// Description of the names.
    pub named: Arc<Named>,
    entries: BTreeMap<String, Entry>,
    /// Rows that stand for those of a table, by module path.
    replaced: BTreeMap<String, Rows>,
}

/// Some rows of a table.
#[derive(Clone, Debug)]
struct Rows {
    ids: Vec<u32>,
    /// One after the other, in the order of the ids.
    values: Vec<f32>,
}

impl<'c> Weights<'c> {
    /// Reads headers and config.json only.
    ///
    /// # Errors
    /// If the checkpoint is incomplete, not what config.json says, or has packed tensors that do not belong together.
    pub fn open(checkpoint: &'c Checkpoint, config: &Config) -> Result<Self, WeightsError> {
        Self::of(checkpoint, Arc::new(Named::read(checkpoint, config)?))
    }

    /// The same where the names of the checkpoint are known.
    ///
    /// # Errors
    /// If there are packed tensors that do not belong together.
    pub fn of(checkpoint: &'c Checkpoint, named: Arc<Named>) -> Result<Self, WeightsError> {
        let by_name: BTreeMap<&str, &View> =
            named.tensors.iter().map(|(name, view)| (name.as_str(), view)).collect();
        let mut entries = BTreeMap::new();
        for (name, view) in &by_name {
            let path = name.rsplit_once('.').map_or("", |(path, _)| path);
            let leaf = &name[path.len()..];
            let beside = |leaf: &str| by_name.get(format!("{path}.{leaf}").as_str()).copied();
            let packed = beside("scales").is_some() && beside("weight").is_some();
            let stored = match leaf {
                ".scales" | ".biases" | ".global_scale" if packed => continue,
                ".weight" if packed => {
                    let (scales, global) = (beside("scales").unwrap_or(view), beside("global_scale"));
                    Self::packed(&named, path, view, scales, beside("biases"), global)?
                }
                // What is no number is no weight either: `Named::check` has its say on it.
                _ => match FloatType::from_dtype(view.dtype) {
                    Some(float) => Stored::Dense { view: (*view).clone(), float },
                    None => continue,
                },
            };
            let mut shape = view.shape();
            if let (Stored::Packed { scheme, scales, .. }, Some(last)) = (&stored, shape.last_mut()) {
                *last = scales.columns() * scheme.group_size();
            }
            entries.insert((*name).to_owned(), Entry { shape, stored });
        }
        Ok(Self { checkpoint, named, entries, replaced: BTreeMap::new() })
    }

    fn packed(
        named: &Named,
        path: &str,
        weight: &View,
        scales: &View,
        biases: Option<&View>,
        global: Option<&View>,
    ) -> Result<Stored, WeightsError> {
        let of = |view: &View| (view.dtype, view.shape());
        let damaged = || SourceError::Packed {
            path: path.to_owned(),
            weight: of(weight),
            scales: of(scales),
            biases: biases.map(of),
        };
        let outer = |view: &View| {
            let mut shape = view.shape();
            shape.pop();
            shape
        };
        let alike = weight.dtype == Dtype::U32
            && outer(weight) == outer(scales)
            && biases.is_none_or(|biases| of(biases) == of(scales));
        if !alike {
            return Err(damaged().into());
        }
        let scheme = named.scheme(path, weight, scales)?;
        let float = match scheme.mode() {
            Mode::Affine => FloatType::from_dtype(scales.dtype).ok_or_else(damaged)?,
            _ => FloatType::F32,
        };
        if biases.is_some() != scheme.has_biases() {
            return Err(damaged().into());
        }
        global.map_or(Ok(()), |global| named.spreads(path, weight, scales, global))?;
        let (biases, global) = (biases.cloned(), global.cloned());
        Ok(Stored::Packed { weight: weight.clone(), scales: scales.clone(), biases, global, scheme, float })
    }

    /// The decoder that reads them: described, complete, every shape as the config says. `allow_unread` lets pass what no part of
    /// it reads.
    ///
    /// # Errors
    /// If the model type has no description, or tensors are missing, left over or of other shapes.
    pub fn decoder(&self, config: &Config, allow_unread: bool) -> Result<Decoder, WeightsError> {
        self.named.check(self.checkpoint, allow_unread)?;
        let Some(decoder) = &self.named.decoder else {
            let reason =
                self.named.undescribed.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
            return Err(WeightsError::Undescribed {
                model_type: config.model_type().unwrap_or("?").to_owned(),
                reason,
            });
        };
        Ok(decoder.clone())
    }

    /// The checkpoint they are read from.
    pub fn checkpoint(&self) -> &'c Checkpoint {
        self.checkpoint
    }

    /// Names and shapes of all tensors, as they are after decoding.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
    }

    /// Shape of a tensor after decoding.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Shape of a tensor after decoding, one that has to be there.
    ///
    /// # Errors
    /// [`WeightsError::Missing`].
    pub fn shape_of(&self, name: &str) -> Result<&[usize], WeightsError> {
        self.shape(name).ok_or_else(|| self.missing(name.to_owned()))
    }

    /// The scheme of a packed module.
    pub fn scheme(&self, path: &str) -> Option<Scheme> {
        match &self.entries.get(&format!("{path}.weight"))?.stored {
            Stored::Packed { scheme, .. } => Some(*scheme),
            Stored::Dense { .. } => None,
        }
    }

    /// Bytes in float32 of all tensors whose names begin with `prefix`.
    pub fn float_bytes(&self, prefix: &str) -> u64 {
        self.with_prefix(prefix).map(|(_, entry)| entry.shape.iter().product::<usize>() as u64 * 4).sum()
    }

    /// Elements of the largest matrix (of one expert) among the tensors whose names begin with `prefix`.
    pub fn largest_matrix(&self, prefix: &str) -> usize {
        let elements = |entry: &Entry| entry.shape.iter().rev().take(2).product::<usize>();
        self.with_prefix(prefix).map(|(_, entry)| elements(entry)).max().unwrap_or(0)
    }

    /// Bytes as stored of all tensors whose names begin with `prefix`.
    pub fn stored_bytes(&self, prefix: &str) -> u64 {
        let tensors = self.named.tensors.iter().filter(|(name, _)| name.starts_with(prefix));
        tensors.map(|(_, view)| view.stored_bytes()).sum()
    }

    fn with_prefix<'s>(&'s self, prefix: &'s str) -> impl Iterator<Item = (&'s String, &'s Entry)> {
        self.entries.range(prefix.to_owned()..).take_while(move |(name, _)| name.starts_with(prefix))
    }

    /// All tensors whose names begin with `prefix` (a block), decoded; reads their pages and gives them back.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn load(&self, prefix: &str, device: &Device) -> Result<Parameters, WeightsError> {
        let mut parameters = Parameters::default();
        for (name, entry) in self.with_prefix(prefix) {
            let columns = entry.shape.last().copied().unwrap_or(1).max(1);
            let rows = entry.shape.iter().product::<usize>() / columns;
            let replaced = name.strip_suffix(".weight").and_then(|path| self.replaced.get(path));
            let tensor = match replaced.filter(|replaced| replaced.ids.len() == rows) {
                Some(replaced) => Tensor::from_slice(&replaced.values, entry.shape.as_slice(), device)?,
                None => self.decode(name, entry, 0..rows, device)?,
            };
            parameters.insert(name.clone(), tensor);
            self.checkpoint.release();
        }
        Ok(parameters)
    }

    /// What follows the last block: its norm, and the head or the table that it is tied to.
    ///
    /// # Errors
    /// As [`Weights::module`].
    pub fn load_last(&self, decoder: &Decoder, device: &Device) -> Result<Parameters, WeightsError> {
        let head = decoder.head.linear.as_ref().map_or(&decoder.embedding.path, |linear| &linear.path);
        let mut parameters = self.module(head, device)?;
        for module in decoder.last_modules() {
            parameters.extend(self.module(module, device)?);
        }
        Ok(parameters)
    }

    /// Some rows of a matrix `path.weight`, and the same of its bias: a tile of a head.
    ///
    /// # Errors
    /// If the matrix is missing, the range lies outside it, or a value is NaN or infinite.
    pub fn load_tile(
        &self,
        path: &str,
        rows: Range<usize>,
        device: &Device,
    ) -> Result<Parameters, WeightsError> {
        let mut parameters = Parameters::default();
        for leaf in ["weight", "bias"] {
            let name = format!("{path}.{leaf}");
            let Some(entry) = self.entries.get(&name) else {
                if leaf == "bias" {
                    continue;
                }
                return Err(self.missing(name));
            };
            let tile = match &entry.shape[..] {
                [all, _] if rows.end <= *all => self.decode(&name, entry, rows.clone(), device)?,
                // The row of a vector is the whole of it.
                [all] if rows.end <= *all => {
                    self.decode(&name, entry, 0..1, device)?.narrow(0, rows.start, rows.len())?
                }
                found => {
                    let fault = Fault::Shape { found: found.to_vec(), expected: vec![Some(rows.end), None] };
                    let (model, family) =
                        (self.checkpoint.directory().display().into_owned(), self.named.architecture.family);
                    let misfits = Misfits(vec![Misfit { tensor: name, fault }]);
                    return Err(SourceError::Misfits { model, family, misfits }.into());
                }
            };
            parameters.insert(name, tile);
        }
        Ok(parameters)
    }

    /// Gives mapped pages back to the system.
    pub fn release(&self) {
        self.checkpoint.release();
    }

    /// Weight and bias of one module.
    ///
    /// # Errors
    /// If the weight is missing or a value is NaN or infinite.
    pub fn module(&self, path: &str, device: &Device) -> Result<Parameters, WeightsError> {
        let weight = format!("{path}.weight");
        if !self.entries.contains_key(&weight) {
            return Err(self.missing(weight));
        }
        self.load(&format!("{path}."), device)
    }

    /// Lets [`Weights::rows`] give these rows of `path.weight` (`values`, one after the other) instead of the
    /// checkpoint's: what a quantized table holds. `ids` ascend. With all of its rows, so does [`Weights::load`].
    pub fn replace_rows(&mut self, path: &str, ids: Vec<u32>, values: Vec<f32>) {
        self.replaced.insert(path.to_owned(), Rows { ids, values });
    }

    /// Gives the checkpoint's own rows again.
    pub fn restore_rows(&mut self) {
        self.replaced.clear();
    }

    /// Rows of the matrix `path.weight`, `[rows, in]`; each distinct row is read once.
    ///
    /// # Errors
    /// If the matrix is missing, a row lies outside it, or a value is NaN or infinite.
    pub fn rows(&self, path: &str, rows: &[u32], device: &Device) -> Result<Tensor, WeightsError> {
        let name = format!("{path}.weight");
        let entry = self.entries.get(&name).ok_or_else(|| self.missing(name.clone()))?;
        let columns = entry.shape.last().copied().unwrap_or(1);
        let count = entry.shape.iter().product::<usize>() / columns.max(1);
        if let Some(&token) = rows.iter().find(|row| **row as usize >= count) {
            return Err(WeightsError::Token { token, rows: count, tensor: name });
        }
        let distinct: Vec<u32> = rows.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let mut table = vec![0f32; distinct.len() * columns];
        table.par_chunks_mut(columns.max(1)).zip(&distinct).try_for_each(|(out, &row)| {
            if let Some(replaced) = self.replaced.get(path)
                && let Ok(place) = replaced.ids.binary_search(&row)
            {
                out.copy_from_slice(&replaced.values[place * columns..][..columns]);
                return Ok(());
            }
            let row = row as usize;
            self.decode_rows(&name, entry, row..row + 1, out)
        })?;
        let place = |row: &u32| distinct.binary_search(row).unwrap_or_default();
        let mut values = Vec::with_capacity(rows.len() * columns);
        for row in rows {
            values.extend_from_slice(&table[place(row) * columns..][..columns]);
        }
        Ok(Tensor::from_vec(values, (rows.len(), columns), device)?)
    }

    fn missing(&self, tensor: String) -> WeightsError {
        WeightsError::Missing { tensor, model: self.checkpoint.directory().display().into_owned() }
    }

    /// Rows `rows` of a tensor, all axes but the last taken as one; with all of them, in its own shape.
    fn decode(
        &self,
        name: &str,
        entry: &Entry,
        rows: Range<usize>,
        device: &Device,
    ) -> Result<Tensor, WeightsError> {
        let columns = entry.shape.last().copied().unwrap_or(1).max(1);
        let mut values = vec![0f32; rows.len() * columns];
        let per_task = (TASK_ELEMENTS / columns).max(1);
        values.par_chunks_mut(per_task * columns).enumerate().try_for_each(|(index, out)| {
            let start = rows.start + index * per_task;
            self.decode_rows(name, entry, start..start + out.len() / columns, out)
        })?;
        let whole = values.len() == entry.shape.iter().product::<usize>();
        let shape = if whole { entry.shape.clone() } else { vec![rows.len(), columns] };
        Ok(Tensor::from_vec(values, shape, device)?)
    }

    /// Decodes `rows` of stacked experts of `height` rows each, whose scales are spread over a number of their own.
    fn spread(
        &self,
        global: &View,
        scheme: Scheme,
        (rows, columns): (Range<usize>, usize),
        height: usize,
        packed: PackedRef<'_>,
        out: &mut [f32],
    ) {
        let bytes = global.rows_of(self.checkpoint, 0..global.rows());
        let mut globals = vec![0f32; bytes.len() / 4];
        FloatType::F32.widen(&bytes, &mut globals);
        let (words, groups) = (scheme.words(columns) * 4, scheme.groups(columns));
        let mut start = rows.start;
        while start < rows.end {
            let expert = start / height;
            let end = rows.end.min((expert + 1) * height);
            let (first, last) = (start - rows.start, end - rows.start);
            let own = PackedRef {
                weight: &packed.weight[first * words..last * words],
                scales: &packed.scales[first * groups..last * groups],
                biases: &[],
            };
            let out = &mut out[first * columns..last * columns];
            mlx_format::fp::dequantize_nvfp4_global(FloatType::F32, own, globals[expert], out);
            start = end;
        }
    }

    fn decode_rows(
        &self,
        name: &str,
        entry: &Entry,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), WeightsError> {
        let first = rows.start;
        let source = match &entry.stored {
            Stored::Dense { view, float } => {
                float.widen(&view.rows_of(self.checkpoint, rows), out);
                // In float32: 1 + w of a bfloat16 w would lose half of its bits.
                if let Some(change) = &view.change {
                    change.apply(out, first, view.columns(), None);
                }
                view
            }
            Stored::Packed { weight, scales, biases, global, scheme, float } => {
                let words = weight.rows_of(self.checkpoint, rows.clone());
                let widened = |view: &View| {
                    let bytes = view.rows_of(self.checkpoint, rows.clone());
                    if scheme.mode() != Mode::Affine || *float == FloatType::F32 {
                        return bytes.into_owned();
                    }
                    let mut values = vec![0f32; bytes.len() / float.size()];
                    float.widen(&bytes, &mut values);
                    values.iter().flat_map(|value| value.to_le_bytes()).collect()
                };
                let (scales, biases) = (widened(scales), biases.as_ref().map(widened).unwrap_or_default());
                let packed = PackedRef { weight: &words, scales: &scales, biases: &biases };
                let columns = out.len() / rows.len().max(1);
                if let Some(global) = global {
                    self.spread(global, *scheme, (rows, columns), entry.shape[1], packed, out);
                } else {
                    let mut bytes = vec![0u8; out.len() * 4];
                    mlx_format::dequantize(*scheme, FloatType::F32, columns, packed, &mut bytes);
                    FloatType::F32.widen(&bytes, out);
                }
                weight
            }
        };
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let columns = entry.shape.last().copied().unwrap_or(1).max(1);
                let tensor = self.checkpoint.tensor(source.source_of(first + at / columns));
                Err(WeightsError::NonFinite {
                    tensor: name.to_owned(),
                    file: tensor.map(|tensor| self.checkpoint.file_of(tensor)).unwrap_or_default(),
                    element: first * columns + at,
                    value: out[at],
                })
            }
        }
    }
}
