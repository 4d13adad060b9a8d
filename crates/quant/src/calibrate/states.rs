//! Where windows wait between blocks: in memory, or in files alone.
//!
//! In both cases every window's state behind the last finished block lies in a file of its own, from which an interrupted run goes
//! on: the files of a block are complete before the block counts as done, and those of the block before go only then.

use std::path::{Path, PathBuf};

use candle_core::Device;
use fs_err as fs;
use mlx_quant_model::{State, WeightsError};
use rayon::prelude::*;

use crate::Error;

/// States of all windows, in front of a block.
#[derive(Debug)]
pub(crate) struct States {
    /// Blocks they have passed.
    block: usize,
    windows: usize,
    /// Beginning of the names of the files.
    files: PathBuf,
    /// `None`: in files alone.
    held: Option<Vec<Option<State>>>,
    /// No window travels: what is known of the blocks is known from elsewhere.
    still: bool,
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::State { path: path.display().to_string(), reason: error.to_string() }
}

fn missing() -> Error {
    WeightsError::Tensor(candle_core::Error::msg("a window is under way")).into()
}

fn save(path: &Path, state: &State) -> Result<(), Error> {
    let partial = path.with_extension("partial");
    let all = state.tensors().into_iter().collect();
    candle_core::safetensors::save(&all, &partial).map_err(|error| failed(path, &error))?;
    let synced = fs::File::open(&partial).and_then(|file| file.sync_data());
    synced.map_err(|error| failed(path, &error))?;
    fs::rename(&partial, path).map_err(|error| failed(path, &error))
}

fn load(path: &Path) -> Result<State, Error> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu);
    let state = State::from_tensors(tensors.map_err(|error| failed(path, &error))?);
    state.ok_or_else(|| failed(path, &"tensors are missing"))
}

impl States {
    /// The beginning; `spill` keeps them in files alone. Names of files begin with `files`.
    pub(crate) fn new(
        windows: usize,
        files: PathBuf,
        spill: bool,
        state: impl Fn(usize) -> Result<State, Error>,
    ) -> Result<Self, Error> {
        let held = if spill { None } else { Some(vec![None; windows]) };
        let mut own = Self { block: 0, windows, files, held, still: false };
        for window in 0..windows {
            let state = state(window)?;
            save(&own.file(0, window), &state)?;
            if let Some(held) = &mut own.held {
                held[window] = Some(state);
            }
        }
        Ok(own)
    }

    /// What an interrupted run left: the states behind as many blocks as possible, at most `most`.
    pub(crate) fn resume(windows: usize, files: PathBuf, spill: bool, most: usize) -> Option<Self> {
        let mut own = Self { block: 0, windows, files, held: None, still: false };
        own.block =
            (0..=most).rev().find(|block| (0..windows).all(|window| own.file(*block, window).is_file()))?;
        let states = (0..windows).map(|window| load(&own.file(own.block, window)).ok());
        if spill {
            // A file that a power failure cut off is noticed now.
            let mut states = states;
            return states.all(|state| state.is_some()).then_some(own);
        }
        own.held = Some(states.map(|state| state.map(Some)).collect::<Option<_>>()?);
        Some(own)
    }

    /// No windows, in front of a block: where all statistics are there. Nothing is kept in files.
    pub(crate) fn still(files: PathBuf, block: usize) -> Self {
        Self { block, windows: 0, files, held: None, still: true }
    }

    /// Whether no window travels.
    pub(crate) fn is_still(&self) -> bool {
        self.still
    }

    pub(crate) fn len(&self) -> usize {
        self.windows
    }

    /// Blocks they have passed.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    fn file(&self, block: usize, window: usize) -> PathBuf {
        let mut name = self.files.as_os_str().to_owned();
        name.push(format!("{block}-{window}.safetensors"));
        PathBuf::from(name)
    }

    /// A copy of one.
    pub(crate) fn get(&self, window: usize) -> Result<State, Error> {
        match &self.held {
            None => load(&self.file(self.block, window)),
            Some(held) => held[window].clone().ok_or_else(missing),
        }
    }

    /// All, which then are not here any more.
    pub(crate) fn take_all(&mut self) -> Result<Vec<State>, Error> {
        match &mut self.held {
            None => (0..self.windows).map(|window| self.get(window)).collect(),
            Some(held) => held.iter_mut().map(|state| state.take().ok_or_else(missing)).collect(),
        }
    }

    /// Some behind the block, from window `first` on. [`States::passed`] follows when all are.
    pub(crate) fn put(&mut self, first: usize, states: Vec<State>) -> Result<(), Error> {
        let next = self.block + 1;
        states
            .par_iter()
            .enumerate()
            .try_for_each(|(at, state)| save(&self.file(next, first + at), state))?;
        if let Some(held) = &mut self.held {
            held[first..].iter_mut().zip(states).for_each(|(place, state)| *place = Some(state));
        }
        Ok(())
    }

    /// All are behind the block, and it is on disk: the files in front of it are needed no more.
    pub(crate) fn passed(&mut self) -> Result<(), Error> {
        self.block += 1;
        for window in 0..self.windows {
            let path = self.file(self.block - 1, window);
            fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
        }
        Ok(())
    }
}
