//! How much of a card's memory a run will need, from headers alone.
//!
//! A card holds the weights of a block and of the next one in float32, what windows leave between and within blocks, and
//! what one batch of windows takes on its way; a calibrating walk also Gram matrices, factors and the readers that are rounded. Every walk
//! is summed up by itself, and the largest sum counts. Buffers are up to an eighth larger than what lies in them
//! (`engine/src/gpu/pool.rs`), which is part of each sum.

use mlx_quant_engine::Capacity;
use mlx_quant_model::decoder::{Block, Branch, Layer};
use mlx_quant_model::{Producer, Site};
use serde::Serialize;

use crate::data::Windows;
use crate::dynamic::windows_together;
use crate::evaluate::EvaluationSettings;
use crate::methods::Method;
use crate::numbers::bytes;
use crate::plan::Plan;
use crate::session::{HEAD_ROWS, QuantizeSettings};
use crate::walks::{Residency, Walk, graph_bytes, largest_weight, tile_rows};
use crate::{Error, Model, dwq, reduce, threads_or_all};

/// Numbers that attention holds as scores at a time, at most (`engine/src/gpu/attention.rs`).
const SCORES: usize = 64 << 20;
/// Tokens of a tile of attention.
const ATTENTION_TILE: usize = 128;
/// Numbers of a weight that are rounded at a time (`engine/src/gpu/rounding.rs`).
const ROUNDED: u64 = 64 << 20;
/// Copies of a square matrix while it is factored: Gram matrix, Hessian in the order of rounding, damped, turned, factor,
/// inverse, upper.
const FACTORING: u64 = 7;
/// Of these, what is left when weights are rounded: Gram matrix, damped Hessian, upper factor.
const FACTORED: u64 = 3;
/// Buffers of many sizes are so much larger than what lies in them, on average.
const CLASSES: f64 = 1.07;

/// The buffer for a tensor of so many bytes, where few of one size are most of a sum.
fn buffer(bytes: u64) -> u64 {
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
    fn summed(mut self) -> Self {
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

/// What rounding takes besides a weight of so many bytes and what it decodes to: the weight turned, codes, and these in
/// the weight's own order and packed; with sweeps also the weight before, what it lost and a gradient.
fn rounding(weight: u64, sweeps: bool) -> u64 {
    if sweeps { 5 * weight } else { 13 * weight / 4 }
}

/// Heads of attention.
fn heads(layer: &Layer) -> usize {
    match layer {
        Layer::Attention(attention) => attention.heads,
        Layer::Latent(latent) => latent.heads,
        _ => 0,
    }
}

/// Numbers of a token that wait while linears between a layer's first and last are rounded.
fn waiting_width(layer: &Layer) -> u64 {
    match layer {
        Layer::Latent(latent) => (latent.rank + latent.rope) as u64,
        // q, k and v, decays, b and the vector of the gate.
        Layer::DeltaNet(net) if net.decays_by_feature() => {
            let (keys, values) = (net.key_heads * net.key_dim, net.value_heads * net.value_dim);
            (3 * keys + values + net.value_heads + net.value_dim) as u64
        }
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
    fn shape(&self, path: &str) -> &[usize] {
        self.walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[])
    }

    /// Numbers of a linear, of one expert's where there are several.
    fn elements(&self, path: &str) -> u64 {
        self.shape(path).iter().rev().take(2).product::<usize>() as u64
    }

    fn hidden(&self) -> u64 {
        self.walk.decoder.hidden_size as u64
    }

    /// Tokens of a batch of so many windows at most.
    fn batch(&self, windows: u64) -> u64 {
        (self.walk.batch() as u64).min(windows) * self.tokens
    }

    /// Windows between blocks.
    fn states(&self, windows: u64) -> u64 {
        windows * self.tokens * self.walk.state_elements() as u64 * 4
    }

    /// Final hidden states.
    fn finals(&self, windows: u64) -> u64 {
        windows * self.tokens * self.hidden() * 4
    }

    fn largest_block(&self) -> u64 {
        self.walk.block_bytes().into_iter().max().unwrap_or(0)
    }

    /// Scores of attention that are there at a time, for a batch of `windows`.
    fn scores(&self, heads: usize, windows: u64) -> u64 {
        let tokens = self.tokens as usize;
        let row = heads * tokens;
        let tile = (SCORES / row.max(1)).clamp(1, ATTENTION_TILE).min(tokens);
        let together = (SCORES / (row * tile).max(1)).clamp(1, windows.max(1) as usize);
        (row * tile * together * 4) as u64
    }

    /// Numbers that a token has within a branch besides what its linears give: pairs of tokens and experts in their
    /// order, what experts give, and that in the order of tokens; queries, keys and values of latent attention as they
    /// are put together; steps of a convolution; queries, keys and values of linear attention.
    fn beside(&self, layer: &Layer) -> u64 {
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
    fn of_branch(&self, branch: &Branch, windows: u64) -> u64 {
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
    fn largest_pair(&self) -> u64 {
        let blocks = self.walk.block_bytes();
        blocks.windows(2).map(|pair| pair.iter().sum()).max().unwrap_or_else(|| self.largest_block())
    }

    /// What a batch of `windows` takes within a block besides its states.
    fn within(&self, windows: u64) -> u64 {
        let windows = windows.min(self.walk.batch() as u64);
        let branches = self.walk.decoder.blocks.iter().flat_map(Block::branches);
        branches.map(|branch| self.of_branch(branch, windows)).max().unwrap_or(0)
    }

    /// What the graph of a batch of `windows` takes, with gradients.
    fn graph(&self, windows: u64) -> u64 {
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
    fn largest(&self, windows: u64) -> u64 {
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
    fn head(&self, heads: u64, logits: u64) -> (u64, u64) {
        let rows = tile_rows(&self.walk.device).min(self.walk.decoder.vocabulary) as u64;
        (heads * rows * self.hidden() * 4, logits * buffer(self.tokens * rows * 4))
    }

    /// A calibrating walk.
    fn calibrating(&self, windows: u64, settings: &QuantizeSettings) -> CardMemory {
        let batch = self.walk.batch() as u64;
        let waves = threads_or_all(settings.threads) as u64 * batch;
        let within = if settings.low_memory { waves.min(windows) } else { windows };
        let gptq = matches!(settings.recipe.rounding(), Method::Gptq | Method::Refine);
        let folds = u64::from(settings.recipe.folds());
        let sums = reduce::alive(windows as usize) as u64 + 1;
        let sweeps = gptq && settings.method.sweeps > 0;
        // In full precision, and as they stand in front of the block that learns.
        let taught = if settings.recipe.learns() { 2 * self.states(windows) } else { 0 };
        let mut most = CardMemory::default();
        let all = self.walk.block_bytes();
        for (index, block) in self.walk.decoder.blocks.iter().enumerate() {
            let bytes = all[index];
            // Read while this one works.
            let next = all.get(index + 1).copied().unwrap_or(0);
            let routed = block.layers().map(|layer| match layer {
                Layer::Moe(moe) => 2 * moe.router.top_k as u64,
                _ => 0,
            });
            let routed = routed.max().unwrap_or(0) * self.hidden();
            let waiting = block.layers().map(waiting_width).max().unwrap_or(0);
            for site in block.sites().iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)) {
                let size = self.shape(&site.readers[0].path).last().copied().unwrap_or(1) as u64;
                let readers: u64 = site.readers.iter().map(|reader| self.elements(&reader.path)).sum();
                let own =
                    if matches!(site.producer, Producer::Norm(_) | Producer::Residual) { 0 } else { size };
                let pairs = if site.expert.is_some() { routed } else { 0 };
                let state = self.walk.state_elements() as u64 + self.hidden() + own + pairs.max(waiting);
                let square = buffer(size * size * 4);
                // Readers of a site are rounded together, from a copy.
                let rounded = buffer(readers.min(ROUNDED) * 4);
                let together = if site.readers.len() > 1 { buffer(readers * 4) } else { 0 };
                // Weights are scaled and scaled back where factors are folded.
                let rounding = rounding(rounded, sweeps) + together + 2 * folds * rounded;
                let factored = if gptq { FACTORED + folds } else { 1 + folds };
                let factoring = if gptq { FACTORING + folds } else { 2 + folds };
                let gathering = self.within(within);
                let moments = [
                    (sums.max(2) * square, gathering),
                    (factoring * square, 0),
                    (factored * square, rounding),
                ];
                for (hessians, scratch) in moments {
                    let passed = if within < windows { bytes } else { readers * 4 };
                    // Codes and grids of this block, and of the last one, which is being written.
                    let codes = 5 * bytes / 8;
                    let sum = CardMemory {
                        part: "calibrating",
                        weights: bytes + next + passed + codes,
                        activations: within * self.tokens * 4 * state + taught,
                        hessians,
                        scratch,
                        largest: square.max(self.largest(within)),
                        peak: 0,
                    };
                    most = most.max(sum.summed());
                }
            }
        }
        most.max(self.tables(windows, settings, gptq))
    }

    /// The head or a tied table, whose Gram matrix is of final hidden states.
    fn tables(&self, windows: u64, settings: &QuantizeSettings, gptq: bool) -> CardMemory {
        let square = buffer(self.hidden() * self.hidden() * 4);
        let rows = HEAD_ROWS.min(self.walk.decoder.vocabulary) as u64;
        let tile = buffer(rows * self.hidden() * 4);
        // A tied table comes first, before windows are under way.
        let tied = self.walk.decoder.head.linear.is_none();
        let held = if settings.low_memory || tied { self.walk.batch() as u64 } else { windows };
        let sweeps = gptq && settings.method.sweeps > 0;
        let moments = if gptq {
            [(FACTORING * square, 0), (FACTORED * square, tile + rounding(tile, sweeps))]
        } else {
            [(2 * square, 0), (square, tile + rounding(tile, sweeps))]
        };
        let sum = |(hessians, scratch)| CardMemory {
            part: "rounding the head",
            weights: tile,
            activations: self.states(held) + self.finals(self.walk.batch() as u64),
            hessians,
            scratch,
            largest: tile,
            peak: 0,
        };
        let [one, other] = moments.map(|moment| sum(moment).summed());
        one.max(other)
    }

    /// A forward walk of `windows` windows, with `left` bytes on the card already, and all blocks if they stay.
    fn forward(&self, windows: u64, left: u64, stays: bool, part: &'static str) -> CardMemory {
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
    fn backward(&self, windows: u64, more: u64, heads: u64, part: &'static str) -> CardMemory {
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

    /// A block that learns: in full precision, as it decodes, its gradients; all windows in front of it and behind it, in batches and
    /// alone.
    fn learning(&self, windows: u64, batch: u64) -> CardMemory {
        let together = batch.min(windows);
        let sum = CardMemory {
            part: "learning",
            weights: 2 * self.largest_pair(),
            activations: 5 * self.states(windows) + 2 * self.states(together),
            scratch: self.graph(together),
            largest: self.largest(windows),
            ..CardMemory::default()
        };
        sum.summed()
    }

    /// Codes of dwq's student, where all of them stay on the card.
    fn held(&self, model: &Model) -> u64 {
        let memory = model.device.capacity().and_then(|capacity| capacity.memory).unwrap_or(0);
        let blocks: u64 = self.walk.block_bytes().iter().sum();
        let codes = blocks / 4 + 2 * self.elements(self.walk.head_path());
        if codes <= memory / 4 { codes } else { 0 }
    }

    /// What dwq's student has on the card besides a block's weights: codes, gradients of the largest weight.
    fn trained(&self) -> u64 {
        self.largest_block() / 4 + largest_weight(self.walk)
    }
}

/// What an evaluation holds on the card that `model` computes on; nothing where that is the processor.
///
/// # Errors
/// As [`Walk::open`].
pub fn card_memory_of_evaluation(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
) -> Result<Option<CardMemory>, Error> {
    if !model.device.is_card() {
        return Ok(None);
    }
    let (tokens, count) = (windows.sequence_length as u64, windows.picked.len() as u64);
    let (mut left, mut most, mut tiles) = (0, CardMemory::default(), 0);
    for model in reference.into_iter().chain([model]) {
        let walk = Walk::open(model)?;
        let stays = walk.residency(settings.low_memory, windows) == Residency::Resident;
        let own = OnCard { walk: &walk, tokens };
        most = most.max(own.forward(count, left, stays, "evaluation"));
        let blocks = if stays { walk.block_bytes().iter().sum() } else { 0 };
        left += own.finals(count) + blocks;
        let (tile, logits) = own.head(1, 4);
        tiles += tile;
        let heads = CardMemory {
            part: "evaluation",
            weights: tiles,
            activations: left,
            scratch: logits,
            ..CardMemory::default()
        };
        most = most.max(heads.summed());
    }
    Ok(Some(most))
}

/// What a run that writes `plan`'s output holds on the card that `model` computes on; nothing where that is the processor.
/// With `measured`, dynamic finds its sensitivities in a file.
///
/// # Errors
/// As [`Walk::open`].
pub(super) fn card_memory(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
    measured: bool,
) -> Result<Option<CardMemory>, Error> {
    if !model.device.is_card() {
        return Ok(None);
    }
    let threads = threads_or_all(settings.threads);
    let walk = Walk::open(model)?;
    let own = OnCard { walk: &walk, tokens: windows.sequence_length as u64 };
    let count = windows.picked.len() as u64;
    let mut most = CardMemory::default();
    if settings.recipe.walks() {
        most = most.max(own.calibrating(count, settings));
    }
    if settings.recipe.learns() {
        most = most.max(own.learning(count, settings.learn.batch as u64));
        let measured = crate::learn::measured(windows.picked.len());
        let together = walk.trail(windows.sequence_length, threads, settings.low_memory).min(measured);
        let mut costs = own.backward(together as u64, 0, 1, "learning");
        costs.peak += 2 * own.states(count);
        most = most.max(costs);
    }
    if settings.recipe.allocates() && !measured {
        let together = windows_together(&walk, windows, threads, settings.low_memory) as u64;
        most = most.max(own.backward(together, 0, 1, "sensitivities"));
    }
    if let (true, Some((training, held_out))) = (settings.recipe.trains(), &settings.lessons) {
        let own = OnCard { walk: &walk, tokens: training.sequence_length as u64 };
        let wave = (settings.dwq.batch_size as u64).max(threads as u64);
        let step = (settings.dwq.batch_size as u64).min(training.picked.len() as u64);
        // What stays there from the first step to the last.
        let (codes, grids) = (own.held(model), dwq::grid_bytes(plan));
        let mut steps = own.backward(step, own.trained(), 4, "dwq");
        steps.peak += codes + grids;
        most = most.max(steps);
        let all = (training.picked.len() + held_out.picked.len()) as u64;
        let mut looks = own.forward(wave.min(all), 0, false, "dwq");
        looks.peak += codes + grids;
        most = most.max(looks);
    }
    if let Some(held_out) = &settings.evaluate {
        let quality = EvaluationSettings { threads, low_memory: settings.low_memory, cache: None };
        let measuring = card_memory_of_evaluation(model, Some(model), held_out, &quality)?;
        most = most.max(measuring.unwrap_or_default());
    }
    Ok(Some(most).filter(|most| most.peak > 0))
}

#[cfg(test)]
mod tests;
