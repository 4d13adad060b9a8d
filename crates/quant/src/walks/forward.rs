//! The forward walk: all windows through a block before the next block is read.

use std::sync::Arc;

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, Parameters, State, WeightsError};

use super::spread::{each, in_turn};
use crate::Error;
use crate::observer::Observer;

/// Gives a block's weights.
pub(crate) type Load<'l> = &'l (dyn Fn(usize) -> Result<Arc<Parameters>, Error> + Sync);

/// The visitor of a forward walk.
pub(crate) trait Passing {
    /// Windows are about to pass block `index`.
    fn before(&mut self, _index: usize) {}

    /// Whether [`Passing::passed`] gets the states in front of blocks.
    fn keeps(&self) -> bool {
        false
    }

    /// All windows have passed block `index`; `inputs` are the states that stood in front of it, if they are asked for.
    fn passed(&mut self, index: usize, inputs: Vec<State>);
}

/// Takes windows through `blocks` blocks and gives what leaves the last one. A window's result depends neither on the
/// number of threads nor on the windows beside it.
pub(crate) fn forward(
    forward: &Forward<'_>,
    blocks: usize,
    load: Load<'_>,
    mut states: Vec<State>,
    passing: &mut dyn Passing,
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<Vec<State>, Error> {
    let load = |index| pool.install(|| load(index));
    in_turn(forward.device(), 0..blocks, &load, |index, parameters| {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        passing.before(index);
        let inputs = if passing.keeps() { states.clone() } else { Vec::new() };
        let step = |state: State| forward.block(index, &parameters, state, &mut ());
        let stepped = each(forward.device(), pool, std::mem::take(&mut states), step);
        states = stepped.map_err(WeightsError::from)?;
        passing.passed(index, inputs);
        Ok(())
    })?;
    Ok(states)
}

/// Final hidden states `[tokens, hidden]` of each window behind the last norm, whose weights are `norm`.
pub(crate) fn finish(
    forward: &Forward<'_>,
    norm: &Parameters,
    states: &[State],
    pool: &rayon::ThreadPool,
) -> Result<Vec<Tensor>, Error> {
    let finish = |state: &State| windows_of(&forward.finish(norm, state)?);
    Ok(each(forward.device(), pool, states, finish).map_err(WeightsError::from)?.concat())
}

/// The windows of a batch `[windows, ..]`.
pub(super) fn windows_of(batch: &Tensor) -> mlx_quant_engine::Result<Vec<Tensor>> {
    (0..batch.dim(0)?).map(|window| batch.get(window)).collect()
}

/// States of all windows in front of each block, and behind the last.
#[derive(Default)]
pub(crate) struct Trail {
    /// `[blocks][batches]`.
    pub(crate) inputs: Vec<Vec<State>>,
    /// `[batches]`.
    pub(crate) last: Vec<State>,
}

impl Passing for Trail {
    fn keeps(&self) -> bool {
        true
    }

    fn passed(&mut self, _: usize, inputs: Vec<State>) {
        self.inputs.push(inputs);
    }
}

/// Forgets what stood in front of blocks.
impl Passing for () {
    fn passed(&mut self, _: usize, _: Vec<State>) {}
}
