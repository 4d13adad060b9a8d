//! What walks other than the calibrating one hold on a card, and what all walks are summed up from.

use mlx_quant_engine::Capacity;
use mlx_quant_model::decoder::{Block, Branch, Layer};
use mlx_quant_model::{Producer, Site};
use serde::Serialize;

use crate::Model;
use crate::numbers::bytes;
use crate::walks::{Walk, graph_bytes, largest_weight, tile_rows};

/// Numbers that attention holds as scores at a time, at most (`engine/src/gpu/attention.rs`).
const SCORES: usize = 64 << 20;
/// Tokens of a tile of attention.
const ATTENTION_TILE: usize = 128;
/// Buffers of many sizes are so much larger than what lies in them, on average.
const CLASSES: f64 = 1.07;

/// Sixteenths of a block's bytes in float32 that its layers take while they learn: positions, what they decode to and
/// gradients, 16 each; codes in the beginning and of the best step, 4 each; of 32 weights 9 numbers (scales, ranges,
/// factors, the best factors and what is stored), 5; codes and grids of the block before, which is being written, 5.
const LEARNING: u64 = 3 * 16 + 2 * 4 + 5 + 5;

/// The buffer for a tensor of so many bytes, where few of one size are most of a sum.
pub(super) fn buffer(bytes: u64) -> u64 {
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(256))
}

/// The buffers for tensors of many sizes.
fn buffers(bytes: u64) -> u64 {
    (bytes as f64 * CLASSES) as u64
}

/// What a run holds on a card at most, bytes, where that is largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CardMemory {
    /// What is done then.
    pub part: &'static str,
    /// A block in float32, its readers as they decode, tiles of the head.
    pub weights: u64,
    /// What windows leave between and within blocks, and gradients of that.
    pub activations: u64,
    /// Gram matrices, Hessians and factors.
    pub hessians: u64,
    /// What a batch of windows takes on its way through a block, and what rounding takes.
    pub scratch: u64,
    /// Of all.
    pub peak: u64,
    /// Of the largest tensor of any part.
    pub largest: u64,
}

impl CardMemory {
    /// Of weights and activations as they are, and of the buffers that everything else takes.
    pub(super) fn summed(mut self) -> Self {
        (self.weights, self.activations) = (buffers(self.weights), buffers(self.activations));
        self.peak = self.weights + self.activations + self.hessians + self.scratch;
        self
    }

    /// The larger one, with the largest tensor of both.
    pub(super) fn max(self, other: Self) -> Self {
        let largest = self.largest.max(other.largest);
        let more = if other.peak > self.peak { other } else { self };
        Self { largest, ..more }
    }

    /// What is in the way on a card of such a size; nothing if it fits, as far as the driver tells.
    pub fn obstacle(&self, card: Capacity) -> Option<String> {
        if self.largest > card.largest {
            let (needs, has) = (bytes(self.largest), bytes(card.largest));
            return Some(format!("a tensor of {needs} is needed, and the card's largest has {has}"));
        }
        let has = card.memory.filter(|has| self.peak > *has)?;
        let (needs, has, part) = (bytes(self.peak), bytes(has), self.part);
        Some(format!("{part} needs up to {needs} of the card's memory, it has {has}"))
    }
}

/// Heads of attention.
fn heads(layer: &Layer) -> usize {
    match layer {
        Layer::Attention(attention) => attention.heads,
        Layer::Latent(latent) => latent.heads,
        _ => 0,
    }
}

/// A card to compute on, and what goes there.
pub(super) struct OnCard<'w, 'm> {
    pub(super) walk: &'w Walk<'m>,
    /// Tokens of a window.
    pub(super) tokens: u64,
}

impl OnCard<'_, '_> {
    pub(super) fn shape(&self, path: &str) -> &[usize] {
        self.walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[])
    }

    /// Numbers of a linear, of one expert's where there are several.
    pub(super) fn elements(&self, path: &str) -> u64 {
        self.shape(path).iter().rev().take(2).product::<usize>() as u64
    }

    pub(super) fn hidden(&self) -> u64 {
        self.walk.decoder.hidden_size as u64
    }

    /// Tokens of a batch of so many windows at most.
    pub(super) fn batch(&self, windows: u64) -> u64 {
        (self.walk.batch() as u64).min(windows) * self.tokens
    }

    /// Windows between blocks.
    pub(super) fn states(&self, windows: u64) -> u64 {
        windows * self.tokens * self.walk.state_elements() as u64 * 4
    }

    /// Final hidden states.
    pub(super) fn finals(&self, windows: u64) -> u64 {
        windows * self.tokens * self.hidden() * 4
    }

    pub(super) fn largest_block(&self) -> u64 {
        self.walk.block_bytes().into_iter().max().unwrap_or(0)
    }

    /// Scores of attention that are there at a time, for a batch of `windows`.
    pub(super) fn scores(&self, heads: usize, windows: u64) -> u64 {
        let tokens = self.tokens as usize;
        let row = heads * tokens;
        let tile = (SCORES / row.max(1)).clamp(1, ATTENTION_TILE).min(tokens);
        let together = (SCORES / (row * tile).max(1)).clamp(1, windows.max(1) as usize);
        (row * tile * together * 4) as u64
    }

    /// Numbers that a token has within a branch besides what its linears give: pairs of tokens and experts in their
    /// order, what experts give, and that in the order of tokens; queries, keys and values of latent attention as they
    /// are put together; steps of a convolution; queries, keys and values of linear attention.
    pub(super) fn beside(&self, layer: &Layer) -> u64 {
        match layer {
            Layer::Moe(moe) => 3 * moe.router.top_k as u64 * self.hidden(),
            Layer::Latent(latent) => {
                let (queries, values) = (latent.nope + latent.rope, latent.value);
                (latent.heads * (4 * queries + 2 * values)) as u64
            }
            Layer::Mamba(mamba) => (5 * mamba.convolved() + mamba.values()) as u64,
            Layer::Lightning(attention) => (6 * attention.heads * attention.head_dim) as u64,
            _ => 0,
        }
    }

    /// What a batch of `windows` takes within a branch besides its states: what the linears of its input give, what is
    /// made of that, and what the branch gives.
    pub(super) fn of_branch(&self, branch: &Branch, windows: u64) -> u64 {
        let heads = heads(&branch.layer);
        let (mut given, mut made) = (0, 0);
        for site in branch.sites().iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)) {
            let rows = |path: &str| self.shape(path).iter().rev().nth(1).copied().unwrap_or(0) as u64;
            if matches!(site.producer, Producer::Norm(_) | Producer::Residual) {
                given += site.readers.iter().map(|reader| rows(&reader.path)).sum::<u64>();
            } else {
                let size = self.shape(&site.readers[0].path).last().copied().unwrap_or(0) as u64;
                made = size.max(made);
            }
        }
        let width = given + made + self.hidden() + self.beside(&branch.layer);
        buffers(width * self.batch(windows) * 4) + buffer(self.scores(heads, windows))
    }

    /// Of a block and the next one, which is read while windows pass the first.
    pub(super) fn largest_pair(&self) -> u64 {
        let blocks = self.walk.block_bytes();
        blocks.windows(2).map(|pair| pair.iter().sum()).max().unwrap_or_else(|| self.largest_block())
    }

    /// What a batch of `windows` takes within a block besides its states.
    pub(super) fn within(&self, windows: u64) -> u64 {
        let windows = windows.min(self.walk.batch() as u64);
        let branches = self.walk.decoder.blocks.iter().flat_map(Block::branches);
        branches.map(|branch| self.of_branch(branch, windows)).max().unwrap_or(0)
    }

    /// What the graph of a batch of `windows` takes, with gradients.
    pub(super) fn graph(&self, windows: u64) -> u64 {
        let windows = windows.min(self.walk.batch() as u64);
        let block = |block: &Block| {
            let beside: u64 = block.layers().map(|layer| self.beside(layer)).sum();
            let heads = block.layers().map(heads).max().unwrap_or(0);
            2 * (beside * self.batch(windows) * 4 + self.scores(heads, windows))
        };
        let beside = self.walk.decoder.blocks.iter().map(block).max().unwrap_or(0);
        buffers(graph_bytes(self.walk, self.batch(windows)) + beside)
    }

    /// The largest tensor: of states, of a weight, of what a linear gives.
    pub(super) fn largest(&self, windows: u64) -> u64 {
        let outputs = |site: Site<'_>| {
            let rows =
                site.readers.iter().map(|reader| self.shape(&reader.path).iter().rev().nth(1).copied());
            rows.flatten().max().unwrap_or(0) as u64
        };
        let widest = self.walk.decoder.blocks.iter().flat_map(Block::sites).map(outputs).max().unwrap_or(0);
        let batch = self.batch(windows) * widest.max(self.walk.state_elements() as u64) * 4;
        batch.max(self.walk.largest_tensor() * 4)
    }

    /// Tiles of `heads` heads, and `logits` tiles of logits of a window.
    pub(super) fn head(&self, heads: u64, logits: u64) -> (u64, u64) {
        let rows = tile_rows(&self.walk.device).min(self.walk.decoder.vocabulary) as u64;
        (heads * rows * self.hidden() * 4, logits * buffer(self.tokens * rows * 4))
    }

    /// A forward walk of `windows` windows, with `left` bytes on the card already, and all blocks if they stay.
    pub(super) fn forward(&self, windows: u64, left: u64, stays: bool, part: &'static str) -> CardMemory {
        let wave = (self.walk.wave(self.tokens as usize) as u64).min(windows);
        let held = if stays { self.walk.block_bytes().iter().sum() } else { self.largest_pair() };
        let sum = CardMemory {
            part,
            weights: held,
            activations: left + self.states(wave) + self.finals(windows),
            scratch: self.within(wave),
            largest: self.largest(wave),
            ..CardMemory::default()
        };
        sum.summed()
    }

    /// A backward walk of `windows` windows, with `more` bytes of weights in a block, and what the head takes.
    pub(super) fn backward(&self, windows: u64, more: u64, heads: u64, part: &'static str) -> CardMemory {
        let copies = self.walk.decoder.blocks.len() as u64 + 2;
        let (tiles, logits) = self.head(heads, 6);
        let pair = self.largest_pair() + 2 * more;
        // Gradients of what leaves a block and of what enters it.
        let activations = self.states(windows) * copies + 2 * self.states(windows) + self.finals(windows);
        let sum = |weights, scratch| CardMemory {
            part,
            weights,
            activations,
            scratch,
            largest: self.largest(windows),
            ..CardMemory::default()
        };
        // The next block is read meanwhile; backwards a block's graph is kept.
        let forwards = sum(pair, self.within(windows));
        let backwards = sum(pair.max(tiles), self.graph(windows).max(logits));
        forwards.summed().max(backwards.summed())
    }

    /// A block that learns: in full precision, and what its layers take; all windows in front of it and behind it, in
    /// batches and alone. The next one is read meanwhile.
    pub(super) fn learning(&self, windows: u64, batch: u64) -> CardMemory {
        let together = batch.min(windows);
        // Gradients of a batch beside the sum of those before it.
        let more = if together > self.walk.batch() as u64 { 16 } else { 0 };
        let sum = CardMemory {
            part: "learning",
            weights: self.largest_pair() + self.largest_block() * (LEARNING + more) / 16,
            activations: 5 * self.states(windows) + 2 * self.states(together),
            scratch: self.graph(together),
            largest: self.largest(windows),
            ..CardMemory::default()
        };
        sum.summed()
    }

    /// Codes of dwq's student, where all of them stay on the card.
    pub(super) fn held(&self, model: &Model) -> u64 {
        let blocks: u64 = self.walk.block_bytes().iter().sum();
        let codes = blocks / 4 + 2 * self.elements(self.walk.head_path());
        if crate::dwq::stays(codes, &model.device) { codes } else { 0 }
    }

    /// What dwq's student has on the card besides a block's weights: codes, gradients of the largest weight.
    pub(super) fn trained(&self) -> u64 {
        self.largest_block() / 4 + largest_weight(self.walk)
    }
}
