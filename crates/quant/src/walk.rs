//! Taking windows through a model, block by block.
//!
//! Every window goes through a block before the next block's weights are read, so that one block at a time is enough:
//! memory is the largest block in float32 plus the windows' activations, whatever the depth. Where the whole model fits,
//! blocks stay resident instead and serve all waves of windows. Threads share out windows; a window's result depends on
//! neither.

use std::sync::{Arc, OnceLock};

use mlx_quant_engine::{Device, Tensor};
use mlx_quant_model::decoder::{Block, Branch, Layer, Linear};
use mlx_quant_model::{Decoder, Forward, Parameters, State, Weights};
use rayon::prelude::*;

use crate::data::Windows;
use crate::observer::{Event, Observer};
use crate::{Error, Model};

/// Activations that a wave of windows may hold between blocks, bytes.
const WAVE_BYTES: usize = 512 << 20;

/// Rows of scores that attention holds at a time.
const ATTENTION_ROWS: usize = 256;

/// What a matrix product packs, per thread.
const MATMUL_BYTES: u64 = 4 << 20;

/// Whether weights stay in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All blocks, in float32.
    Resident,
    /// One block at a time, read again for each wave of windows.
    Streaming,
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
}

impl<'m> Walk<'m> {
    /// Reads headers only. Streams until told otherwise.
    ///
    /// # Errors
    /// If the model type has no decoder description, or weights and config do not fit together.
    pub fn open(model: &'m Model) -> Result<Self, Error> {
        let weights = Weights::open(&model.checkpoint, &model.config)?;
        let decoder = weights.decoder(&model.config, model.allow_unread)?;
        let blocks = decoder.blocks.iter().map(|_| OnceLock::new()).collect();
        Ok(Self {
            weights,
            decoder,
            device: mlx_quant_engine::cpu(),
            residency: Residency::Streaming,
            blocks,
        })
    }

    /// Keeps blocks in memory from now on, or not.
    #[must_use]
    pub fn with(mut self, residency: Residency) -> Self {
        self.residency = residency;
        self
    }

    /// What suits these windows: blocks stay only where several waves would read them again.
    pub fn residency(&self, low_memory: bool, windows: &Windows) -> Residency {
        let waves = windows.picked.len().div_ceil(self.wave(windows.sequence_length));
        if low_memory || waves < 2 { Residency::Streaming } else { Residency::Resident }
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
        let tile = self.weights.load_tile(self.head_path(), rows, &self.device)?;
        self.weights.release();
        Ok(tile)
    }

    /// The last norm's weights.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn last_norm(&self) -> Result<Parameters, Error> {
        match &self.decoder.norm.path {
            Some(path) => Ok(self.weights.module(path, &self.device)?),
            None => Ok(Parameters::default()),
        }
    }

    /// Windows in one wave: as many as activations between blocks may take memory.
    pub fn wave(&self, tokens: usize) -> usize {
        (WAVE_BYTES / (self.state_elements() * tokens * 4).max(1)).max(1)
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
            let stages = block.stages.iter().flat_map(|stage| &stage.branches);
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
            stages.map(branch).max().unwrap_or(0)
        };
        let width = self.decoder.blocks.iter().map(block).max().unwrap_or(0);
        (width * tokens * 4 + ATTENTION_ROWS * tokens * 4) as u64 + MATMUL_BYTES
    }

    /// float32 numbers a token holds between blocks.
    pub fn state_elements(&self) -> usize {
        let per_layer = self.decoder.embedding.per_layer.as_ref();
        self.decoder.hidden_size + per_layer.map_or(0, |inputs| inputs.width * self.decoder.blocks.len())
    }

    /// Final hidden states `[tokens, hidden]` (after the last norm) of windows of one length, in their order.
    ///
    /// `pool` gives the threads. Reports [`Event::Working`] for each block and [`Event::Progress`] in windows times blocks,
    /// `done` of which lie before this call.
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
        let forward =
            Forward::new(&self.decoder, tokens, &self.device).map_err(mlx_quant_model::WeightsError::from)?;
        let mut hidden = Vec::with_capacity(windows.len());
        for wave in windows.chunks(self.wave(tokens)) {
            let embed =
                |window: &&[u32]| -> Result<State, Error> { Ok(forward.embed(&self.weights, &[window])?) };
            let mut states = wave.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
            self.weights.release();
            for index in 0..self.decoder.blocks.len() {
                if observer.cancelled() {
                    return Err(Error::Interrupted);
                }
                observer
                    .event(Event::Working { name: self.decoder.blocks[index].prefix.trim_end_matches('.') });
                let parameters = pool.install(|| self.block(index))?;
                let step = |state: State| forward.block(index, &parameters, state, &mut ());
                let stepped = pool.install(|| {
                    states.into_par_iter().map(step).collect::<mlx_quant_engine::Result<Vec<_>>>()
                });
                states = stepped.map_err(mlx_quant_model::WeightsError::from)?;
                *done += wave.len() as u64;
                observer.event(Event::Progress { done: *done });
            }
            let last = self.last_norm()?;
            for state in &states {
                let last = forward.finish(&last, state).and_then(|hidden| hidden.squeeze(0));
                hidden.push(last.map_err(mlx_quant_model::WeightsError::from)?);
            }
        }
        Ok(hidden)
    }
}
