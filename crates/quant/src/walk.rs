//! Taking windows through a model, block by block.
//!
//! Every window goes through a block before the next block's weights are read, so that one block at a time is enough:
//! memory is the largest block in float32 plus the windows' activations, whatever the depth. Where the whole model fits,
//! blocks stay resident instead and serve all waves of windows. Threads share out windows; a window's result depends on
//! neither.

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};
use mlx_format::checkpoint::Config;
use mlx_quant_model::{Decoder, Forward, Parameters, State, Weights};
use rayon::prelude::*;

use crate::observer::{Event, Observer};
use crate::{Error, Model};

/// Activations that a wave of windows may hold between blocks, bytes.
const WAVE_BYTES: usize = 512 << 20;

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
    /// Reads headers only.
    ///
    /// # Errors
    /// If the model type has no decoder description, or weights and config do not fit together.
    pub fn open(model: &'m Model, residency: Residency) -> Result<Self, Error> {
        Self::of(&model.checkpoint, &model.config, residency)
    }

    fn of(
        checkpoint: &'m mlx_format::checkpoint::Checkpoint,
        config: &Config,
        residency: Residency,
    ) -> Result<Self, Error> {
        let weights = Weights::open(checkpoint, config)?;
        let decoder = weights.decoder(config)?;
        let blocks = decoder.blocks.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { weights, decoder, device: Device::Cpu, residency, blocks })
    }

    /// Sets whether blocks stay in memory.
    pub fn set_residency(&mut self, residency: Residency) {
        self.residency = residency;
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
            None => Ok(self.blocks[index].get_or_init({
                let loaded = load()?;
                || loaded
            }).clone()),
        }
    }

    /// Windows in one wave: with resident weights a few for each thread, streaming as many as memory is meant to hold.
    pub fn wave(&self, tokens: usize, threads: usize) -> usize {
        match self.residency {
            Residency::Resident => 8 * threads.max(1),
            Residency::Streaming => (WAVE_BYTES / (self.state_elements() * tokens * 4).max(1)).max(threads.max(1)),
        }
    }

    /// float32 numbers a token holds between blocks.
    fn state_elements(&self) -> usize {
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
        let forward = Forward::new(&self.decoder, tokens, &self.device).map_err(mlx_quant_model::WeightsError::from)?;
        let mut hidden = Vec::with_capacity(windows.len());
        for wave in windows.chunks(self.wave(tokens, pool.current_num_threads())) {
            let embed = |window: &&[u32]| -> Result<State, Error> { Ok(forward.embed(&self.weights, &[window])?) };
            let mut states = wave.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
            self.weights.release();
            for index in 0..self.decoder.blocks.len() {
                if observer.cancelled() {
                    return Err(Error::Interrupted);
                }
                observer.event(Event::Working { name: self.decoder.blocks[index].prefix.trim_end_matches('.') });
                let parameters = pool.install(|| self.block(index))?;
                let step = |state: State| forward.block(index, &parameters, state, &mut ());
                let stepped = pool.install(|| states.into_par_iter().map(step).collect::<candle_core::Result<Vec<_>>>());
                states = stepped.map_err(mlx_quant_model::WeightsError::from)?;
                *done += wave.len() as u64;
                observer.event(Event::Progress { done: *done });
            }
            let last = match &self.decoder.norm.path {
                Some(path) => self.weights.module(path, &self.device)?,
                None => Parameters::default(),
            };
            for state in &states {
                let last = forward.finish(&last, state).and_then(|hidden| hidden.squeeze(0));
                hidden.push(last.map_err(mlx_quant_model::WeightsError::from)?);
            }
        }
        Ok(hidden)
    }
}
