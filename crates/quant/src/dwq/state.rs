//! The state of a training run in one file, from which an interrupted run goes on to the same bytes.

use std::path::PathBuf;

use mlx_format::checkpoint::{Array, Arrays};
use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};

use super::grids::Grid;
use crate::{Error, kept};

/// How far it came.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Journey {
    /// Steps done.
    pub(super) step: usize,
    /// Divergence on held-out windows at steps, in their order; the first before any step.
    pub(super) held_out: Vec<(usize, f64)>,
    /// Loss of each step.
    pub(super) losses: Vec<f64>,
    /// The step of the best values.
    pub(super) best: usize,
    /// What length of a gradient is usual.
    pub(super) usual: Option<f64>,
    /// Rate, chosen at the beginning.
    pub(super) rate: f64,
    /// Why it ended early.
    pub(super) stopped: Option<String>,
}

impl Journey {
    /// Divergence on held-out windows at a step that was looked at.
    pub(super) fn kl_at(&self, step: usize) -> f64 {
        self.held_out.iter().find(|look| look.0 == step).map_or(f64::NAN, |look| look.1)
    }
}

/// Best values of every grid: scales, centers.
pub(super) type Best = Vec<[Tensor; 2]>;

pub(super) struct StateFile(pub(super) PathBuf);

const LEAVES: [&str; 8] =
    ["scales", "centers", "m.scales", "v.scales", "m.centers", "v.centers", "best.scales", "best.centers"];

/// Values of a grid, in the order of [`LEAVES`].
type Leaves = [Vec<f32>; LEAVES.len()];

impl StateFile {
    pub(super) fn save(&self, journey: &Journey, grids: &[Grid], best: &Best) -> Result<(), Error> {
        let mut all = Arrays::new();
        for (grid, [best_scales, best_centers]) in grids.iter().zip(best) {
            let [ms, vs, mc, vc] = &grid.moments;
            let own = [&grid.scales, &grid.centers, ms, vs, mc, vc, best_scales, best_centers];
            for (leaf, values) in LEAVES.iter().zip(own) {
                let values = values.to_vec().map_err(WeightsError::from)?;
                all.insert(format!("{}.{leaf}", grid.path), Array::flat(values));
            }
        }
        let text = serde_json::to_vec(journey).unwrap_or_default();
        all.insert("journey".to_owned(), Array::flat(text));
        kept::store(&self.0, &all).map_err(|error| Error::state(&self.0, &error))
    }

    /// Where an earlier run came to; `None` if there was none. In words what is wrong with a file that cannot be read or
    /// does not fit.
    ///
    /// # Errors
    /// If the device has no room for it: the file stays as it is.
    pub(super) fn load(&self, grids: &mut [Grid]) -> Result<Result<Option<(Journey, Best)>, String>, Error> {
        if !self.0.is_file() {
            return Ok(Ok(None));
        }
        let all = match kept::load(&self.0) {
            Ok(all) => all,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let Some((journey, found)) = Self::fitting(all, grids) else {
            return Ok(Err("it is the state of another training".to_owned()));
        };
        let mut best = Best::with_capacity(grids.len());
        for (grid, own) in grids.iter_mut().zip(found) {
            let (shape, device) = (grid.scales.dims().to_vec(), grid.scales.device().clone());
            let bring = |values| Tensor::from_vec(values, &*shape, &device).map_err(WeightsError::from);
            let [scales, centers, ms, vs, mc, vc, best_scales, best_centers] = own.map(bring);
            (grid.scales, grid.centers, grid.moments) = (scales?, centers?, [ms?, vs?, mc?, vc?]);
            best.push([best_scales?, best_centers?]);
        }
        Ok(Ok(Some((journey, best))))
    }

    /// What a file holds, if it is this training's.
    fn fitting(mut all: Arrays<'static>, grids: &[Grid]) -> Option<(Journey, Vec<Leaves>)> {
        let journey = all.remove("journey").and_then(Array::into_u8)?;
        let journey = serde_json::from_slice(&journey).ok()?;
        let mut found = Vec::with_capacity(grids.len());
        for grid in grids {
            let mut get = |leaf: &&str| {
                let values = all.remove(&format!("{}.{leaf}", grid.path)).and_then(Array::into_f32)?;
                (values.len() == grid.scales.elem_count()).then_some(values)
            };
            let own: Vec<Vec<f32>> = LEAVES.iter().map(&mut get).collect::<Option<_>>()?;
            found.push(Leaves::try_from(own).ok()?);
        }
        Some((journey, found))
    }
}
