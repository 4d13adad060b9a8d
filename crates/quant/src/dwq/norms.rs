//! Weights of norms, which are trained beside the grids where bits are few: float32 masters of what the file stores.

use mlx_format::FloatType;
use mlx_format::checkpoint::Writer;
use mlx_quant_engine::{Result as EngineResult, Tensor};
use mlx_quant_model::decoder::Norm;
use mlx_quant_model::{Weights, WeightsError};

use super::DwqSettings;
use super::grids::{self, Grid};
use crate::Error;
use crate::walks::Walk;

/// Norms are trained where weights of the trained layers of blocks have so many bits at most, on average.
const BITS: f64 = 3.5;

/// A norm's weight: what is stored, which is `w - 1` in some families.
#[derive(Clone, Debug)]
pub(super) struct NormWeight {
    /// Of the tensor.
    pub(super) name: String,
    pub(super) block: usize,
    /// dtype of the stored weight.
    float: FloatType,
    /// What the norm multiplies with, less what is stored.
    offset: f64,
    /// Any shape.
    pub(super) weights: Tensor,
    /// Adam's first and second moment; as `weights`.
    pub(super) moments: [Tensor; 2],
}

impl NormWeight {
    /// As it is stored.
    fn open(
        (name, block): (String, usize),
        norm: &Norm,
        float: FloatType,
        walk: &Walk<'_>,
    ) -> Result<Self, Error> {
        let found = walk.weights.load_some(&name, &walk.device, |one| one == name)?;
        let weights = found.tensor(&name).map_err(WeightsError::from)?.clone();
        let zeros = Tensor::full(0.0, weights.dims(), &walk.device).map_err(WeightsError::from)?;
        let offset = if norm.plus_one { 1.0 } else { 0.0 };
        Ok(Self { name, block, float, offset, weights, moments: [zeros.clone(), zeros] })
    }

    /// What the norm multiplies with, which gives the unit of a step.
    pub(super) fn factors(&self) -> EngineResult<Tensor> {
        if self.offset == 0.0 { Ok(self.weights.clone()) } else { &self.weights + self.offset }
    }

    /// In the stored dtype.
    pub(super) fn stored(&self) -> EngineResult<Tensor> {
        // A grid of scales alone.
        let [stored, _] = self.weights.device().stored_grid(&self.weights, &self.weights, 0.0, self.float)?;
        Ok(stored)
    }

    /// Whether all of it can be stored.
    pub(super) fn is_finite(&self) -> EngineResult<bool> {
        self.stored()?.read(|numbers| numbers.iter().all(|number| number.is_finite()))
    }

    /// In its place among the output.
    pub(super) fn write(&self, writer: &Writer) -> Result<(), Error> {
        grids::put(writer, &self.name, &self.stored().map_err(WeightsError::from)?, self.float)
    }
}

/// Tensors of a norm's weight.
fn names(norm: &Norm, weights: &Weights<'_>) -> Vec<String> {
    let Some(path) = &norm.path else { return Vec::new() };
    let name = |head: usize| format!("{}.weight", path.replace("{head}", &head.to_string()));
    // Without heads in the path all names are one.
    let heads = if path.contains("{head}") { usize::MAX } else { 1 };
    (0..heads).map(name).take_while(|name| weights.shape(name).is_some()).collect()
}

/// Norms that can be trained: of blocks, each where its tensor stands among its block's; with each its tensor and the
/// block.
fn trainable<'w>(walk: &'w Walk<'_>) -> impl Iterator<Item = (String, &'w Norm, usize)> {
    walk.decoder.blocks.iter().enumerate().flat_map(|(index, block)| {
        let own = block.norms().into_iter();
        let all = own.flat_map(|norm| names(norm, &walk.weights).into_iter().map(move |name| (name, norm)));
        all.filter(|(name, _)| name.starts_with(&block.prefix)).map(move |(name, norm)| (name, norm, index))
    })
}

/// Whether norms are trained beside these grids.
fn wanted(settings: &DwqSettings, walk: &Walk<'_>, grids: &[Grid]) -> bool {
    let of_blocks = || grids.iter().filter(|grid| walk.decoder.in_block(&grid.path));
    let codes: u64 = of_blocks().map(Grid::codes).sum();
    let bits: u64 = of_blocks().map(|grid| grid.codes() * u64::from(grid.scheme.bits())).sum();
    settings.norms.unwrap_or(codes > 0 && bits as f64 <= BITS * codes as f64)
}

/// The norms that are trained beside these grids, none where bits are many.
///
/// # Errors
/// A weight that is not finite; no room on the device.
pub(super) fn open(
    settings: &DwqSettings,
    walk: &Walk<'_>,
    grids: &[Grid],
) -> Result<Vec<NormWeight>, Error> {
    if !wanted(settings, walk, grids) {
        return Ok(Vec::new());
    }
    let stored = |(name, norm, block): (String, &Norm, usize)| {
        let float = walk.weights.stored_float(&name)?;
        Some(NormWeight::open((name, block), norm, float, walk))
    };
    trainable(walk).filter_map(stored).collect()
}

/// Bytes that training of all norms takes, best values and slopes included, and what is made of them on the way: in the
/// memory of the engine. Whether they are trained is not asked: it is little.
pub(super) fn bytes(walk: &Walk<'_>) -> u64 {
    let elements = |name: &str| walk.weights.shape(name).map_or(0, |shape| shape.iter().product::<usize>());
    trainable(walk).map(|(name, ..)| elements(&name) as u64 * 4 * 6).sum()
}
