//! A calibrating walk: weights of blocks, windows within them, Gram matrices and their factors, rounding.

use mlx_quant_model::Producer;
use mlx_quant_model::decoder::Layer;

use super::on_card::{CardMemory, OnCard, buffer};
use crate::methods::Method;
use crate::session::{HEAD_ROWS, QuantizeSettings, aims};
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

impl OnCard<'_, '_> {
    /// A calibrating walk.
    pub(super) fn calibrating(&self, windows: u64, settings: &QuantizeSettings) -> CardMemory {
        let batch = self.walk.batch() as u64;
        let waves = threads_or_all(settings.threads) as u64 * batch;
        let within = if settings.low_memory { waves.min(windows) } else { windows };
        let gptq = matches!(settings.recipe.rounding(), Method::Gptq | Method::Refine);
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
            for site in block.sites().iter().filter(|site| site.expert.is_none_or(|expert| expert == 0)) {
                let size = self.shape(&site.readers[0].path).last().copied().unwrap_or(1) as u64;
                let readers: u64 = site.readers.iter().map(|reader| self.elements(&reader.path)).sum();
                let own =
                    if matches!(site.producer, Producer::Norm(_) | Producer::Residual) { 0 } else { size };
                let pairs = if site.expert.is_some() { routed } else { 0 };
                let state = self.walk.state_elements() as u64 + self.hidden() + own + pairs.max(waiting);
                let square = buffer(size * size * 4);
                let drift = if aims { (1 + sums) * (square + buffer(size * self.hidden() * 4)) } else { 0 };
                // Readers of a site are rounded together, from a copy.
                let rounded = buffer(readers.min(ROUNDED) * 4);
                let together = if site.readers.len() > 1 { buffer(readers * 4) } else { 0 };
                // Weights are scaled and scaled back where factors are folded.
                let rounding = rounding(rounded, size, sweeps) + together + 2 * folds * rounded;
                let factored = if gptq { FACTORED + folds } else { 1 + folds };
                let factor = if gptq { factoring(size) } else { 0 };
                let gathering = self.within(within);
                let parts = held_in_parts(size as usize, chunks, &self.walk.device);
                let gathered = match parts.filter(|_| within == windows) {
                    Some(part) => square + sums * buffer(part as u64 * 4),
                    None => sums.max(2) * square,
                };
                // Windows come, and their sums; where all are held, sums come when they stand there.
                let (with, after) = if within == windows { (0, gathered) } else { (gathered, 0) };
                let moments = [
                    (with, gathering),
                    (after.max((2 + folds) * square), 0),
                    (factored * square, factor),
                    (factored * square, rounding),
                ];
                for (hessians, scratch) in moments {
                    let passed = if within < windows { bytes } else { readers * 4 };
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
