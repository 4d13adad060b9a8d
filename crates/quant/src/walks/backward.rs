//! The backward walk: gradients of all windows through one block after the other, from the last to the first.
//!
//! The forward walk keeps what stands in front of each block and nothing from within; backwards, a block is computed
//! once more, now with gradients, and hands the gradient of its input to the block below (Chen et al. 2016,
//! arXiv 1604.06174, with blocks as segments). Memory is one block's graph for each thread, whatever the depth.

use std::collections::BTreeMap;

use mlx_quant_engine::{Error as EngineError, Gradients, Result as EngineResult, Tensor};
use mlx_quant_model::{Forward, Parameters, State, Weights, WeightsError};

use super::forward::{Trail, windows_of};
use super::spread::{each, in_turn};
use crate::Error;
use crate::observer::Observer;

/// Gradients with respect to a batch's state in front of a block, by the names of [`State::tensors`]. A tensor on
/// which the result does not depend has none.
pub(crate) type StateGradients = BTreeMap<String, Tensor>;

/// The visitor of a backward walk.
pub(crate) trait Visit {
    /// A block's weights, and what is asked of them.
    type Block: Send + Sync;
    /// What one batch of windows notes in a block besides its gradients.
    type Batch: Send;

    /// Windows are about to pass block `index`.
    fn before(&mut self, _index: usize) {}

    /// Windows have reached the end: their final hidden states `[tokens, hidden]`, before gradients come back.
    ///
    /// # Errors
    /// The visitor's.
    fn turned(&mut self, _hidden: &[Tensor]) -> Result<(), Error> {
        Ok(())
    }

    /// What arrives behind block `index`, before windows pass it.
    ///
    /// # Errors
    /// The visitor's.
    fn arrived(&mut self, _index: usize, _gradients: &[StateGradients]) -> Result<(), Error> {
        Ok(())
    }

    /// The block's tensors and readers for one batch of windows.
    fn batch(&self, index: usize, block: &Self::Block) -> EngineResult<(Parameters, Self::Batch)>;

    /// All windows have passed: what each batch of them noted, and gradients of all variables that the block's readers
    /// hold, in the order of the batches.
    fn passed(
        &mut self,
        index: usize,
        block: Self::Block,
        batches: Vec<Passed<Self::Batch>>,
    ) -> Result<(), Error>;
}

/// A batch of windows that has passed a block.
pub(crate) struct Passed<B> {
    /// Its first window, of those of this walk.
    pub(crate) first: usize,
    pub(crate) noted: B,
    pub(crate) gradients: Gradients,
}

/// Where windows are taken back from.
pub(crate) struct Start<'s> {
    /// States in front of each block and behind the last.
    pub(crate) trail: Trail,
    /// The last norm's weights.
    pub(crate) norm: &'s Parameters,
    /// Gradients with respect to the final hidden states of each window.
    pub(crate) gradients: Vec<Tensor>,
}

/// Takes gradients of final hidden states back to the embedding; gives those of each window's embedded tokens,
/// `[tokens, hidden]`. `windows` are the tokens.
/// `load` reads a block.
pub(crate) fn backward<V: Visit + Send + Sync>(
    forward: &Forward<'_>,
    weights: &Weights<'_>,
    windows: &[&[u32]],
    start: Start<'_>,
    load: &(dyn Fn(usize) -> Result<V::Block, Error> + Sync),
    visit: &mut V,
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<Vec<Tensor>, Error> {
    let Start { mut trail, norm, gradients } = start;
    let sizes: Vec<usize> = trail
        .last
        .iter()
        .map(|state| state.hidden.dim(0))
        .collect::<EngineResult<_>>()
        .map_err(WeightsError::from)?;
    let firsts = || sizes.iter().scan(0, |next, size| Some(std::mem::replace(next, *next + size)));
    let batch = |(first, size): (usize, &usize)| Tensor::stack(&gradients[first..first + size], 0);
    let gradients: EngineResult<Vec<Tensor>> = firsts().zip(&sizes).map(batch).collect();
    let gradients = gradients.map_err(WeightsError::from)?;
    let back = |(state, gradient): (&State, &Tensor)| through_norm(forward, norm, state, gradient);
    let ends = trail.last.iter().zip(&gradients);
    let mut gradients = each(forward.device(), pool, ends, back).map_err(WeightsError::from)?;
    trail.last.clear();
    let embedded = trail.inputs.first().cloned().unwrap_or_default();
    let load = |index| pool.install(|| load(index));
    in_turn(forward.device(), (0..trail.inputs.len()).rev(), &load, |index, block| {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        visit.before(index);
        visit.arrived(index, &gradients)?;
        let inputs = trail.inputs.pop().unwrap_or_default();
        let shared: &V = visit;
        let step = |(state, gradients): (&State, &StateGradients)| -> EngineResult<_> {
            let (parameters, noted) = shared.batch(index, &block)?;
            let (own, variables) = through_block(forward, index, &parameters, state, gradients)?;
            Ok((own, (noted, variables)))
        };
        let all = inputs.iter().zip(&gradients);
        let stepped = each(forward.device(), pool, all, step).map_err(WeightsError::from)?;
        let (next, noted): (Vec<_>, Vec<_>) = stepped.into_iter().unzip();
        gradients = next;
        let passed = |(first, (noted, gradients))| Passed { first, noted, gradients };
        visit.passed(index, block, firsts().zip(noted).map(passed).collect())
    })?;
    let mut all = Vec::with_capacity(windows.len());
    for ((first, size), (state, gradients)) in firsts().zip(&sizes).zip(embedded.iter().zip(&gradients)) {
        let batch = through_embedding(forward, weights, &windows[first..first + size], state, gradients)?;
        all.extend(windows_of(&batch).map_err(WeightsError::from)?);
    }
    Ok(all)
}

/// One batch of windows backwards through a block: from gradients of what leaves it to those of what enters it, and of every
/// variable that the block's readers hold.
fn through_block(
    forward: &Forward<'_>,
    index: usize,
    parameters: &Parameters,
    input: &State,
    gradients: &StateGradients,
) -> EngineResult<(StateGradients, Gradients)> {
    let variables: Vec<(String, Tensor)> =
        input.tensors().into_iter().map(|(name, tensor)| (name, tensor.variable())).collect();
    let missing = || EngineError::msg("a state is incomplete");
    let state = State::from_tensors(variables.iter().cloned()).ok_or_else(missing)?;
    let outputs = forward.block(index, parameters, state, &mut ())?.tensors();
    let seeded: Vec<(&Tensor, &Tensor)> =
        outputs.iter().filter_map(|(name, tensor)| Some((tensor, gradients.get(name)?))).collect();
    if seeded.is_empty() {
        return Err(EngineError::msg("no gradient arrives at a block"));
    }
    let all = Tensor::gradients_of(&seeded)?;
    let own = variables.into_iter().filter_map(|(name, variable)| Some((name, all.get(&variable)?.clone())));
    Ok((own.collect(), all))
}

/// The gradient with respect to windows' embedded tokens, `[windows, tokens, hidden]`: what arrives along the residual
/// streams, and by way of the blocks' own inputs, which are made of them too.
fn through_embedding(
    forward: &Forward<'_>,
    weights: &Weights<'_>,
    windows: &[&[u32]],
    embedded: &State,
    gradients: &StateGradients,
) -> Result<Tensor, WeightsError> {
    let missing = || EngineError::msg("no gradient arrives at the embedding");
    if forward.sets_out_as_embedded() {
        return Ok(gradients.get("hidden").ok_or_else(missing)?.clone());
    }
    let tokens = forward.embedded(embedded)?.variable();
    let outset = forward.set_out(weights, windows, &tokens)?.tensors();
    let seeded: Vec<(&Tensor, &Tensor)> =
        outset.iter().filter_map(|(name, tensor)| Some((tensor, gradients.get(name)?))).collect();
    let all = Tensor::gradients_of(&seeded)?;
    Ok(all.get(&tokens).ok_or_else(missing)?.clone())
}

/// From the gradient of final hidden states (after the last norm) to that of the state behind the last block.
fn through_norm(
    forward: &Forward<'_>,
    parameters: &Parameters,
    state: &State,
    gradient: &Tensor,
) -> EngineResult<StateGradients> {
    let hidden = state.hidden.variable();
    let mut input = state.clone();
    input.hidden = hidden.clone();
    let normed = forward.finish(parameters, &input)?;
    let all = normed.gradients(&gradient.reshape(normed.dims())?)?;
    let missing = || EngineError::msg("the last norm passes no gradient");
    let gradient = all.get(&hidden).ok_or_else(missing)?.clone();
    Ok([("hidden".to_owned(), gradient)].into_iter().collect())
}
