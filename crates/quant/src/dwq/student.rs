//! The model that learns: codes from the file, scales and centers from memory, one block at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mlx_format::Mode;
use mlx_quant_engine::{Codes, Held, Tensor, by_group};
use mlx_quant_model::decoder::Block;
use mlx_quant_model::{Parameters, Reader, WeightsError};

use super::grids::{Grid, Slopes};
use crate::walks::Walk;
use crate::{Error, Model};

/// Codes stay on a card if they take this part of its memory at most.
const HELD: u64 = 4;

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

/// Variables of a block: grid, expert, scales and centers.
pub(super) type Variables = Vec<(usize, usize, [Tensor; 2])>;

pub(super) struct Student<'m> {
    pub(super) walk: Walk<'m>,
    pub(super) grids: Vec<Grid>,
    by_path: BTreeMap<String, usize>,
    /// Whether all codes stay on the card: they are read once then, not in every step.
    stays: bool,
    /// By path and rows.
    on_card: Mutex<BTreeMap<(String, usize, usize), Held>>,
}

impl<'m> Student<'m> {
    /// Everything that can be trained: affine linears of blocks, embedding and head below eight bits.
    pub(super) fn open(model: &'m Model) -> Result<Self, Error> {
        let walk = Walk::open(model)?;
        let decoder = &walk.decoder;
        let (mut paths, mut routed) = (BTreeSet::new(), BTreeSet::new());
        for site in decoder.blocks.iter().flat_map(Block::sites) {
            let own = site.readers.iter().map(|reader| &*reader.path);
            paths.extend(own.clone());
            routed.extend(own.filter(|_| site.expert.is_some()));
        }
        paths.insert(walk.head_path());
        paths.insert(&decoder.embedding.path);
        let mut grids = Vec::new();
        for path in paths {
            let Some(scheme) = walk.weights.scheme(path) else { continue };
            if scheme.mode() != Mode::Affine || scheme.bits() >= TRAINED_BELOW {
                continue;
            }
            let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]).to_vec();
            let stored = walk.weights.packed_grids(path);
            walk.weights.release();
            let routed = routed.contains(path);
            grids.extend(stored.map(|stored| Grid { routed, ..Grid::new(path, &shape, &stored) }));
        }
        let by_path = grids.iter().enumerate().map(|(at, grid)| (grid.path.clone(), at)).collect();
        let codes: u64 = grids.iter().map(Grid::codes).sum();
        let memory = walk.device.capacity().and_then(|capacity| capacity.memory).unwrap_or(0);
        let stays = codes <= memory / HELD;
        Ok(Self { walk, grids, by_path, stays, on_card: Mutex::default() })
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
        let (codes, device) = (self.held(grid, rows.clone())?, &self.walk.device);
        let (scales, biases) = grid.stored_rows(rows.clone());
        let make = || {
            let [scales, biases] = [scales, biases].map(|numbers| {
                let groups = numbers.len() / rows.len().max(1);
                Tensor::from_vec(numbers, (rows.len(), groups), device)
            });
            device.decode(&codes, (grid.scheme.group_size(), grid.middle()), &scales?, &biases?)
        };
        Ok(make().map_err(WeightsError::from)?)
    }

    /// A block as it decodes now.
    pub(super) fn block(&self, index: usize) -> Result<Arc<Parameters>, Error> {
        let (mut parameters, grids) = self.untrained(index)?;
        for at in grids {
            let grid = &self.grids[at];
            let rows = 0..grid.experts * grid.rows;
            let shape = self.walk.weights.shape(&format!("{}.weight", grid.path)).unwrap_or(&[]).to_vec();
            let codes = self.decoded(grid, rows)?;
            let tensor = codes.weight.reshape(shape).map_err(WeightsError::from)?;
            parameters.insert(format!("{}.weight", grid.path), tensor);
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
        let mut variables = Variables::new();
        for at in grids {
            let grid = &self.grids[at];
            let mut experts = Vec::with_capacity(grid.experts);
            for expert in 0..grid.experts {
                let rows = expert * grid.rows..(expert + 1) * grid.rows;
                let one = self.trained_rows(grid, rows)?;
                variables.push((at, expert, one.1.clone()));
                experts.push(one);
            }
            parameters.set_reader(&grid.path, Arc::new(Trained { experts }));
        }
        self.walk.weights.release();
        Ok((parameters, variables))
    }

    fn trained_rows(&self, grid: &Grid, rows: Range<usize>) -> Result<(Arc<Codes>, [Tensor; 2]), Error> {
        let device = &self.walk.device;
        let codes = self.decoded(grid, rows.clone())?;
        let own = rows.start * grid.groups()..rows.end * grid.groups();
        let make = || -> mlx_quant_engine::Result<_> {
            let variable = |all: &[f32]| {
                let values = Tensor::from_slice(&all[own.clone()], (rows.len(), grid.groups()), device)?;
                Ok(values.variable())
            };
            let variables = [variable(&grid.scales)?, variable(&grid.centers)?];
            Ok((codes, variables))
        };
        Ok(make().map_err(WeightsError::from)?)
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
        let mut values = Vec::with_capacity(tokens.len() * self.grids[at].columns);
        for &token in tokens {
            let grid = &self.grids[at];
            let row = token as usize..token as usize + 1;
            values.extend(grid.decoded(row.clone(), &self.codes(grid, row)?));
        }
        self.walk.weights.replace_rows(&path, tokens.iter().copied().collect(), values);
        Ok(())
    }

    /// Adds what the gradient of the embedding's output (`[tokens, hidden]`) means for its grid.
    pub(super) fn add_embedding(
        &self,
        tokens: &[u32],
        gradient: &Tensor,
        slopes: &mut [Slopes],
    ) -> Result<(), Error> {
        let embedding = &self.walk.decoder.embedding;
        let Some(at) = self.grid(&embedding.path) else { return Ok(()) };
        let grid = &self.grids[at];
        gradient.device().leave("gradients of the embedding's grid", "they are summed by token");
        let rows = gradient.to_vec().map_err(WeightsError::from)?;
        let groups = grid.groups();
        for (&token, row) in tokens.iter().zip(rows.chunks_exact(grid.columns.max(1))) {
            let codes = self.codes(grid, token as usize..token as usize + 1)?;
            let row: Vec<f32> = row.iter().map(|value| value * embedding.multiplier as f32).collect();
            let own = by_group(&row, &codes, grid.scheme.group_size(), grid.middle());
            for (leaf, own) in [own.0, own.1].into_iter().enumerate() {
                let to = &mut slopes[at][leaf][token as usize * groups..][..groups];
                to.iter_mut().zip(own).for_each(|(to, own)| *to += own);
            }
        }
        Ok(())
    }
}
