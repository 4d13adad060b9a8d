//! The state of a training run in one file, from which an interrupted run goes on to the same bytes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fs_err as fs;
use mlx_quant_model::WeightsError;
use serde::{Deserialize, Serialize};

use super::grids::Grid;
use crate::Error;

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
pub(super) type Best = Vec<[Vec<f32>; 2]>;

pub(super) struct StateFile(pub(super) PathBuf);

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::State { path: path.display().to_string(), reason: error.to_string() }
}

const LEAVES: [&str; 6] = ["scales", "centers", "m.scales", "v.scales", "m.centers", "v.centers"];

impl StateFile {
    pub(super) fn save(&self, journey: &Journey, grids: &[Grid], best: &Best) -> Result<(), Error> {
        let path = &self.0;
        let mut all: HashMap<String, Tensor> = HashMap::new();
        let mut put = |name: String, values: &[f32]| -> candle_core::Result<()> {
            all.insert(name, Tensor::from_slice(values, values.len(), &Device::Cpu)?);
            Ok(())
        };
        let mut fill = || -> candle_core::Result<()> {
            for (grid, best) in grids.iter().zip(best) {
                let [ms, vs, mc, vc] = &grid.moments;
                let own = [&grid.scales, &grid.centers, ms, vs, mc, vc];
                for (leaf, values) in LEAVES.iter().zip(own) {
                    put(format!("{}.{leaf}", grid.path), values)?;
                }
                put(format!("{}.best.scales", grid.path), &best[0])?;
                put(format!("{}.best.centers", grid.path), &best[1])?;
            }
            Ok(())
        };
        fill().map_err(WeightsError::from)?;
        let text = serde_json::to_vec(journey).unwrap_or_default();
        let length = text.len();
        let journey = Tensor::from_vec(text, length, &Device::Cpu).map_err(WeightsError::from)?;
        all.insert("journey".to_owned(), journey);
        let partial = path.with_extension("partial");
        candle_core::safetensors::save(&all, &partial).map_err(|error| failed(path, &error))?;
        fs::File::open(&partial)
            .and_then(|file| file.sync_data())
            .and_then(|()| fs::rename(&partial, path))
            .map_err(|error| failed(path, &error))
    }

    /// `None` if there is none, or one that does not fit.
    pub(super) fn load(&self, grids: &mut [Grid]) -> Result<Option<(Journey, Best)>, Error> {
        if !self.0.is_file() {
            return Ok(None);
        }
        let all =
            candle_core::safetensors::load(&self.0, &Device::Cpu).map_err(|error| failed(&self.0, &error))?;
        let get = |name: &str, length: usize| {
            let values = all.get(name)?.to_vec1::<f32>().ok()?;
            (values.len() == length).then_some(values)
        };
        let journey = all.get("journey").and_then(|text| text.to_vec1::<u8>().ok());
        let Some(journey) = journey.and_then(|text| serde_json::from_slice(&text).ok()) else {
            return Ok(None);
        };
        let mut found = Vec::with_capacity(grids.len());
        for grid in &*grids {
            let own = LEAVES
                .iter()
                .chain(&["best.scales", "best.centers"])
                .map(|leaf| get(&format!("{}.{leaf}", grid.path), grid.scales.len()))
                .collect::<Option<Vec<_>>>();
            let Some(own) = own else { return Ok(None) };
            found.push(own);
        }
        let mut best = Best::with_capacity(grids.len());
        for (grid, own) in grids.iter_mut().zip(found) {
            let mut own = own.into_iter();
            let mut next = || own.next().unwrap_or_default();
            (grid.scales, grid.centers) = (next(), next());
            grid.moments = std::array::from_fn(|_| next());
            best.push([next(), next()]);
        }
        Ok(Some((journey, best)))
    }
}
