//! The reference's final hidden states on disk, so that the same reference serves many models.
//!
//! A file holds a header line of JSON with the key, then float32 numbers. The key says what the reference was (size and
//! time of its files, its tensors and config), which tokens it read, and how they were computed; a file with another key or length is no hit.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::data::{Windows, hexadecimal};
use crate::{Error, Model, kept};

/// Raised when the arithmetic of the forward pass changes.
const FORMAT: u32 = 1;

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
        hash.update(mlx_format::simd_name());
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
        })
    }

    /// The states `[tokens, hidden]` of every window, if they are there, whole and of this key.
    pub(super) fn load(&self, hidden: usize) -> Result<Option<Vec<Tensor>>, Error> {
        let Ok(bytes) = std::fs::read(&self.path) else { return Ok(None) };
        let Some(end) = bytes.iter().take(4096).position(|byte| *byte == b'\n') else { return Ok(None) };
        let (line, data) = (&bytes[..end], &bytes[end + 1..]);
        let shape = [self.windows, self.tokens, hidden];
        let expected = Header {
            format: FORMAT,
            key: self.key.clone(),
            shape,
            sha256: hexadecimal(&Sha256::digest(data)),
        };
        let whole = data.len() == shape.iter().product::<usize>() * 4;
        if !whole || serde_json::from_slice::<Header>(line).ok() != Some(expected) {
            return Ok(None);
        }
        let window = |data: &[u8]| {
            let values = data
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            Tensor::from_vec(values.collect(), (self.tokens, hidden), &mlx_quant_engine::cpu())
        };
        let windows =
            data.chunks_exact(self.tokens * hidden * 4).map(window).collect::<mlx_quant_engine::Result<_>>();
        Ok(Some(windows.map_err(WeightsError::from)?))
    }

    /// Keeps the states.
    pub(super) fn store(&self, states: &[Tensor]) -> Result<(), Error> {
        let mut data = Vec::new();
        for state in states {
            let values = state.to_vec().map_err(WeightsError::from)?;
            data.extend(values.into_iter().flat_map(f32::to_le_bytes));
        }
        let hidden = data.len() / 4 / (self.windows * self.tokens).max(1);
        let shape = [self.windows, self.tokens, hidden];
        let header = Header {
            format: FORMAT,
            key: self.key.clone(),
            shape,
            sha256: hexadecimal(&Sha256::digest(&data)),
        };
        let written = kept::write_with(&self.path, |out| {
            serde_json::to_writer(&mut *out, &header)?;
            out.write_all(b"\n")?;
            out.write_all(&data)
        });
        written.map_err(|error| Error::cache(&self.path, &error, true))
    }
}
