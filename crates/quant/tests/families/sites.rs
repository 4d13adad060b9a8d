//! Sites against what the forward pass shows.

use std::path::Path;

use mlx_quant::model::decoder::{Block, Linear};
use mlx_quant::model::{Tap, Weights};
use mlx_quant_engine::{LAST, Result, Tensor};

use crate::{Verdict, model};

/// Readers, by path, and which expert of them.
type Readers = (Vec<String>, Option<usize>);

fn paths(readers: &[&Linear]) -> Vec<String> {
    readers.iter().map(|linear| linear.path.clone()).collect()
}

/// Remembers what it sees, and the columns of it.
#[derive(Default)]
struct Seen(Vec<(Readers, usize)>);

impl Tap for Seen {
    fn see(&mut self, readers: &[&Linear], expert: Option<usize>, input: &Tensor) -> Result<()> {
        self.0.push(((paths(readers), expert), input.dim(LAST)?));
        Ok(())
    }
}

/// A tap sees the sites of every block, each once, in their order; of experts those that got a token. What it
/// sees has as many columns as the weights that read it.
pub(crate) fn a_tap_sees_every_site(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let weights = Weights::open(&model.checkpoint, &model.config).map_err(model::text)?;
    let decoder = weights.decoder(&model.config, false).map_err(model::text)?;
    let windows = model::windows(directory);
    let mut seen = Seen::default();
    model::run(&weights, &decoder, &model::slices(&windows), &mut seen)?;

    let sites = decoder.blocks.iter().flat_map(Block::sites);
    let sites: Vec<Readers> = sites.map(|site| (paths(&site.readers), site.expert)).collect();
    let used = |site: &Readers| site.1.is_none() || seen.0.iter().any(|(readers, _)| readers == site);
    let expected: Vec<&Readers> = sites.iter().filter(|site| used(site)).collect();
    let found: Vec<&Readers> = seen.0.iter().map(|(readers, _)| readers).collect();
    if let Some(at) = (0..expected.len().max(found.len())).find(|&at| expected.get(at) != found.get(at)) {
        return Err(format!("site {at} is {:?}, the tap saw {:?}", expected.get(at), found.get(at)));
    }
    for ((readers, _), columns) in &seen.0 {
        for reader in readers {
            let weight = weights.shape(&format!("{reader}.weight")).and_then(|shape| shape.last());
            if weight != Some(columns) {
                return Err(format!("{reader} has {weight:?} columns, its input {columns}"));
            }
        }
    }
    let experts = found.iter().filter(|readers| readers.1.is_some()).count();
    let all = sites.iter().filter(|site| site.1.is_some()).count();
    Ok(format!("{:>4} of {:>4}, {experts:>3} of {all:>3}", found.len(), sites.len()))
}
