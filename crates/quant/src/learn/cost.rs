//! What a change of each number that leaves a block costs the model.
//!
//! At the full-precision model a change `d` of what leaves a block costs `KL = 1/2 E[(g . d)^2]` over labels drawn from the model's
//! own distribution, `g` being the gradient of a label's log probability with respect to it (the Fisher metric, as in BRECQ: Li et
//! al. 2021, arXiv 2102.05426, section 3.2, there with gradients of the task). Of that the diagonal is kept, a mean over tokens: a
//! vector for each block, whatever the width. A block that learns with it looks less at features that later norms and weights
//! make little of.

use std::sync::Arc;

use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::{Parameters, WeightsError};

use crate::Error;
use crate::data::Windows;
use crate::observer::{Event, Observer};
use crate::walks::{Passed, StateGradients, Visit, Walk, fisher};

/// Windows that are enough for a mean over tokens.
const WINDOWS: usize = 32;

/// How many of so many windows costs are measured on.
pub(crate) fn measured(windows: usize) -> usize {
    windows.min(WINDOWS)
}

/// For each block what a squared change of each feature that leaves it costs, with a mean of one, `[features]`; empty where no
/// gradient arrives.
///
/// # Errors
/// [`Error::Interrupted`]; what is wrong with a weight.
pub(crate) fn costs(
    walk: &Walk<'_>,
    windows: &Windows,
    (seed, together): (u64, usize),
    (pool, observer): (&rayon::ThreadPool, &dyn Observer),
) -> Result<Vec<Vec<f32>>, Error> {
    let count = measured(windows.picked.len());
    let tokens: Vec<&[u32]> = windows.picked[..count].iter().map(|window| &*window.tokens).collect();
    let mut squares = Squares { walk, observer, sums: vec![Vec::new(); walk.decoder.blocks.len()] };
    let mut first = 0;
    for wave in tokens.chunks(together.max(1)) {
        fisher(walk, wave, (seed, first), &mut Vec::new(), &mut squares, (pool, observer))?;
        first += wave.len();
    }
    Ok(squares.sums.iter().map(|sums| even(sums)).collect())
}

/// With a mean of one.
fn even(sums: &[f64]) -> Vec<f32> {
    let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
    if mean > 0.0 { sums.iter().map(|sum| (sum / mean) as f32).collect() } else { Vec::new() }
}

/// Sums of squared gradients behind blocks, batch after batch.
struct Squares<'s, 'm> {
    walk: &'s Walk<'m>,
    observer: &'s dyn Observer,
    sums: Vec<Vec<f64>>,
}

impl Visit for Squares<'_, '_> {
    type Block = Arc<Parameters>;
    type Batch = ();

    fn before(&mut self, index: usize) {
        let name = self.walk.decoder.blocks[index].prefix.trim_end_matches('.');
        self.observer.event(Event::Working { name });
    }

    fn arrived(&mut self, index: usize, gradients: &[StateGradients]) -> Result<(), Error> {
        let squares = |gradient: &Tensor| -> mlx_quant_engine::Result<Vec<f32>> {
            let features = gradient.dims().last().copied().unwrap_or(1);
            gradient.reshape((REST, features))?.sqr()?.sum(0)?.to_vec()
        };
        for gradient in gradients.iter().filter_map(|gradients| gradients.get("hidden")) {
            let own = squares(gradient).map_err(WeightsError::from)?;
            let sums = &mut self.sums[index];
            sums.resize(own.len(), 0.0);
            sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += f64::from(own));
        }
        Ok(())
    }

    fn batch(&self, _: usize, block: &Self::Block) -> mlx_quant_engine::Result<(Parameters, ())> {
        Ok(((**block).clone(), ()))
    }

    fn passed(&mut self, _: usize, _: Self::Block, _: Vec<Passed<()>>) -> Result<(), Error> {
        Ok(())
    }
}
