//! The state of a training run in one file, from which an interrupted run goes on to the same bytes.

use std::path::PathBuf;

use mlx_format::checkpoint::{Array, Arrays};
use mlx_quant_engine::Tensor;
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};

use super::grids::Grid;
use super::norms::NormWeight;
use super::student::Student;
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

/// Best values.
pub(super) struct Best {
    /// Scales and centers of every grid.
    grids: Vec<[Tensor; 2]>,
    /// Of every norm.
    norms: Vec<Tensor>,
}

impl Best {
    /// What a student has now.
    pub(super) fn of(student: &Student<'_>) -> Self {
        let grids = student.grids.iter().map(|grid| [grid.scales.clone(), grid.centers.clone()]);
        let norms = student.norms.iter().map(|norm| norm.weights.clone());
        Self { grids: grids.collect(), norms: norms.collect() }
    }

    /// Gives them back to the student.
    pub(super) fn restore(self, student: &mut Student<'_>) {
        for (grid, best) in student.grids.iter_mut().zip(self.grids) {
            [grid.scales, grid.centers] = best;
        }
        for (norm, best) in student.norms.iter_mut().zip(self.norms) {
            norm.weights = best;
        }
    }
}

pub(super) struct StateFile(pub(super) PathBuf);

const LEAVES: [&str; 8] =
    ["scales", "centers", "m.scales", "v.scales", "m.centers", "v.centers", "best.scales", "best.centers"];
const NORM_LEAVES: [&str; 4] = ["value", "m", "v", "best"];

/// What a file holds of one grid or norm, in the order of [`LEAVES`] or [`NORM_LEAVES`].
type Leaves<const N: usize> = [Vec<f32>; N];

impl StateFile {
    pub(super) fn save(&self, journey: &Journey, student: &Student<'_>, best: &Best) -> Result<(), Error> {
        let mut all = Arrays::new();
        let mut add = |name: &str, leaf: &str, values: &Tensor| -> Result<(), Error> {
            let values = values.to_vec().map_err(WeightsError::from)?;
            all.insert(format!("{name}.{leaf}"), Array::flat(values));
            Ok(())
        };
        for (grid, [best_scales, best_centers]) in student.grids.iter().zip(&best.grids) {
            let [ms, vs, mc, vc] = &grid.moments;
            let own = [&grid.scales, &grid.centers, ms, vs, mc, vc, best_scales, best_centers];
            for (leaf, values) in LEAVES.iter().zip(own) {
                add(&grid.path, leaf, values)?;
            }
        }
        for (norm, best) in student.norms.iter().zip(&best.norms) {
            let [m, v] = &norm.moments;
            for (leaf, values) in NORM_LEAVES.iter().zip([&norm.weights, m, v, best]) {
                add(&norm.name, leaf, values)?;
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
    pub(super) fn load(
        &self,
        student: &mut Student<'_>,
    ) -> Result<Result<Option<(Journey, Best)>, String>, Error> {
        if !self.0.is_file() {
            return Ok(Ok(None));
        }
        let all = match kept::load(&self.0) {
            Ok(all) => all,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let Some(Found { journey, grids, norms }) = Found::in_file(all, student) else {
            return Ok(Err("it is the state of another training".to_owned()));
        };
        let mut best =
            Best { grids: Vec::with_capacity(grids.len()), norms: Vec::with_capacity(norms.len()) };
        for (grid, own) in student.grids.iter_mut().zip(grids) {
            let [scales, centers, ms, vs, mc, vc, best_scales, best_centers] = brought(&grid.scales, own)?;
            (grid.scales, grid.centers, grid.moments) = (scales, centers, [ms, vs, mc, vc]);
            best.grids.push([best_scales, best_centers]);
        }
        for (norm, own) in student.norms.iter_mut().zip(norms) {
            let [weights, m, v, best_weights] = brought(&norm.weights, own)?;
            (norm.weights, norm.moments) = (weights, [m, v]);
            best.norms.push(best_weights);
        }
        Ok(Ok(Some((journey, best))))
    }
}

/// Leaves to where a tensor of their shape lies.
fn brought<const N: usize>(like: &Tensor, leaves: Leaves<N>) -> Result<[Tensor; N], Error> {
    let mut made = Vec::with_capacity(N);
    for values in leaves {
        made.push(Tensor::from_vec(values, like.dims(), like.device()).map_err(WeightsError::from)?);
    }
    let missing = |_| Error::from(WeightsError::Tensor(mlx_quant_engine::Error::msg("a leaf is missing")));
    made.try_into().map_err(missing)
}

/// What a file holds.
struct Found {
    journey: Journey,
    grids: Vec<Leaves<{ LEAVES.len() }>>,
    norms: Vec<Leaves<{ NORM_LEAVES.len() }>>,
}

impl Found {
    /// If it is this training's.
    fn in_file(mut all: Arrays<'static>, student: &Student<'_>) -> Option<Self> {
        let journey = all.remove("journey").and_then(Array::into_u8)?;
        let journey = serde_json::from_slice(&journey).ok()?;
        let of_grid = |grid: &Grid| taken(&mut all, &grid.path, &LEAVES, grid.scales.elem_count());
        let grids = student.grids.iter().map(of_grid).collect::<Option<_>>()?;
        let of_norm =
            |norm: &NormWeight| taken(&mut all, &norm.name, &NORM_LEAVES, norm.weights.elem_count());
        let norms = student.norms.iter().map(of_norm).collect::<Option<_>>()?;
        all.is_empty().then_some(Self { journey, grids, norms })
    }
}

/// The leaves of one name, each of so many numbers.
fn taken<const N: usize>(
    all: &mut Arrays<'static>,
    name: &str,
    leaves: &[&str; N],
    count: usize,
) -> Option<Leaves<N>> {
    let mut get = |leaf: &&str| {
        let values = all.remove(&format!("{name}.{leaf}")).and_then(Array::into_f32)?;
        (values.len() == count).then_some(values)
    };
    let own: Vec<Vec<f32>> = leaves.iter().map(&mut get).collect::<Option<_>>()?;
    own.try_into().ok()
}
