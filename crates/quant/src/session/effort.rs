//! How much arithmetic a calibrated run takes, from headers.

use mlx_quant_model::Site;
use mlx_quant_model::decoder::{Block, Layer};

use super::QuantizeSettings;
use crate::data::Windows;
use crate::methods::Method;
use crate::walks::Walk;
use crate::{Error, Model};

/// AWQ: candidates that differ, of those that the grid has, and rows on which each is judged.
const CANDIDATES: f64 = 1.5;
const SAMPLE: f64 = 64.0;
/// Searching a grid: ranges tried, operations for a weight in each.
pub(crate) const SEARCH: f64 = 53.0 * 8.0;

/// Floating-point operations of [`super::quantize`], about, by part: `forward` (and Gram matrices), `rounding` (of codes, with a
/// Hessian), `search` (of grids), `folding`, `learning`.
///
/// # Errors
/// As [`Walk::open`].
pub fn operations(
    model: &Model,
    windows: &Windows,
    settings: &QuantizeSettings,
) -> Result<Vec<(&'static str, f64)>, Error> {
    let walk = Walk::open(model)?;
    let tokens = (windows.picked.len() * windows.sequence_length) as f64;
    let mut sum = Effort::default();
    if settings.recipe.walks() {
        for block in &walk.decoder.blocks {
            sum.forward += tokens * crate::walks::attention(block, windows.sequence_length);
            sum.add(&walk, block, tokens, settings);
        }
    }
    if settings.recipe.rounding() != Method::Rtn {
        // Of tables too, and of everything where nothing walks.
        let walked = sum.search / SEARCH;
        let all: f64 = walk.weights.shapes().map(|(_, shape)| matrix(shape)).sum();
        sum.search += (all - walked).max(0.0) * SEARCH;
    }
    let learning = if settings.recipe.learns() { learning(&walk, windows, settings) } else { 0.0 };
    let Effort { forward, rounding, search, folding } = sum;
    let parts = [
        ("forward", forward),
        ("search", search),
        ("rounding", rounding),
        ("folding", folding),
        ("learning", learning),
    ];
    Ok(parts.into_iter().filter(|part| part.1 > 0.0).collect())
}

/// Of a step forward, and gradients of inputs and of weights; of looks at held-out windows; of all windows in full precision and as
/// they leave the block that has learned; of measuring what changes cost.
fn learning(walk: &Walk<'_>, windows: &Windows, settings: &QuantizeSettings) -> f64 {
    let (count, tokens) = (windows.picked.len(), windows.sequence_length);
    let steps = 3 * settings.learn.steps * settings.learn.batch.min(count);
    let looks = (crate::learn::JUDGED + 1) * crate::learn::held_out(count);
    let costs = 3 * crate::learn::measured(count);
    let tokens = |windows: usize| (windows * tokens) as f64;
    let (blocks, head) = crate::walks::a_token(walk, windows.sequence_length);
    tokens(steps + looks + 2 * count + costs) * blocks + tokens(costs) * head
}

/// Floating-point operations of a factor of a Hessian `[size, size]`, and of so many passes over a weight `[rows, size]`
/// with it.
pub(crate) fn rounding_operations(rows: f64, size: f64, passes: f64) -> f64 {
    passes * rows * size * size + size.powi(3)
}

/// Elements of a matrix, of a stack of them; none of a vector.
fn matrix(shape: &[usize]) -> f64 {
    if shape.len() < 2 { 0.0 } else { shape.iter().product::<usize>() as f64 }
}

#[derive(Debug, Default)]
struct Effort {
    forward: f64,
    rounding: f64,
    search: f64,
    folding: f64,
}

impl Effort {
    fn add(&mut self, walk: &Walk<'_>, block: &Block, tokens: f64, settings: &QuantizeSettings) {
        let moe = block.layers().find_map(|layer| match layer {
            Layer::Moe(moe) => Some((moe.experts.count() as f64, moe.router.top_k as f64)),
            _ => None,
        });
        let (experts, routed) = moe.unwrap_or((1.0, 1.0));
        let first = |site: &&Site<'_>| site.expert.is_none_or(|expert| expert == 0);
        for site in block.sites().iter().filter(first) {
            let shape = walk.weights.shape(&format!("{}.weight", site.readers[0].path)).unwrap_or(&[]);
            let size = shape.last().copied().unwrap_or(1) as f64;
            let rows = |path: &str| {
                let shape = walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]);
                shape.iter().rev().nth(1).copied().unwrap_or(0) as f64
            };
            let rows: f64 = site.readers.iter().map(|reader| rows(&reader.path)).sum();
            let (copies, seen) =
                if site.expert.is_some() { (experts, tokens * routed) } else { (1.0, tokens) };
            self.forward += seen * (2.0 * rows * size + size * size);
            self.search += copies * rows * size * SEARCH;
            if settings.statistics.is_none()
                && super::aim::aims(settings.recipe.rounding(), settings.method.correction)
            {
                self.forward += seen * (2.0 * rows * size + 2.0 * size * size);
                self.rounding += copies * 6.0 * rows * size * size;
            }
            if settings.recipe.is_second_order() {
                let compensates = if settings.recipe.rounding() == Method::Gptq { 1.0 } else { 0.0 };
                let passes = 2.0 + compensates + 2.0 * settings.method.sweeps as f64;
                self.rounding += copies * rounding_operations(rows, size, passes);
            }
            if settings.recipe.folds() {
                let judged = SAMPLE * site.readers.len() as f64;
                self.folding +=
                    copies * CANDIDATES * settings.method.n_grid as f64 * 2.0 * judged * size * size;
            }
        }
    }
}
