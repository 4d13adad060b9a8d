//! Where windows wait between blocks, a batch of them together: in memory, or in files alone.
//!
//! In both cases every batch's state behind a finished block lies in a file of its own, with which an interrupted run
//! goes on. Where all of them are small, or lie in files alone, that is the last finished block; otherwise they are
//! saved by the clock: a card passes a block in a second or two, and what leaves it can be gigabytes. The files of a
//! block are complete before the block counts as done. Those that were saved before are kept until the next ones are
//! written, so that a file that cannot be read any more costs what was done between two savings and not everything.
//! Another engine may have had batches of another size: their files are then put together, or apart.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mlx_quant_engine::{Device, Tensor};
use mlx_quant_model::{State, WeightsError};
use rayon::prelude::*;

use crate::observer::{Event, Observer};
use crate::{Error, kept};

/// When states that are held in memory are saved in files as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saving {
    /// Behind every block where all states together have at most so many bytes.
    pub(crate) small: u64,
    /// Otherwise behind a block that ends so long after the last time.
    pub(crate) every: Duration,
}

/// How windows are shared out to batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batches {
    /// Windows of this member's.
    pub(crate) windows: usize,
    /// Windows of members before it, whole batches of any size.
    pub(crate) before: usize,
    /// Windows of a batch; the last one may have fewer.
    pub(crate) size: usize,
}

/// Sizes that batches have on any engine.
const SIZES: [usize; 5] = [1, 2, 4, 8, 16];

impl Batches {
    fn count(self) -> usize {
        self.windows.div_ceil(self.size)
    }

    /// The file of a batch behind so many blocks. The names of all begin with `files`.
    fn file(self, files: &Path, block: usize, batch: usize) -> PathBuf {
        let size = if self.size == 1 { String::new() } else { format!("x{}", self.size) };
        let mut name = files.as_os_str().to_owned();
        let batch = self.before / self.size + batch;
        name.push(format!("{block}-{batch}{size}.safetensors"));
        PathBuf::from(name)
    }

    /// Whether the files of all batches are there.
    fn are_there(self, files: &Path, block: usize) -> bool {
        (0..self.count()).all(|batch| self.file(files, block, batch).is_file())
    }
}

/// States of all batches, in front of a block.
#[derive(Debug)]
pub(crate) struct States {
    /// Blocks they have passed.
    block: usize,
    batches: Batches,
    saving: Saving,
    /// Of all states.
    bytes: u64,
    /// Blocks behind which states lie in files, the first one first.
    saved: Vec<usize>,
    saved_at: Instant,
    /// Whether states that leave the block that is under way are saved.
    saves: bool,
    /// Whether that is decided here.
    alone: bool,
    /// Beginning of the names of the files.
    files: PathBuf,
    /// `None`: in files alone.
    held: Option<Vec<Option<State>>>,
    /// No window travels, because all statistics are known.
    still: bool,
    /// The engine that gets states that are read from files.
    device: Device,
}

fn missing() -> Error {
    WeightsError::Tensor(mlx_quant_engine::Error::msg("a window is under way")).into()
}

fn save(path: &Path, state: &State) -> Result<(), Error> {
    let arrays = kept::from_tensors(state.tensors()).map_err(WeightsError::from)?;
    kept::store(path, &arrays).map_err(|error| Error::state(path, &error))
}

fn load(path: &Path, device: &Device) -> Result<State, Error> {
    let tensors = kept::load(path).map_err(|error| Error::state(path, &error))?;
    let tensors = kept::to_tensors(tensors, device).map_err(|error| Error::state(path, &error))?;
    State::from_tensors(tensors).ok_or_else(|| Error::state(path, &"tensors are missing"))
}

impl States {
    fn empty(batches: Batches, files: PathBuf, spill: bool, saving: Saving, device: &Device) -> Self {
        Self {
            block: 0,
            batches,
            saving,
            bytes: 0,
            saved: Vec::new(),
            saved_at: Instant::now(),
            saves: true,
            alone: true,
            files,
            held: if spill { None } else { Some(vec![None; batches.count()]) },
            still: false,
            device: device.clone(),
        }
    }

    /// In front of the first block. With `spill` states are kept in files alone. Names of files begin with `files`.
    pub(crate) fn new(
        batches: Batches,
        files: PathBuf,
        spill: bool,
        saving: Saving,
        device: &Device,
        state: impl Fn(usize) -> Result<State, Error>,
    ) -> Result<Self, Error> {
        let mut own = Self::empty(batches, files, spill, saving, device);
        for batch in 0..batches.count() {
            let state = state(batch)?;
            if batch == 0 {
                let elements: usize = state.tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum();
                own.bytes = (4 * elements * batches.count()) as u64;
            }
            // They are soon made again.
            if own.saves_always() {
                save(&own.file(0, batch), &state)?;
            }
            if let Some(held) = &mut own.held {
                held[batch] = Some(state);
            }
        }
        own.saved.extend(own.saves_always().then_some(0));
        Ok(own)
    }

    /// Whether what leaves the next block is to be saved.
    pub(crate) fn are_due(&self) -> bool {
        self.saves_always() || self.saved_at.elapsed() >= self.saving.every
    }

    /// Lets somebody else decide so from now on, block by block.
    pub(crate) fn save_next(&mut self, saves: bool) {
        (self.alone, self.saves) = (false, saves);
    }

    fn saves_always(&self) -> bool {
        self.held.is_none() || self.bytes <= self.saving.small
    }

    /// What an interrupted run left: the states behind as many blocks as possible, at most `most`. The observer is told
    /// of files that are there and cannot be read.
    pub(crate) fn resume(
        batches: Batches,
        files: PathBuf,
        spill: bool,
        most: usize,
        (saving, device): (Saving, &Device),
        observer: &dyn Observer,
    ) -> Option<Self> {
        let mut own = Self::empty(batches, files, spill, saving, device);
        let left = |block| {
            let of = |size| Batches { size, ..batches };
            let other = || SIZES.into_iter().map(of).find(|other| other.are_there(&own.files, block));
            Some(batches).filter(|own_size| own_size.are_there(&own.files, block)).or_else(other)
        };
        let mut left: Vec<_> = (0..=most).filter_map(|block| Some((block, left(block)?))).collect();
        while let Some((block, found)) = left.pop() {
            own.block = block;
            match own.regroup(found).and_then(|()| own.read_all(spill)) {
                Ok(held) => {
                    own.held = held;
                    let length = |batch| own.file(block, batch).metadata().map_or(0, |file| file.len());
                    own.bytes = (0..batches.count()).map(length).sum();
                    let same = left.into_iter().filter(|(_, found)| *found == batches);
                    own.saved = same.map(|(block, _)| block).chain([block]).collect();
                    return Some(own);
                }
                Err(error) => {
                    let why = error.to_string();
                    let why = why.split("; hint").next().unwrap_or_default();
                    let text = format!("{why}; what left the last of {block} finished blocks is lost");
                    observer.event(Event::Warning { text: &text });
                }
            }
        }
        None
    }

    /// Makes files of own batches out of those of batches of another size, which then go.
    fn regroup(&self, left: Batches) -> Result<(), Error> {
        if left == self.batches {
            return Ok(());
        }
        let (mut waiting, mut made) = (Vec::new(), 0);
        for batch in 0..left.count() {
            let state = load(&left.file(&self.files, self.block, batch), &self.device)?;
            waiting.extend(apart(&state).map_err(WeightsError::from)?);
            while waiting.len() >= self.batches.size || (batch + 1 == left.count() && !waiting.is_empty()) {
                let next: Vec<State> = waiting.drain(..self.batches.size.min(waiting.len())).collect();
                save(&self.file(self.block, made), &together(&next).map_err(WeightsError::from)?)?;
                made += 1;
            }
        }
        self.sync()?;
        (0..left.count()).try_for_each(|batch| remove(&left.file(&self.files, self.block, batch)))
    }

    /// Lets names of files reach the disk.
    fn sync(&self) -> Result<(), Error> {
        let directory = self.files.parent().unwrap_or(Path::new("."));
        kept::sync_directory(directory).map_err(|error| Error::state(directory, &error))
    }

    /// Reads the states of all batches, because a power failure may have cut files off; keeps them unless states stay
    /// in files alone.
    fn read_all(&self, spill: bool) -> Result<Option<Vec<Option<State>>>, Error> {
        let states = (0..self.batches.count()).map(|batch| load(&self.file(self.block, batch), &self.device));
        if spill {
            let mut states = states;
            return states.try_for_each(|state| state.map(drop)).map(|()| None);
        }
        Ok(Some(states.map(|state| state.map(Some)).collect::<Result<_, _>>()?))
    }

    /// No windows, in front of a block: for runs that have all statistics. Nothing is kept in files.
    pub(crate) fn still(files: PathBuf, block: usize, device: &Device) -> Self {
        let saving = Saving { small: 0, every: Duration::ZERO };
        let batches = Batches { windows: 0, before: 0, size: 1 };
        Self { block, still: true, ..Self::empty(batches, files, true, saving, device) }
    }

    /// How names of files begin.
    pub(crate) fn files(&self) -> &Path {
        &self.files
    }

    /// Whether no window travels.
    pub(crate) fn is_still(&self) -> bool {
        self.still
    }

    /// Batches.
    pub(crate) fn len(&self) -> usize {
        self.batches.count()
    }

    /// Blocks they have passed.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    fn file(&self, block: usize, batch: usize) -> PathBuf {
        self.batches.file(&self.files, block, batch)
    }

    /// A copy of the state of one batch.
    pub(crate) fn get(&self, batch: usize) -> Result<State, Error> {
        match &self.held {
            None => load(&self.file(self.block, batch), &self.device),
            Some(held) => held[batch].clone().ok_or_else(missing),
        }
    }

    /// Copies of the states of all batches.
    pub(crate) fn all(&self) -> Result<Vec<State>, Error> {
        (0..self.len()).map(|batch| self.get(batch)).collect()
    }

    /// Takes out the states of all batches.
    pub(crate) fn take_all(&mut self) -> Result<Vec<State>, Error> {
        match &mut self.held {
            None => (0..self.len()).map(|batch| self.get(batch)).collect(),
            Some(held) => held.iter_mut().map(|state| state.take().ok_or_else(missing)).collect(),
        }
    }

    /// Puts back states that have passed the block, from batch `first` on, the first ones first. [`States::passed`]
    /// follows when all have.
    pub(crate) fn put(&mut self, first: usize, states: Vec<State>) -> Result<(), Error> {
        let next = self.block + 1;
        if first == 0 && self.alone {
            self.saves = self.are_due();
        }
        if self.saves {
            let old = &self.saved[..self.saved.len().saturating_sub(1)];
            states.par_iter().enumerate().try_for_each(|(at, state)| {
                let batch = first + at;
                save(&self.file(next, batch), state)?;
                // As much room as the new one has taken.
                old.iter().try_for_each(|block| remove(&self.file(*block, batch)))
            })?;
            self.sync()?;
        }
        if let Some(held) = &mut self.held {
            held[first..].iter_mut().zip(states).for_each(|(place, state)| *place = Some(state));
        }
        Ok(())
    }

    /// Whether what leaves the block that was just passed lies in files: then the block may count as done.
    pub(crate) fn is_saved(&self) -> bool {
        self.still || self.saves
    }

    /// All windows have passed the block, and what was made of it is written.
    pub(crate) fn passed(&mut self) {
        self.block += 1;
        if self.saves {
            self.saved.drain(..self.saved.len().saturating_sub(1));
            self.saved.push(self.block);
            self.saved_at = Instant::now();
        }
    }
}

/// The windows of a batch, each alone.
pub(crate) fn apart(state: &State) -> mlx_quant_engine::Result<Vec<State>> {
    let windows = state.hidden.dim(0)?;
    let window = |window| {
        let part = |(name, tensor): (String, Tensor)| Ok((name, tensor.narrow(0, window, 1)?));
        let tensors: Vec<_> =
            state.tensors().into_iter().map(part).collect::<mlx_quant_engine::Result<_>>()?;
        State::from_tensors(tensors).ok_or_else(|| mlx_quant_engine::Error::msg("tensors are missing"))
    };
    (0..windows).map(window).collect()
}

/// Windows as one batch.
pub(crate) fn together(windows: &[State]) -> mlx_quant_engine::Result<State> {
    let mut parts: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for (name, tensor) in windows.iter().flat_map(State::tensors) {
        parts.entry(name).or_default().push(tensor);
    }
    let joined = |(name, parts): (String, Vec<Tensor>)| Ok((name, Tensor::cat(&parts, 0)?));
    let tensors: Vec<_> = parts.into_iter().map(joined).collect::<mlx_quant_engine::Result<_>>()?;
    State::from_tensors(tensors).ok_or_else(|| mlx_quant_engine::Error::msg("tensors are missing"))
}

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::state(path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
