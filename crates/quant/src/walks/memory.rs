//! What gradients need: memory and arithmetic, from headers alone.

use mlx_quant_model::decoder::{Block, Layer, Linear};

use super::Walk;
use super::head::tile_rows;

/// Experts that a token goes to; 1 where there are none.
fn routed(block: &Block) -> usize {
    let routed = block.layers().find_map(|layer| match layer {
        Layer::Moe(moe) => Some(moe.router.top_k),
        _ => None,
    });
    routed.unwrap_or(1)
}

/// Bytes of a block's graph for a window of `tokens`, about: activations and their gradients.
pub(crate) fn graph_bytes(walk: &Walk<'_>, tokens: u64) -> u64 {
    let rows = |linear: &Linear| {
        let shape = walk.weights.shape(&format!("{}.weight", linear.path)).unwrap_or(&[]);
        shape.iter().rev().nth(1).copied().unwrap_or(0)
    };
    let block = |block: &Block| -> usize {
        let routed = routed(block);
        let sites = block.sites();
        let own = sites.iter().filter(|site| site.expert.is_none_or(|expert| expert < routed));
        let outputs: usize = own.flat_map(|site| &site.readers).map(|linear| rows(linear)).sum();
        // Outputs, what is made of them, and norms and residual sums.
        2 * outputs + 8 * walk.decoder.hidden_size
    };
    walk.decoder.blocks.iter().map(block).max().unwrap_or(0) as u64 * tokens * 4
}

/// Bytes of a backward walk of so many windows `together`, beside a block: what they leave in front of each block, and their
/// gradients; what threads hold, a block's graph each, or a tile of logits.
pub(crate) fn backward_bytes(walk: &Walk<'_>, tokens: u64, together: usize, threads: usize) -> (u64, u64) {
    let state = walk.state_elements() as u64 * 4 * tokens;
    // In front of every block, behind the last, final hidden states, and gradients of before and after.
    let copies = walk.decoder.blocks.len() as u64 + 5;
    let graph = graph_bytes(walk, tokens).max(tile_bytes(walk, tokens));
    // What stands in front of blocks lies on a card that computes; a few windows are on their way.
    let together = if walk.device.is_card() { together.min(threads) } else { together };
    (together as u64 * state * copies, threads.min(together) as u64 * graph)
}

/// Bytes of a tile of logits with what is made of it.
pub(crate) fn tile_bytes(walk: &Walk<'_>, tokens: u64) -> u64 {
    let rows = tile_rows(&walk.device);
    tokens * rows as u64 * 4 * 4 + (rows * walk.decoder.hidden_size * 4 * 3) as u64
}

/// Bytes in float32 of the largest matrix of any block.
pub(crate) fn largest_weight(walk: &Walk<'_>) -> u64 {
    let largest = |block: &Block| walk.weights.largest_matrix(&block.prefix);
    walk.decoder.blocks.iter().map(largest).max().unwrap_or(0) as u64 * 4
}

/// Floating-point operations of a token's attention to those before it, in windows of `tokens`.
pub(crate) fn attention(block: &Block, tokens: usize) -> f64 {
    let width = |layer: &Layer| match layer {
        Layer::Attention(attention) => attention.heads * (attention.head_dim + attention.value_dim),
        Layer::Latent(latent) => latent.heads * (latent.nope + latent.rope + latent.value),
        _ => 0,
    };
    // Scores and values, of half of the window on average.
    block.layers().map(width).sum::<usize>() as f64 * tokens as f64
}

/// Floating-point operations of a token's way through all blocks, in windows of `tokens`, and through the head.
pub(crate) fn a_token(walk: &Walk<'_>, tokens: usize) -> (f64, f64) {
    let matrix = |path: &str| {
        let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]);
        2.0 * shape.iter().rev().take(2).product::<usize>() as f64
    };
    let mut blocks = 0.0;
    for block in &walk.decoder.blocks {
        let routed = routed(block);
        blocks += attention(block, tokens);
        for site in block.sites() {
            if site.expert.is_none_or(|expert| expert < routed) {
                blocks += site.readers.iter().map(|reader| matrix(&reader.path)).sum::<f64>();
            }
        }
    }
    (blocks, matrix(walk.head_path()))
}
