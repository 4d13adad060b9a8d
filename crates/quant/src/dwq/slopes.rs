//! Gradients of a batch with respect to everything that is trained, block by block.

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, Parameters, WeightsError};

use super::grids::Slopes;
use super::norms::NormWeight;
use super::student::{BatchSlopes, Student, Variables};
use super::targets::{Lessons, Part, Targets};
use crate::Error;
use crate::observer::Observer;
use crate::walks::{
    Divergence, HeadPass, Passed, Passing, Start, Trail, Visit, backward, divergence, finish, forward_walk,
    joined, sum_of,
};

/// Trained blocks on the way back: gradients of their grids and norms are gathered.
struct Blocks<'b, 'm> {
    student: &'b Student<'m>,
    /// Of every grid whose block has been passed.
    slopes: &'b mut [Option<Slopes>],
    /// Of every norm that has been passed.
    norms: &'b mut [Option<Tensor>],
}

impl Visit for Blocks<'_, '_> {
    type Block = (Parameters, Variables);
    type Batch = ();

    fn batch(&self, _: usize, block: &Self::Block) -> mlx_quant_engine::Result<(Parameters, ())> {
        Ok((block.0.clone(), ()))
    }

    fn passed(
        &mut self,
        _: usize,
        (_, variables): Self::Block,
        batches: Vec<Passed<()>>,
    ) -> Result<(), Error> {
        let stores = || batches.iter().map(|batch| (batch.first, &batch.gradients));
        for own in variables.grids.chunk_by(|one, other| one.0 == other.0) {
            let at = own[0].0;
            let mut experts: [Vec<Tensor>; 2] = Default::default();
            for (_, variables) in own {
                for (all, variable) in experts.iter_mut().zip(variables) {
                    // Experts are passed by some tokens only; everything else must have its gradient.
                    all.push(sum_of(variable, stores(), self.student.grids[at].routed)?);
                }
            }
            let [scales, centers] = experts.each_ref().map(|all| joined(all));
            self.slopes[at] = scales?.zip(centers?).map(|(scales, centers)| [scales, centers]);
        }
        for (at, variable) in &variables.norms {
            self.norms[*at] = Some(sum_of(variable, stores(), false)?);
        }
        Ok(())
    }
}

/// Takes windows up to their final hidden states, `[tokens, hidden]` each; `keep`: with what stands in front of blocks.
pub(super) fn forward(
    student: &Student<'_>,
    forward: &Forward<'_>,
    windows: &[&[u32]],
    keep: bool,
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<(Trail, Vec<Tensor>), Error> {
    let states = pool.install(|| student.walk.embed(forward, windows))?;
    let blocks = student.walk.decoder.blocks.len();
    let load = |index| student.block(index);
    let mut trail = Trail::default();
    let passing: &mut dyn Passing = if keep { &mut trail } else { &mut () };
    let last = forward_walk(forward, blocks, &load, states, passing, (pool, observer))?;
    let hidden = finish(forward, &student.walk.last_norm()?, &last, pool)?;
    trail.last = if keep { last } else { Vec::new() };
    Ok((trail, hidden))
}

/// Loss of a batch of training windows and its gradient with respect to every grid and norm.
pub(super) fn slopes(
    own: &Student<'_>,
    targets: &Targets<'_>,
    lessons: &Lessons<'_>,
    batch: &[usize],
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<BatchSlopes, Error> {
    let training = lessons.training;
    let windows: Vec<&[u32]> = batch.iter().map(|window| &*training.picked[*window].tokens).collect();
    let decoder = &own.walk.decoder;
    let pass = own.walk.forward(training.sequence_length)?;
    let (trail, hidden) = forward(own, &pass, &windows, true, (pool, observer))?;
    let head = |rows| own.head_tile(rows);
    let temperature = lessons.temperature(Part::Training);
    let sizes = (decoder.vocabulary, training.sequence_length);
    let of_head = targets.with(Part::Training, batch, sizes, |teacher| {
        let pass = HeadPass { forward: &pass, decoder, pool };
        divergence(pass, &head, &hidden, teacher, (temperature, true))
    })?;
    let Divergence { losses, gradients, head } = of_head;
    let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
    drop(hidden);
    let mut slopes: Vec<Option<Slopes>> = vec![None; own.grids.len()];
    let mut norms: Vec<Option<Tensor>> = vec![None; own.norms.len()];
    if let Some(at) = own.head_grid() {
        slopes[at] = head;
    }
    let start = Start { trail, norm: &own.walk.last_norm()?, gradients };
    let mut blocks = Blocks { student: own, slopes: &mut slopes, norms: &mut norms };
    let load = |index| own.trained_block(index);
    let embedded = backward(&pass, &own.walk.weights, &windows, start, &load, &mut blocks, (pool, observer))?;
    own.add_embedding(&windows, &embedded, &mut slopes)?;
    let all = slopes.into_iter().zip(&own.grids);
    let all = all.map(|(slopes, grid)| slopes.map_or_else(|| grid.flat(), Ok));
    let grids = all.collect::<mlx_quant_engine::Result<_>>().map_err(WeightsError::from)?;
    let missing = |norm: &NormWeight| {
        let text = format!("{} has no gradient", norm.name);
        Error::from(WeightsError::Tensor(mlx_quant_engine::Error::msg(text)))
    };
    let all = norms.into_iter().zip(&own.norms);
    let norms = all.map(|(slopes, norm)| slopes.ok_or_else(|| missing(norm)));
    Ok(BatchSlopes { loss, grids, norms: norms.collect::<Result<_, Error>>()? })
}
