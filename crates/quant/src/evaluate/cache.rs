//! The reference's final hidden states on disk, so that the same reference serves many models.
//!
//! A file holds a header line of JSON with the key, then float32 numbers. The key says what the reference was (size and
//! time of its files, its tensors and config), which tokens it read, and how they were computed; a file with another key or length is no hit.

use std::io::{BufRead as _, Read as _, Write as _};
use std::path::{Path, PathBuf};

use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::data::{Windows, hexadecimal};
use crate::device::{Device, identity};
use crate::{Error, Model, kept};

/// Raised when the arithmetic of the forward pass changes.
const FORMAT: u32 = 1;
/// Longest header line; they have some hundred bytes.
const LINE: u64 = 4096;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    format: u32,
    key: String,
    shape: [usize; 3],
    sha256: String,
}

/// One entry of a cache directory.
#[derive(Debug)]
pub(super) struct Cache {
    path: PathBuf,
    key: String,
    windows: usize,
    tokens: usize,
    device: Device,
}

impl Cache {
    /// Creates the directory if it is missing, and tries to write there, before the long work. Several processes may use it at once: what
    /// they write follows from the key in the name.
    pub(super) fn open(directory: &Path, reference: &Model, windows: &Windows) -> Result<Self, Error> {
        let probe = directory.join(format!(".{}.probe", std::process::id()));
        std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::File::create(&probe))
            .and_then(|_| std::fs::remove_file(&probe))
            .map_err(|error| Error::cache(directory, &error, false))?;
        kept::sweep(directory, |name| name.starts_with("reference-"));
        let mut hash = Sha256::new();
        hash.update(reference.hash()?);
        hash.update(&windows.data_hash);
        hash.update(identity(&reference.device));
        for window in &windows.picked {
            for number in [window.source, window.index, window.tokens.len()] {
                hash.update((number as u64).to_le_bytes());
            }
        }
        let key = hexadecimal(&hash.finalize());
        Ok(Self {
            path: directory.join(format!("reference-{}.hidden", &key[..16])),
            key,
            windows: windows.picked.len(),
            tokens: windows.sequence_length,
            device: reference.device.clone(),
        })
    }

    /// The states `[tokens, hidden]` of every window, if they are there, whole and of this key.
    pub(super) fn load(&self, hidden: usize) -> Result<Option<Vec<Tensor>>, Error> {
        let Ok(file) = std::fs::File::open(&self.path) else { return Ok(None) };
        let Some((sha256, all)) = self.read(file, hidden) else { return Ok(None) };
        if hash(&all) != sha256 {
            return Ok(None);
        }
        let tensor = |window| Tensor::from_vec(window, (self.tokens, hidden), &self.device);
        let windows = all.into_iter().map(tensor).collect::<mlx_quant_engine::Result<_>>();
        Ok(Some(windows.map_err(WeightsError::from)?))
    }

    /// The numbers of every window and what their hash is said to be, of a file with the right header and length.
    fn read(&self, file: std::fs::File, hidden: usize) -> Option<(String, Vec<Vec<f32>>)> {
        let bytes = file.metadata().ok()?.len();
        let mut file = std::io::BufReader::new(file);
        let mut line = Vec::new();
        file.by_ref().take(LINE).read_until(b'\n', &mut line).ok()?;
        let header: Header = serde_json::from_slice(&line).ok()?;
        let shape = [self.windows, self.tokens, hidden];
        let length = line.len() as u64 + 4 * shape.iter().product::<usize>() as u64;
        if (header.format, &header.key, header.shape, length) != (FORMAT, &self.key, shape, bytes) {
            return None;
        }
        let mut window = vec![0; self.tokens * hidden * 4];
        let mut read = || {
            file.read_exact(&mut window).ok()?;
            Some(window.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        Some((header.sha256, (0..self.windows).map(|_| read()).collect::<Option<_>>()?))
    }

    /// Keeps the states.
    pub(super) fn store(&self, states: &[Tensor]) -> Result<(), Error> {
        let all: Vec<Vec<f32>> = states
            .iter()
            .map(Tensor::to_vec)
            .collect::<mlx_quant_engine::Result<_>>()
            .map_err(WeightsError::from)?;
        let hidden = all.iter().map(Vec::len).sum::<usize>() / (self.windows * self.tokens).max(1);
        let header = Header {
            format: FORMAT,
            key: self.key.clone(),
            shape: [self.windows, self.tokens, hidden],
            sha256: hash(&all),
        };
        let written = kept::write_with(&self.path, |out| {
            serde_json::to_writer(&mut *out, &header)?;
            out.write_all(b"\n")?;
            pieces(&all).try_for_each(|piece| out.write_all(&piece))
        });
        written.map_err(|error| Error::cache(&self.path, &error, true))
    }
}

/// Numbers as they stand in the file.
fn pieces(windows: &[Vec<f32>]) -> impl Iterator<Item = Vec<u8>> {
    let pieces = windows.iter().flat_map(|window| window.chunks(4096));
    pieces.map(|values| values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn hash(windows: &[Vec<f32>]) -> String {
    let mut hash = Sha256::new();
    pieces(windows).for_each(|piece| hash.update(piece));
    hexadecimal(&hash.finalize())
}
