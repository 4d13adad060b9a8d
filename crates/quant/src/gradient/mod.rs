//! Gradients of a model, one block at a time.
//!
//! The forward pass keeps what stands in front of each block and nothing from within; backwards, a block is computed once more, now
//! with gradients, and hands the gradient of its input to the block below (Chen et al. 2016, arXiv 1604.06174, with blocks as
//! segments). Memory is one block's graph for each thread, whatever the depth. Windows are the unit of parallel work and
//! whatever is summed over them is summed in their order, so that results depend neither on threads nor on how many windows
//! are under way together.

mod head;
mod memory;

use std::collections::BTreeMap;
use std::sync::Arc;

use mlx_quant_engine::{Gradients as Store, Tensor};
use mlx_quant_model::{Forward, Parameters, State, Weights, WeightsError};
use rayon::prelude::*;

pub(crate) use self::head::{Divergence, Sampled, Teacher, Top, divergence, sampled, sum_of};
pub(crate) use self::memory::{a_token, attention, graph_bytes, largest_weight, tile_bytes};
use crate::Error;
use crate::observer::Observer;

/// Of a window's state in front of a block, by the names of [`State::tensors`]; what nothing depends on is not there.
pub(crate) type Gradients = BTreeMap<String, Tensor>;

/// Gives a block's weights.
pub(crate) type Load<'l> = &'l (dyn Fn(usize) -> Result<Arc<Parameters>, Error> + Sync);

/// States of all windows in front of each block, and behind the last.
pub(crate) struct Trail {
    /// `[blocks][windows]`.
    pub(crate) inputs: Vec<Vec<State>>,
    /// `[windows]`.
    pub(crate) last: Vec<State>,
}

impl Trail {
    /// Takes windows through all blocks; with `keep`, what stands in front of each stays.
    pub(crate) fn of(
        forward: &Forward<'_>,
        blocks: usize,
        load: Load<'_>,
        mut states: Vec<State>,
        keep: bool,
        pool: &rayon::ThreadPool,
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let mut inputs = Vec::with_capacity(blocks);
        for index in 0..blocks {
            if observer.cancelled() {
                return Err(Error::Interrupted);
            }
            let parameters = pool.install(|| load(index))?;
            let step = |state: &State| forward.block(index, &parameters, state.clone(), &mut ());
            let next: mlx_quant_engine::Result<Vec<State>> =
                pool.install(|| states.par_iter().map(step).collect());
            let passed = std::mem::replace(&mut states, next.map_err(WeightsError::from)?);
            if keep {
                inputs.push(passed);
            }
        }
        Ok(Self { inputs, last: states })
    }
}

/// One window backwards through a block: from gradients of what leaves it to those of what enters it, and of every variable that the
/// block's readers hold.
pub(crate) fn through_block(
    forward: &Forward<'_>,
    index: usize,
    parameters: &Parameters,
    input: &State,
    gradients: &Gradients,
) -> mlx_quant_engine::Result<(Gradients, Store)> {
    let mut variables = Vec::new();
    let mut tensors = Vec::new();
    for (name, tensor) in input.tensors() {
        let variable = tensor.variable();
        tensors.push((name.clone(), variable.clone()));
        variables.push((name, variable));
    }
    let missing = || mlx_quant_engine::Error::msg("a state is incomplete");
    let state = State::from_tensors(tensors).ok_or_else(missing)?;
    let output = forward.block(index, parameters, state, &mut ())?;
    let outputs = output.tensors();
    let seeded: Vec<(&Tensor, &Tensor)> =
        outputs.iter().filter_map(|(name, tensor)| Some((tensor, gradients.get(name)?))).collect();
    if seeded.is_empty() {
        return Err(mlx_quant_engine::Error::msg("no gradient arrives at a block"));
    }
    let store = Tensor::gradients_of(&seeded)?;
    let own =
        variables.into_iter().filter_map(|(name, variable)| Some((name, store.get(&variable)?.clone())));
    Ok((own.collect(), store))
}

/// The gradient with respect to a window's embedded tokens, `[1, tokens, hidden]`: what arrives along the residual stream, and by way of
/// the blocks' own inputs, which are made of them too.
pub(crate) fn through_embedding(
    forward: &Forward<'_>,
    weights: &Weights<'_>,
    window: &[u32],
    embedded: &State,
    gradients: &Gradients,
) -> Result<Tensor, WeightsError> {
    let missing = || mlx_quant_engine::Error::msg("no gradient arrives at the embedding");
    let gradient = gradients.get("hidden").ok_or_else(missing)?;
    let Some(beside) = gradients.get("per_layer") else { return Ok(gradient.clone()) };
    let hidden = embedded.hidden.variable();
    let Some(inputs) = forward.beside(weights, &[window], &hidden)? else {
        return Ok(gradient.clone());
    };
    let store = inputs.gradients(beside)?;
    let more = store.get(&hidden).ok_or_else(missing)?;
    Ok((gradient + more)?)
}

/// From the gradient of final hidden states (after the last norm) to that of the state behind the last block.
pub(crate) fn through_norm(
    forward: &Forward<'_>,
    parameters: &Parameters,
    state: &State,
    gradient: &Tensor,
) -> mlx_quant_engine::Result<Gradients> {
    let hidden = state.hidden.variable();
    let mut input = state.clone();
    input.hidden = hidden.clone();
    let normed = forward.finish(parameters, &input)?;
    let store = normed.gradients(&gradient.reshape(normed.dims())?)?;
    let missing = || mlx_quant_engine::Error::msg("the last norm passes no gradient");
    let gradient = store.get(&hidden).ok_or_else(missing)?.clone();
    Ok([("hidden".to_owned(), gradient)].into_iter().collect())
}
