//! Taking windows through a model, block by block.
//!
//! Every window goes through a block before the next block's weights are read. So memory is the largest block in
//! float32 and the windows' activations, whatever the depth. Where several waves of windows would read blocks again and
//! memory is enough, blocks stay in memory. Threads share out windows; a window's result depends neither on the number
//! of threads nor on the windows beside it.
//!
//! There are three ways through a model: forward, calibrating (site by site) and backward, and the head behind them.
//! What is done on the way is a visitor's business.

mod backward;
pub(crate) mod calibrate;
mod fisher;
mod forward;
mod head;
mod memory;
mod spread;
mod wave;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mlx_quant_engine::{Device, Tensor};
use mlx_quant_model::decoder::{Block, Branch, Layer, Linear};
use mlx_quant_model::{Decoder, Forward, Parameters, State, Tables, Weights, WeightsError};

pub(crate) use self::backward::{Passed, Start, StateGradients, Visit, backward};
pub(crate) use self::fisher::fisher;
pub(crate) use self::forward::{Passing, Trail, finish, forward as forward_walk};
pub(crate) use self::head::{
    Divergence, HeadPass, Teacher, Top, divergence, joined, sum_of, tile_rows, tiles,
};
pub(crate) use self::memory::{a_token, attention, backward_bytes, graph_bytes, largest_weight, tile_bytes};
pub(crate) use self::spread::{each, in_turn};
pub(crate) use self::wave::Wave;
use crate::data::Windows;
use crate::device::card_bytes;
use crate::observer::{Event, Observer};
use crate::{Error, Model};

/// Activations that a wave of windows may hold between blocks, bytes.
const WAVE_BYTES: usize = 512 << 20;
/// What windows may leave in front of all blocks in memory, bytes.
const TRAIL_BYTES: usize = 512 << 20;
/// And the part of a card's memory: blocks are brought there once for all windows, not once for a few.
const TRAIL_PART: u64 = 8;

/// A head stays on a card if it takes this part of its memory at most.
const HEAD_PART: u64 = 16;

/// Rows of scores that attention holds at a time.
const ATTENTION_ROWS: usize = 256;

/// Bytes that a matrix product packs for each thread.
const MATMUL_BYTES: u64 = 4 << 20;

/// Whether weights stay in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All blocks, in float32.
    Resident,
    /// One block at a time, read again for each wave of windows.
    Streaming,
}

impl Residency {
    /// What suits so many waves: blocks stay in memory only where several would read them again.
    pub(crate) const fn of(low_memory: bool, waves: usize) -> Self {
        if low_memory || waves < 2 { Self::Streaming } else { Self::Resident }
    }
}

/// A model that windows can be taken through.
#[derive(Debug)]
pub struct Walk<'m> {
    /// Its weights.
    pub weights: Weights<'m>,
    /// Its description.
    pub decoder: Decoder,
    /// Where it computes.
    pub device: Device,
    residency: Residency,
    blocks: Vec<OnceLock<Arc<Parameters>>>,
    /// Tiles of the head by their rows, where they stay on a card.
    head: Option<Mutex<BTreeMap<(usize, usize), Parameters>>>,
    tables: Mutex<Option<Tables>>,
}

impl<'m> Walk<'m> {
    /// Reads headers only. Streams until told otherwise.
    ///
    /// # Errors
    /// If the model type has no decoder description, or weights and config do not fit together.
    pub fn open(model: &'m Model) -> Result<Self, Error> {
        let weights = model.weights()?;
        let decoder = weights.decoder(&model.config, model.allow_unread)?;
        let blocks = decoder.blocks.iter().map(|_| OnceLock::new()).collect();
        Ok(Self {
            weights,
            decoder,
            device: model.device.clone(),
            residency: Residency::Streaming,
            blocks,
            head: None,
            tables: Mutex::default(),
        })
    }

    /// On another device than the model's.
    #[must_use]
    pub(crate) fn on(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Whether blocks stay in memory from now on.
    #[must_use]
    pub fn with(mut self, residency: Residency) -> Self {
        self.residency = residency;
        self
    }

    /// Lets the head stay on a card that has room for it: for walks that pass it many times.
    pub(crate) fn with_head_kept(mut self) -> Self {
        self.head = self.keeps_head().then(Mutex::default);
        self
    }

    /// Whether the whole head takes little of a card's memory.
    pub(crate) fn keeps_head(&self) -> bool {
        self.device.is_card() && self.head_bytes() <= card_bytes(&self.device) / HEAD_PART
    }

    /// Bytes of the head in float32.
    pub(crate) fn head_bytes(&self) -> u64 {
        let shape = self.weights.shape(&format!("{}.weight", self.head_path())).unwrap_or(&[]);
        shape.iter().product::<usize>() as u64 * 4
    }

    /// What suits these windows.
    pub fn residency(&self, low_memory: bool, windows: &Windows) -> Residency {
        let waves = windows.picked.len().div_ceil(self.wave(windows.sequence_length));
        Residency::of(low_memory, waves)
    }

    /// A block's weights in float32.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn block(&self, index: usize) -> Result<Arc<Parameters>, Error> {
        let load = || -> Result<_, Error> {
            Ok(Arc::new(self.weights.load(&self.decoder.blocks[index].prefix, &self.device)?))
        };
        if self.residency == Residency::Streaming {
            return load();
        }
        match self.blocks[index].get() {
            Some(parameters) => Ok(parameters.clone()),
            None => Ok(self.blocks[index]
                .get_or_init({
                    let loaded = load()?;
                    || loaded
                })
                .clone()),
        }
    }

    /// The module whose rows are the head's: its own, or the table that it is tied to.
    pub fn head_path(&self) -> &str {
        self.decoder.head.linear.as_ref().map_or(&self.decoder.embedding.path, |linear| &linear.path)
    }

    /// Rows of the head, under the name of its module.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn head_tile(&self, rows: std::ops::Range<usize>) -> Result<Parameters, Error> {
        let known = || self.head.as_ref().map(|tiles| tiles.lock().unwrap_or_else(PoisonError::into_inner));
        let own = (rows.start, rows.end);
        if let Some(tile) = known().and_then(|tiles| tiles.get(&own).cloned()) {
            return Ok(tile);
        }
        let tile = self.weights.load_tile(self.head_path(), rows, &self.device)?;
        self.weights.release();
        if let Some(mut tiles) = known() {
            tiles.insert(own, tile.clone());
        }
        Ok(tile)
    }

    /// Weights of what follows the last block before the head: the last norm's, mostly.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn last_norm(&self) -> Result<Parameters, Error> {
        let mut last = Parameters::default();
        for module in self.decoder.last_modules() {
            last.extend(self.weights.module(module, &self.device)?);
        }
        Ok(last)
    }

    /// Windows that are computed as one tensor. Sums over windows take a batch as what its first window brings, so that
    /// batches begin at multiples of it.
    pub fn batch(&self) -> usize {
        self.device.batch().max(1)
    }

    /// Windows in one wave: as many as fit into the memory for activations between blocks.
    pub fn wave(&self, tokens: usize) -> usize {
        (WAVE_BYTES / (self.state_elements() * tokens * 4).max(1)).max(1)
    }

    /// Windows that leave what stands in front of every block in memory together: whole batches, so that bits do not depend
    /// on how many these are.
    pub(crate) fn trail(&self, tokens: usize, threads: usize, low_memory: bool) -> usize {
        let window = self.state_elements() * tokens * 4 * (self.decoder.blocks.len() + 1);
        let whole = |windows: usize| (windows / self.batch()).max(1) * self.batch();
        if low_memory {
            return whole(threads);
        }
        let card = card_bytes(&self.device) / TRAIL_PART;
        let room = TRAIL_BYTES.max(usize::try_from(card).unwrap_or(usize::MAX));
        whole((room / window.max(1)).max(threads))
    }

    /// Bytes of every block in float32.
    pub fn block_bytes(&self) -> Vec<u64> {
        self.decoder.blocks.iter().map(|block| self.weights.float_bytes(&block.prefix)).collect()
    }

    /// Bytes that a thread holds within a block, about: inputs and outputs of the linears of its largest branch.
    pub fn scratch_bytes(&self, tokens: usize) -> u64 {
        let rows = |linear: &Linear| {
            let shape = self.weights.shape(&format!("{}.weight", linear.path)).unwrap_or(&[]);
            shape.iter().rev().nth(1).copied().unwrap_or(0)
        };
        let block = |block: &Block| {
            let branch = |branch: &Branch| {
                let routed = match &branch.layer {
                    Layer::Moe(moe) => moe.router.top_k,
                    _ => 1,
                };
                let sites = branch.sites();
                let own = sites.iter().filter(|site| site.expert.is_none_or(|expert| expert < routed));
                let width: usize = own.flat_map(|site| &site.readers).map(|linear| rows(linear)).sum();
                // The product of gate and up, or attention's output, is as wide as one of them.
                width + width / 2 + 4 * self.decoder.hidden_size
            };
            block.branches().map(branch).max().unwrap_or(0)
        };
        let width = self.decoder.blocks.iter().map(block).max().unwrap_or(0);
        (width * tokens * 4 + ATTENTION_ROWS * tokens * 4) as u64 + MATMUL_BYTES
    }

    /// Numbers of the largest tensor of any block; stacked experts are one.
    pub(crate) fn largest_tensor(&self) -> u64 {
        let sizes = self.weights.shapes().filter(|(name, _)| self.decoder.in_block(name));
        sizes.map(|(_, shape)| shape.iter().product::<usize>() as u64).max().unwrap_or(0)
    }

    /// Numbers of float32 that a token holds between blocks.
    pub fn state_elements(&self) -> usize {
        let per_layer = self.decoder.embedding.per_layer.as_ref();
        self.decoder.stream_count() * self.decoder.hidden_size
            + per_layer.map_or(0, |inputs| inputs.width * self.decoder.blocks.len())
    }

    /// Final hidden states `[tokens, hidden]` (after the last norm) of windows of one length, in their order.
    ///
    /// `pool` gives the threads. Reports [`Event::Working`] for each block and [`Event::Progress`] in windows times
    /// blocks, `done` of which lie before this call.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if the observer asks to stop; otherwise what is wrong with a weight.
    pub fn hidden(
        &self,
        windows: &[&[u32]],
        pool: &rayon::ThreadPool,
        observer: &dyn Observer,
        done: &mut u64,
    ) -> Result<Vec<Tensor>, Error> {
        let tokens = windows.first().map_or(0, |window| window.len());
        let forward = self.forward(tokens)?;
        let mut hidden = Vec::with_capacity(windows.len());
        for wave in windows.chunks(self.wave(tokens)) {
            let states = self.embed(&forward, wave)?;
            let mut told = Told { walk: self, observer, windows: wave.len() as u64, done };
            let load = |index| self.block(index);
            let blocks = self.decoder.blocks.len();
            let states = forward::forward(&forward, blocks, &load, states, &mut told, (pool, observer))?;
            hidden.extend(forward::finish(&forward, &self.last_norm()?, &states, pool)?);
        }
        Ok(hidden)
    }

    /// A forward pass over windows of `tokens` tokens; rotary tables are made once for a length.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn forward(&self, tokens: usize) -> Result<Forward<'_>, Error> {
        let mut known = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let tables = match &*known {
            Some(tables) if tables.tokens() == tokens => tables.clone(),
            _ => Tables::new(&self.decoder, tokens, &self.device).map_err(WeightsError::from)?,
        };
        *known = Some(tables.clone());
        Ok(Forward::with_tables(&self.decoder, tables, &self.device))
    }

    /// States of windows in front of the first block, in batches of [`Walk::batch`].
    ///
    /// # Errors
    /// If a token lies outside the vocabulary or a weight is damaged.
    pub(crate) fn embed(&self, forward: &Forward<'_>, windows: &[&[u32]]) -> Result<Vec<State>, Error> {
        let embed = |batch: &[&[u32]]| Ok::<_, Error>(forward.embed(&self.weights, batch)?);
        let states = windows.chunks(self.batch()).map(embed).collect();
        self.weights.release();
        states
    }
}

/// Tells an observer how windows pass.
struct Told<'t, 'm> {
    walk: &'t Walk<'m>,
    observer: &'t dyn Observer,
    windows: u64,
    done: &'t mut u64,
}

impl Passing for Told<'_, '_> {
    fn before(&mut self, index: usize) {
        let name = self.walk.decoder.blocks[index].prefix.trim_end_matches('.');
        self.observer.event(Event::Working { name });
    }

    fn passed(&mut self, _: usize, _: Vec<State>) {
        *self.done += self.windows;
        self.observer.event(Event::Progress { done: *self.done });
    }
}
