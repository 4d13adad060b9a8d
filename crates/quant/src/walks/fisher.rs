//! What changes cost at the full-precision model: labels drawn from its own distribution, and their gradients through all blocks.
//!
//! Second moments of these gradients are the Fisher matrix, and half of it is the curvature of KL.

use std::sync::Arc;

use mlx_quant_engine::Tensor;
use mlx_quant_model::Parameters;

use super::Walk;
use super::backward::{Start, Visit, backward};
use super::forward::{Trail, finish, forward};
use super::head::{HeadPass, Sampled, sampled};
use crate::Error;
use crate::observer::Observer;
use crate::reduce::InOrder;

/// Takes windows of one length through the model, draws a label for every token and takes the gradients of their negative log
/// probabilities back; gives those of each window's embedded tokens, `[tokens, hidden]`. `first` is the number of the first
/// window among all; squares with respect to the head's output are added to `rows`, as [`sampled`] says.
pub(crate) fn fisher<V: Visit<Block = Arc<Parameters>> + Send + Sync>(
    walk: &Walk<'_>,
    windows: &[&[u32]],
    (seed, first): (u64, usize),
    rows: &mut Vec<InOrder<Vec<f64>>>,
    visit: &mut V,
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<Vec<Tensor>, Error> {
    let pass = walk.forward(windows.first().map_or(0, |window| window.len()))?;
    let blocks = walk.decoder.blocks.len();
    let states = pool.install(|| walk.embed(&pass, windows))?;
    let load = |index| walk.block(index);
    let mut trail = Trail::default();
    trail.last = forward(&pass, blocks, &load, states, &mut trail, (pool, observer))?;
    let norm = walk.last_norm()?;
    let hidden = finish(&pass, &norm, &trail.last, pool)?;
    visit.turned(&hidden)?;
    let tile = |rows| walk.head_tile(rows);
    let head = HeadPass { forward: &pass, decoder: &walk.decoder, pool };
    let Sampled { gradients } = sampled(head, &tile, &hidden, (seed, first), rows)?;
    drop(hidden);
    let start = Start { trail, norm: &norm, gradients };
    backward(&pass, &walk.weights, windows, start, &load, visit, (pool, observer))
}
