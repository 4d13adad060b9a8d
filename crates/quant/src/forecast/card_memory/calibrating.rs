//! A calibrating walk: weights of blocks, windows within them, Gram matrices and their factors, rounding.

use mlx_quant_model::Producer;
use mlx_quant_model::decoder::{Block, Layer};

use super::on_card::{CardMemory, OnCard, buffer};
use crate::session::{HEAD_ROWS, QuantizeSettings, aims, experts_at_once};
use crate::walks::calibrate::held_in_parts;
use crate::{reduce, threads_or_all};

/// Numbers of a weight that are rounded at a time (`engine/src/gpu/rounding.rs`).
const ROUNDED: u64 = 128 << 20;
/// Copies of a square matrix while it is factored (Hessian in the order of rounding and upper factor; before that the Gram
/// matrix and the Hessian), and when weights are rounded. Where notes are asked for, the Gram matrix is held as well.
const FACTORED: u64 = 2;
/// Columns of a block of a sweep (`engine/src/gpu/rounding.rs`).
const SWEPT: u64 = 1024;

/// What rounding takes besides a weight of so many bytes, of `columns`, and what it decodes to: the weight turned, codes,
/// and one of these in the weight's own order, grids; with sweeps what is lost instead, and a block's gradient and
/// changes.
fn rounding(weight: u64, columns: u64, sweeps: bool) -> u64 {
    let block = if sweeps { buffer(weight * SWEPT.min(columns) / columns.max(1)) } else { 0 };
    3 * weight + weight / 8 + 2 * block
}

/// What a square matrix of `size` rows takes while it is factored, besides the matrices: parts of an inverse, a panel
/// (`engine/src/gpu/second_order.rs`).
fn factoring(size: u64) -> u64 {
    2 * buffer((size * size / 16).max(128 * size) * 4) + buffer(64 * size * 4) + buffer(64 * 192 * 4)
}

/// Sums of Gram matrices that are alive at once while so many windows come: one is made of two.
fn sums(windows: u64) -> u64 {
    reduce::alive(windows as usize) as u64 + 1
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

/// Experts of a block's layer.
fn block_experts(block: &Block) -> u64 {
    let count = |layer: &Layer| match layer {
        Layer::Moe(moe) => Some(moe.experts.count() as u64),
        _ => None,
    };
    block.layers().find_map(count).unwrap_or(1)
}

impl OnCard<'_, '_> {
    /// Numbers of a token between the linears of experts that are calibrated at once: what the last ones read.
    fn between_experts(&self, block: &Block, experts: u64) -> u64 {
        let own = |layer: &Layer| match layer {
            Layer::Moe(moe) if experts > 1 => {
                let (mlp, _) = moe.experts.of(0);
                let made = self.shape(&mlp.down.path).last().copied().unwrap_or(0) as u64;
                let (count, all) = (moe.experts.count() as u64, moe.router.top_k as u64);
                // Tokens are not even: the experts of a group may have twice their share.
                (2 * experts * all).div_ceil(count).min(all) * made
            }
            _ => 0,
        };
        block.layers().map(own).max().unwrap_or(0)
    }

    /// A calibrating walk.
    pub(super) fn calibrating(&self, windows: u64, settings: &QuantizeSettings) -> CardMemory {
        let batch = self.walk.batch() as u64;
        let waves = threads_or_all(settings.threads) as u64 * batch;
        let within = if settings.low_memory { waves.min(windows) } else { windows };
        let gptq = settings.recipe.is_second_order();
        let folds = u64::from(settings.recipe.folds());
        let (sums, chunks) = (sums(windows), (windows as usize).div_ceil(reduce::CHUNK));
        let sweeps = gptq && settings.method.sweeps > 0;
        // In full precision, and as they stand in front of the block that learns.
        let aims =
            settings.statistics.is_none() && aims(settings.recipe.rounding(), settings.method.correction);
        let taught = if settings.recipe.learns() {
            2 * self.states(windows)
        } else if aims {
            self.states(windows)
        } else {
            0
        };
        let streams = if aims { 2 } else { 1 };
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
            let sites = block.sites();
            let experts = experts_at_once(self.walk, &sites, gptq && !aims) as u64;
            let between = self.between_experts(block, experts);
            for site in sites.iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)) {
                let size = self.shape(&site.readers[0].path).last().copied().unwrap_or(1) as u64;
                let readers: u64 = site.readers.iter().map(|reader| self.elements(&reader.path)).sum();
                let counted = site.expert.is_some() && between > 0;
                let plain = matches!(site.producer, Producer::Norm(_) | Producer::Residual);
                let own = if plain || counted { 0 } else { size };
                let (pairs, together) = match (site.expert, block_experts(block)) {
                    (Some(_), count) => {
                        let together = experts.min(count);
                        // The last group's experts have given nothing yet.
                        let given = routed / 2 - routed / 2 * together / count.max(1);
                        (routed / 2 + (routed / 2).max(given + between), together)
                    }
                    (None, _) => (0, 1),
                };
                let state = self.walk.state_elements() as u64 + self.hidden() + own + pairs.max(waiting);
                let square = buffer(size * size * 4);
                let drift = if aims { (1 + sums) * (square + buffer(size * self.hidden() * 4)) } else { 0 };
                // Readers of a site are rounded together, from a copy.
                let read = together * readers;
                let rounded = buffer(read.min(ROUNDED) * 4);
                let copy = if site.readers.len() > 1 || together > 1 { buffer(read * 4) } else { 0 };
                // Weights are scaled and scaled back where factors are folded.
                let rounding = rounding(rounded, size, sweeps) + copy + 2 * folds * rounded;
                let factored = if gptq { FACTORED + folds } else { 1 + folds };
                // Several factors are turned into matrices of their own.
                let factoring_of = together * (factoring(size) + if together > 1 { square } else { 0 });
                let factor = if gptq { factoring_of } else { 0 };
                let gathering = self.within(within);
                let parts = held_in_parts(size as usize, chunks, &self.walk.device);
                let gathered = match parts.filter(|_| within == windows) {
                    Some(part) => square + sums * buffer(part as u64 * 4),
                    None if within == windows => (together - 1 + sums.max(2)) * square,
                    None => together * sums.max(2) * square,
                };
                // Windows come, and their sums; where all are held, sums come when they stand there.
                let (with, after) = if within == windows { (0, gathered) } else { (gathered, 0) };
                let moments = [
                    (with, gathering),
                    (after.max((2 + folds) * together * square), 0),
                    (factored * together * square, factor),
                    (factored * together * square, rounding),
                ];
                for (hessians, scratch) in moments {
                    let passed = if within < windows { bytes } else { read * 4 };
                    // Codes and grids of this block, and of the last one, which is being written.
                    let codes = 5 * bytes / 8;
                    let sum = CardMemory {
                        part: "calibrating",
                        weights: bytes + next + passed + codes,
                        activations: within * self.tokens * 4 * state * streams + taught,
                        hessians: hessians + drift,
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
        let rounding = tile + rounding(tile, self.hidden(), sweeps);
        let gathered = sums(if tied { 1 } else { windows }).max(2) * square;
        let moments = if gptq {
            [(gathered.max(FACTORED * square + factoring(self.hidden())), 0), (FACTORED * square, rounding)]
        } else {
            [(gathered, 0), (square, rounding)]
        };
        let sum = |(hessians, scratch)| CardMemory {
            part: "rounding the head",
            // The next rows are read meanwhile.
            weights: 2 * tile,
            activations: self.states(held) + self.finals(self.walk.batch() as u64),
            hessians,
            scratch,
            largest: tile,
            peak: 0,
        };
        let [one, other] = moments.map(|moment| sum(moment).summed());
        one.max(other)
    }
}
