//! The model that learns: codes from the file, scales and centers from where the walk computes, one block at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mlx_format::Mode;
use mlx_quant_engine::{Codes, Device, Held, Tensor, by_group};
use mlx_quant_model::decoder::Block;
use mlx_quant_model::{Parameters, Reader, WeightsError};

use super::DwqSettings;
use super::grids::{Grid, Slopes};
use super::norms::{self, NormWeight};
use crate::device::card_bytes;
use crate::walks::Walk;
use crate::{Error, Model};

/// Codes stay on a card if they take this part of its memory at most.
const HELD: u64 = 4;

/// Whether so many codes stay on a card.
pub(crate) fn stays(codes: u64, device: &Device) -> bool {
    codes <= card_bytes(device) / HELD
}

/// Layers of so many bits are as good as the original.
const TRAINED_BELOW: u32 = 8;

/// A linear whose scales and centers have gradients.
#[derive(Debug)]
struct Trained {
    /// One an expert.
    experts: Vec<(Arc<Codes>, [Tensor; 2])>,
}

impl Reader for Trained {
    fn read(
        &self,
        x: &Tensor,
        expert: Option<usize>,
        bias: Option<&Tensor>,
    ) -> mlx_quant_engine::Result<Tensor> {
        let (codes, [scales, centers]) = &self.experts[expert.unwrap_or(0)];
        x.device().packed_linear(x, codes, scales, centers, bias)
    }
}

/// Variables of a block.
#[derive(Default)]
pub(super) struct Variables {
    /// Grid, scales and centers. Experts of a grid stand in their order.
    pub(super) grids: Vec<(usize, [Tensor; 2])>,
    pub(super) norms: NormVariables,
}

/// Norms and their weights as they will be stored.
pub(super) type NormVariables = Vec<(usize, Tensor)>;

/// Gradients of a batch with respect to everything that is trained.
pub(super) struct BatchSlopes {
    /// Mean over its windows.
    pub(super) loss: f64,
    /// Of every grid.
    pub(super) grids: Vec<Slopes>,
    /// Of every norm that is trained, as its weights.
    pub(super) norms: Vec<Tensor>,
}

pub(super) struct Student<'m> {
    pub(super) walk: Walk<'m>,
    pub(super) grids: Vec<Grid>,
    /// None where bits are not few.
    pub(super) norms: Vec<NormWeight>,
    by_path: BTreeMap<String, usize>,
    /// Whether all codes stay on the card: they are read once then, not in every step.
    stays: bool,
    /// By path and rows.
    on_card: Mutex<BTreeMap<(String, usize, usize), Held>>,
}

/// Paths of what can be trained: affine linears of blocks, embedding and head below eight bits. With each, whether only
/// the tokens of an expert pass it.
pub(super) fn trainable(walk: &Walk<'_>) -> Vec<(String, bool)> {
    let decoder = &walk.decoder;
    let (mut paths, mut routed) = (BTreeSet::new(), BTreeSet::new());
    for site in decoder.blocks.iter().flat_map(Block::sites) {
        let own = site.readers.iter().map(|reader| &*reader.path);
        paths.extend(own.clone());
        routed.extend(own.filter(|_| site.expert.is_some()));
    }
    paths.insert(walk.head_path());
    paths.insert(&decoder.embedding.path);
    let trained = |path: &str| {
        let scheme = walk.weights.scheme(path);
        scheme.is_some_and(|scheme| scheme.mode() == Mode::Affine && scheme.bits() < TRAINED_BELOW)
    };
    let all = paths.into_iter().filter(|path| trained(path));
    all.map(|path| (path.to_owned(), routed.contains(path))).collect()
}

impl<'m> Student<'m> {
    /// Everything that is trained ([`trainable`], [`norms::open`]), brought to the walk's device.
    pub(super) fn open(model: &'m Model, settings: &DwqSettings) -> Result<Self, Error> {
        let walk = Walk::open(model)?;
        let mut grids = Vec::new();
        for (path, routed) in trainable(&walk) {
            let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]).to_vec();
            let stored = walk.weights.packed_grids(&path);
            walk.weights.release();
            let Some(stored) = stored else { continue };
            let grid = Grid::new(&path, &shape, stored, &walk.device).map_err(WeightsError::from)?;
            grids.push(Grid { routed, ..grid });
        }
        let by_path = grids.iter().enumerate().map(|(at, grid)| (grid.path.clone(), at)).collect();
        let codes: u64 = grids.iter().map(Grid::codes).sum();
        let stays = stays(codes, &walk.device);
        let norms = norms::open(settings, &walk, &grids)?;
        Ok(Self { walk, grids, norms, by_path, stays, on_card: Mutex::default() })
    }

    fn grid(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }

    fn codes(&self, grid: &Grid, rows: Range<usize>) -> Result<Vec<u8>, Error> {
        let packed = self.walk.weights.packed_rows(&grid.path, rows);
        let missing =
            || WeightsError::Tensor(mlx_quant_engine::Error::msg(format!("{} is not packed", grid.path)));
        Ok(packed.ok_or_else(missing)?.codes)
    }

    /// Codes of rows of a grid, which stay on a card that has room for all.
    fn held(&self, grid: &Grid, rows: Range<usize>) -> Result<Held, Error> {
        let key = (grid.path.clone(), rows.start, rows.end);
        let known = || self.on_card.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = known().get(&key) {
            return Ok(held.clone());
        }
        let held = self.walk.device.hold(self.codes(grid, rows)?).map_err(WeightsError::from)?;
        if self.stays {
            known().insert(key, held.clone());
        }
        Ok(held)
    }

    /// Rows of a grid, as they decode now.
    fn decoded(&self, grid: &Grid, rows: Range<usize>) -> Result<Arc<Codes>, Error> {
        let codes = self.held(grid, rows.clone())?;
        let make = || grid.decoded(&codes, &grid.stored(rows)?);
        Ok(make().map_err(WeightsError::from)?)
    }

    /// A block as it decodes now.
    pub(super) fn block(&self, index: usize) -> Result<Arc<Parameters>, Error> {
        let (mut parameters, grids) = self.untrained(index)?;
        for at in grids {
            let grid = &self.grids[at];
            let rows = 0..grid.all_rows();
            let shape = self.walk.weights.shape(&format!("{}.weight", grid.path)).unwrap_or(&[]).to_vec();
            let codes = self.decoded(grid, rows)?;
            let tensor = codes.weight.reshape(shape).map_err(WeightsError::from)?;
            parameters.insert(format!("{}.weight", grid.path), tensor);
        }
        for (at, weights) in self.norms_of(index)? {
            parameters.insert(self.norms[at].name.clone(), weights);
        }
        self.walk.weights.release();
        Ok(Arc::new(parameters))
    }

    /// What of a block is not trained, and its grids.
    fn untrained(&self, index: usize) -> Result<(Parameters, Vec<usize>), Error> {
        let prefix = &self.walk.decoder.blocks[index].prefix;
        let trained = |name: &str| name.strip_suffix(".weight").and_then(|path| self.grid(path));
        let parameters =
            self.walk.weights.load_some(prefix, &self.walk.device, |name| trained(name).is_none())?;
        let grids = self.grids.iter().enumerate().filter(|(_, grid)| grid.path.starts_with(&**prefix));
        Ok((parameters, grids.map(|(at, _)| at).collect()))
    }

    /// A block whose grids have gradients.
    pub(super) fn trained_block(&self, index: usize) -> Result<(Parameters, Variables), Error> {
        let (mut parameters, grids) = self.untrained(index)?;
        let mut variables = Variables::default();
        for at in grids {
            let grid = &self.grids[at];
            let mut experts = Vec::with_capacity(grid.experts);
            for expert in 0..grid.experts {
                let rows = expert * grid.rows..(expert + 1) * grid.rows;
                let one = self.trained_rows(grid, rows)?;
                variables.grids.push((at, one.1.clone()));
                experts.push(one);
            }
            parameters.set_reader(&grid.path, Arc::new(Trained { experts }));
        }
        for (at, weights) in self.norms_of(index)? {
            let variable = weights.variable();
            parameters.insert(self.norms[at].name.clone(), variable.clone());
            variables.norms.push((at, variable));
        }
        self.walk.weights.release();
        Ok((parameters, variables))
    }

    /// Trained norms of a block and their weights as they will be stored.
    fn norms_of(&self, index: usize) -> Result<NormVariables, Error> {
        let own = self.norms.iter().enumerate().filter(|(_, norm)| norm.block == index);
        let stored = own.map(|(at, norm)| Ok((at, norm.stored().map_err(WeightsError::from)?)));
        stored.collect()
    }

    fn trained_rows(&self, grid: &Grid, rows: Range<usize>) -> Result<(Arc<Codes>, [Tensor; 2]), Error> {
        let codes = self.decoded(grid, rows.clone())?;
        let variables = grid.some(rows).map_err(WeightsError::from)?;
        Ok((codes, variables.map(|values| values.variable())))
    }

    /// The grid of the head, if it is trained.
    pub(super) fn head_grid(&self) -> Option<usize> {
        self.grid(self.walk.head_path())
    }

    /// Rows of the head, with variables where they are trained.
    pub(super) fn head_tile(&self, rows: Range<usize>) -> Result<(Parameters, Option<[Tensor; 2]>), Error> {
        let Some(at) = self.head_grid() else { return Ok((self.walk.head_tile(rows)?, None)) };
        let grid = &self.grids[at];
        let (codes, variables) = self.trained_rows(grid, rows.clone())?;
        let mut parameters = Parameters::default();
        // A bias of the head is as it was.
        if self.walk.weights.shape(&format!("{}.bias", grid.path)).is_some() {
            parameters = self.walk.head_tile(rows)?;
        }
        parameters.insert(format!("{}.weight", grid.path), codes.weight.clone());
        parameters.set_reader(&grid.path, Arc::new(Trained { experts: vec![(codes, variables.clone())] }));
        self.walk.weights.release();
        Ok((parameters, Some(variables)))
    }

    /// Lets the embedding give the rows that these tokens need as they decode now.
    pub(super) fn prepare(&mut self, tokens: &BTreeSet<u32>) -> Result<(), Error> {
        let path = self.walk.decoder.embedding.path.clone();
        let Some(at) = self.grid(&path) else { return Ok(()) };
        let grid = &self.grids[at];
        let ids: Vec<u32> = tokens.iter().copied().collect();
        // Codes first: the card is still busy with the step before.
        let row = |token: &u32| self.codes(grid, *token as usize..*token as usize + 1);
        let codes = ids.iter().map(row).collect::<Result<Vec<_>, Error>>()?.concat();
        let decode = || self.walk.device.hold(codes).and_then(|codes| grid.decoded_rows(&ids, &codes));
        self.walk.weights.replace_rows(&path, ids.clone(), decode().map_err(WeightsError::from)?);
        Ok(())
    }

    /// Adds what gradients of the embedding's output (`[tokens, hidden]`, of each window) mean for its grid to the
    /// head's, if both are one table.
    pub(super) fn add_embedding(
        &self,
        windows: &[&[u32]],
        gradients: &[Tensor],
        slopes: &mut [Option<Slopes>],
    ) -> Result<(), Error> {
        let embedding = &self.walk.decoder.embedding;
        let Some(at) = self.grid(&embedding.path) else { return Ok(()) };
        let grid = &self.grids[at];
        self.walk.device.leave("gradients of the embedding's grid", "they are summed by token");
        let groups = grid.groups();
        let mut sums = grid.fetched(slopes[at].as_ref()).map_err(WeightsError::from)?;
        for (tokens, gradient) in windows.iter().zip(gradients) {
            let rows = gradient.to_vec().map_err(WeightsError::from)?;
            for (&token, row) in tokens.iter().zip(rows.chunks_exact(grid.columns.max(1))) {
                let codes = self.codes(grid, token as usize..token as usize + 1)?;
                let row: Vec<f32> = row.iter().map(|value| value * embedding.multiplier as f32).collect();
                let own = by_group(&row, &codes, grid.scheme.group_size(), grid.middle());
                for (sums, own) in sums.iter_mut().zip([own.0, own.1]) {
                    let to = &mut sums[token as usize * groups..][..groups];
                    to.iter_mut().zip(own).for_each(|(to, own)| *to += own);
                }
            }
        }
        slopes[at] = Some(grid.brought(sums).map_err(WeightsError::from)?);
        Ok(())
    }
}
