//! Where windows wait between blocks, a batch of them together: in memory, or in files alone.
//!
//! In both cases every batch's state behind a finished block lies in a file of its own, with which an interrupted run
//! goes on. Where all of them are small, or lie in files alone, that is the last finished block; otherwise they are
//! saved by the clock: a card passes a block in a second or two, and what leaves it can be gigabytes. The files of a
//! block are complete before the block counts as done. Those that were saved before are kept until the next ones are
//! written, so that a file that cannot be read any more costs what was done between two savings and not everything.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mlx_quant_engine::Device;
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

/// States of all batches, in front of a block.
#[derive(Debug)]
pub(crate) struct States {
    /// Blocks they have passed.
    block: usize,
    batches: usize,
    saving: Saving,
    /// Of all states.
    bytes: u64,
    /// Blocks behind which states lie in files, the first one first.
    saved: Vec<usize>,
    saved_at: Instant,
    /// Whether states that leave the block that is under way are saved.
    saves: bool,
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
    fn empty(batches: usize, files: PathBuf, spill: bool, saving: Saving, device: &Device) -> Self {
        Self {
            block: 0,
            batches,
            saving,
            bytes: 0,
            saved: Vec::new(),
            saved_at: Instant::now(),
            saves: true,
            files,
            held: if spill { None } else { Some(vec![None; batches]) },
            still: false,
            device: device.clone(),
        }
    }

    /// In front of the first block. With `spill` states are kept in files alone. Names of files begin with `files`.
    pub(crate) fn new(
        batches: usize,
        files: PathBuf,
        spill: bool,
        saving: Saving,
        device: &Device,
        state: impl Fn(usize) -> Result<State, Error>,
    ) -> Result<Self, Error> {
        let mut own = Self::empty(batches, files, spill, saving, device);
        for batch in 0..batches {
            let state = state(batch)?;
            if batch == 0 {
                let elements: usize = state.tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum();
                own.bytes = (4 * elements * batches) as u64;
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

    fn saves_always(&self) -> bool {
        self.held.is_none() || self.bytes <= self.saving.small
    }

    /// What an interrupted run left: the states behind as many blocks as possible, at most `most`. The observer is told
    /// of files that are there and cannot be read.
    pub(crate) fn resume(
        batches: usize,
        files: PathBuf,
        spill: bool,
        most: usize,
        (saving, device): (Saving, &Device),
        observer: &dyn Observer,
    ) -> Option<Self> {
        let mut own = Self::empty(batches, files, spill, saving, device);
        let begun = |block: &usize| (0..batches).all(|batch| own.file(*block, batch).is_file());
        let saved: Vec<usize> = (0..=most).filter(begun).collect();
        own.saved = saved;
        while let Some(block) = own.saved.last().copied() {
            own.block = block;
            match own.read_all(spill) {
                Ok(held) => {
                    own.held = held;
                    let length = |batch| own.file(block, batch).metadata().map_or(0, |file| file.len());
                    own.bytes = (0..batches).map(length).sum();
                    return Some(own);
                }
                Err(error) => {
                    let why = error.to_string();
                    let why = why.split("; hint").next().unwrap_or_default();
                    let text = format!("{why}; what left the last of {block} finished blocks is lost");
                    observer.event(Event::Warning { text: &text });
                    own.saved.pop();
                }
            }
        }
        None
    }

    /// Reads the states of all batches, because a power failure may have cut files off; keeps them unless states stay
    /// in files alone.
    fn read_all(&self, spill: bool) -> Result<Option<Vec<Option<State>>>, Error> {
        let states = (0..self.batches).map(|batch| load(&self.file(self.block, batch), &self.device));
        if spill {
            let mut states = states;
            return states.try_for_each(|state| state.map(drop)).map(|()| None);
        }
        Ok(Some(states.map(|state| state.map(Some)).collect::<Result<_, _>>()?))
    }

    /// No windows, in front of a block: for runs that have all statistics. Nothing is kept in files.
    pub(crate) fn still(files: PathBuf, block: usize, device: &Device) -> Self {
        let saving = Saving { small: 0, every: Duration::ZERO };
        Self { block, still: true, ..Self::empty(0, files, true, saving, device) }
    }

    /// Whether no window travels.
    pub(crate) fn is_still(&self) -> bool {
        self.still
    }

    pub(crate) fn len(&self) -> usize {
        self.batches
    }

    /// Blocks they have passed.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    fn file(&self, block: usize, batch: usize) -> PathBuf {
        let mut name = self.files.as_os_str().to_owned();
        name.push(format!("{block}-{batch}.safetensors"));
        PathBuf::from(name)
    }

    /// A copy of the state of one batch.
    pub(crate) fn get(&self, batch: usize) -> Result<State, Error> {
        match &self.held {
            None => load(&self.file(self.block, batch), &self.device),
            Some(held) => held[batch].clone().ok_or_else(missing),
        }
    }

    /// Takes out the states of all batches.
    pub(crate) fn take_all(&mut self) -> Result<Vec<State>, Error> {
        match &mut self.held {
            None => (0..self.batches).map(|batch| self.get(batch)).collect(),
            Some(held) => held.iter_mut().map(|state| state.take().ok_or_else(missing)).collect(),
        }
    }

    /// Puts back states that have passed the block, from batch `first` on, the first ones first. [`States::passed`]
    /// follows when all have.
    pub(crate) fn put(&mut self, first: usize, states: Vec<State>) -> Result<(), Error> {
        let next = self.block + 1;
        if first == 0 {
            self.saves = self.saves_always() || self.saved_at.elapsed() >= self.saving.every;
        }
        if self.saves {
            let old = &self.saved[..self.saved.len().saturating_sub(1)];
            states.par_iter().enumerate().try_for_each(|(at, state)| {
                let batch = first + at;
                save(&self.file(next, batch), state)?;
                // As much room as the new one has taken.
                old.iter().try_for_each(|block| remove(&self.file(*block, batch)))
            })?;
            let directory = self.files.parent().unwrap_or(Path::new("."));
            kept::sync_directory(directory).map_err(|error| Error::state(directory, &error))?;
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

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::state(path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use mlx_quant_engine::{Tensor, cpu};

    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl Observer for Told {
        fn event(&self, event: Event<'_>) {
            if let Event::Warning { text } = event {
                self.0.lock().unwrap().push(text.to_owned());
            }
        }
    }

    fn state(value: f32) -> State {
        let hidden = Tensor::full(value, (1, 3, 4), &cpu()).unwrap();
        State::from_tensors([("hidden".to_owned(), hidden)]).unwrap()
    }

    fn value(states: &States, window: usize) -> f32 {
        states.get(window).unwrap().hidden.to_vec().unwrap()[0]
    }

    /// Three windows in front of the first block.
    fn begun(files: &Path, spill: bool, saving: Saving) -> States {
        let state = |window| Ok(state(window as f32));
        States::new(3, files.to_owned(), spill, saving, &cpu(), state).unwrap()
    }

    /// Takes all of them through a block; gives whether what leaves it was saved.
    fn pass(states: &mut States) -> bool {
        let next = states.block() + 1;
        for window in 0..3 {
            states.put(window, vec![state((10 * next + window) as f32)]).unwrap();
        }
        let saved = states.is_saved();
        states.passed();
        saved
    }

    /// Three windows behind `blocks` blocks, and what an observer hears of taking them up again.
    fn resumed(
        blocks: usize,
        spill: bool,
        damage: &[&str],
    ) -> (tempfile::TempDir, Option<States>, Vec<String>) {
        let directory = tempfile::tempdir().unwrap();
        let files = directory.path().join(".state-");
        let saving = Saving { small: 1 << 20, every: Duration::MAX };
        let mut states = begun(&files, spill, saving);
        (0..blocks).for_each(|_| assert!(pass(&mut states)));
        assert!(std::fs::read_dir(directory.path()).unwrap().count() <= 6, "of two blocks at most");
        for name in damage {
            let path = directory.path().join(format!(".state-{name}.safetensors"));
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        }
        let told = Told::default();
        let resumed = States::resume(3, files, spill, blocks, (saving, &cpu()), &told);
        (directory, resumed, told.0.into_inner().unwrap())
    }

    #[test]
    fn goes_on_behind_the_last_block() {
        for spill in [false, true] {
            let (_files, states, told) = resumed(3, spill, &[]);
            let states = states.unwrap();
            assert_eq!((states.block(), told.len()), (3, 0));
            assert_eq!((value(&states, 0), value(&states, 2)), (30.0, 32.0));
        }
    }

    #[test]
    fn an_unreadable_file_costs_one_block_and_is_told() {
        for spill in [false, true] {
            let (_files, states, told) = resumed(3, spill, &["3-1"]);
            let states = states.unwrap();
            assert_eq!((states.block(), value(&states, 2)), (2, 22.0));
            assert!(told.len() == 1 && told[0].contains("3-1.safetensors"), "{told:?}");
            let (_files, states, told) = resumed(3, spill, &["3-1", "2-0"]);
            assert!(states.is_none() && told.len() == 2, "{told:?}");
            // A single block has the beginning behind it.
            let (_files, states, _) = resumed(1, spill, &["1-0"]);
            assert_eq!(states.unwrap().block(), 0);
        }
    }

    /// Large states are saved by the clock, and an interrupted run goes on behind the last block at which they were.
    #[test]
    fn large_states_are_saved_by_the_clock() {
        let directory = tempfile::tempdir().unwrap();
        let files = directory.path().join(".state-");
        let count = || std::fs::read_dir(directory.path()).unwrap().count();
        let never = Saving { small: 0, every: Duration::MAX };
        let mut states = begun(&files, false, never);
        assert!(!pass(&mut states) && !pass(&mut states) && count() == 0);
        let told = Told::default();
        let resume = |most| States::resume(3, files.clone(), false, most, (never, &cpu()), &told);
        assert!(resume(2).is_none() && told.0.lock().unwrap().is_empty());
        states.saving.every = Duration::ZERO;
        assert!(pass(&mut states) && count() == 3);
        states.saving.every = Duration::MAX;
        assert!(!pass(&mut states) && count() == 3);
        let resumed = resume(4).unwrap();
        assert_eq!((resumed.block(), value(&resumed, 1), resumed.saved.clone()), (3, 31.0, vec![3]));
        // Those of two savings stay.
        states.saving.every = Duration::ZERO;
        assert!(pass(&mut states) && count() == 6 && pass(&mut states) && count() == 6);
        assert_eq!((states.saved.clone(), resume(6).unwrap().block()), (vec![5, 6], 6));
        // In files alone they are saved whatever the clock says.
        let mut states = begun(&files, true, never);
        assert!(pass(&mut states) && value(&states, 2) == 12.0);
    }
}
