//! Gram matrices of a site's inputs, summed over windows by the tree of [`crate::reduce`].
//!
//! While windows come, a sum of each level of the tree is alive. Where inputs of all windows are held in a card's memory
//! and the matrix is large, its rows are summed some at a time instead, each through the whole tree over all windows: only
//! of these rows several sums are alive then. Every element is summed in the same order, and so has the same bits.

use std::collections::BTreeMap;
use std::ops::Range;

use mlx_quant_engine::{Device, Result, Tensor};
use mlx_quant_model::WeightsError;

use crate::Error;
use crate::methods::{Gram, GramSum};
use crate::reduce::{CHUNK, InOrder, Sum, Tree};
use crate::team::{Part, Team};

/// The Gram matrix of a chunk of windows.
pub(crate) struct OfChunk(pub(crate) GramSum);

/// The tree over the Gram matrices of chunks.
pub(crate) type GramTree = InOrder<Result<OfChunk>>;

impl Sum for Result<OfChunk> {
    fn add(&mut self, right: Self) {
        if let Ok(own) = self
            && let Err(error) = right.and_then(|right| own.0.merge(&right.0))
        {
            *self = Err(error);
        }
    }
}

/// Numbers of an exchange that describe a node: level, place, tokens.
const NODE: usize = 3;

/// Bytes of a matrix from which on rows are summed some at a time.
const LARGE: usize = 64 << 20;
/// Parts of a matrix that rows which are summed together have at most.
const PARTS: usize = 8;
/// Rows that are summed together are a multiple of this, as tiles of a card's products are.
const TILE: usize = 128;

/// Adds the inputs `[.., size]` of a batch of windows, the first of which is `window`.
pub(crate) fn add_gram(
    tree: &mut GramTree,
    window: usize,
    input: &Tensor,
) -> std::result::Result<(), WeightsError> {
    let size = input.dims().last().copied().unwrap_or(1);
    add_rows(tree, window, input, 0..size)?;
    Ok(())
}

/// As [`add_gram`], to these rows of the matrix alone.
fn add_rows(tree: &mut GramTree, window: usize, input: &Tensor, rows: Range<usize>) -> Result<()> {
    let size = input.dims().last().copied().unwrap_or(1);
    let fresh = || GramSum::of_rows(size, rows, input.device()).map(OfChunk);
    tree.window(window, fresh, |sum| match sum {
        Ok(sum) => sum.0.add(input),
        Err(error) => Err(error.clone()),
    })
}

/// The Gram matrix of inputs `[.., size]` of batches of windows, each with its first window and in their order; `None`
/// if no member of the team has any. `windows` are all that there are.
pub(crate) fn gram_of(
    inputs: &[(usize, Tensor)],
    (size, windows): (usize, usize),
    (team, device, pool): (&Team, &Device, &rayon::ThreadPool),
) -> std::result::Result<Option<Gram>, Error> {
    let rows = stripes(size, windows.div_ceil(CHUNK), device, team);
    summed(inputs, size, &rows, (team, device, pool))
}

/// The matrix by stripes of its rows, which are all of them.
fn summed(
    inputs: &[(usize, Tensor)],
    size: usize,
    stripes: &[Range<usize>],
    (team, device, pool): (&Team, &Device, &rayon::ThreadPool),
) -> std::result::Result<Option<Gram>, Error> {
    let of_rows = |rows: &Range<usize>| {
        let add = || -> Result<GramTree> {
            let mut tree = GramTree::default();
            for (window, input) in inputs {
                add_rows(&mut tree, *window, input, rows.clone())?;
            }
            Ok(tree)
        };
        sum_of_team(pool.install(add).map_err(WeightsError::from)?, size, (team, device, pool))
    };
    if let [all] = stripes {
        let Some(sum) = of_rows(all)? else { return Ok(None) };
        return Ok(Some(pool.install(|| sum.finish()).map_err(WeightsError::from)?));
    }
    let mut whole = None;
    for rows in stripes {
        let Some(sum) = of_rows(rows)? else { return Ok(None) };
        let place = || -> Result<Gram> {
            let mut matrix = whole.take().map_or_else(|| Gram::empty(size, device), Ok)?;
            sum.place(&mut matrix)?;
            Ok(matrix)
        };
        whole = Some(pool.install(place).map_err(WeightsError::from)?);
    }
    Ok(whole)
}

/// The sum over the windows of all members; `None` if nobody has any.
pub(crate) fn sum_of_team(
    tree: GramTree,
    size: usize,
    (team, device, pool): (&Team, &Device, &rayon::ThreadPool),
) -> std::result::Result<Option<GramSum>, Error> {
    if team.is_alone() {
        let sum = pool.install(|| tree.finish()).transpose().map_err(WeightsError::from)?;
        return Ok(sum.map(|sum| sum.0));
    }
    let nodes = pool.install(|| tree.into_tree().into_nodes());
    let (mut own, mut part) = (BTreeMap::new(), Part::default());
    for ((level, place), sum) in nodes {
        let sum = sum.map_err(WeightsError::from)?.0;
        part.head.extend([u64::from(level), place as u64, sum.tokens()]);
        part.tensors.push(sum.values().clone());
        own.insert((level, place), sum);
    }
    let all = team.gather(part)?;
    let mut tree = Tree::default();
    for (node, values) in all.iter().flat_map(|part| part.head.chunks_exact(NODE).zip(&part.tensors)) {
        let (level, place) = (node[0] as u32, node[1] as usize);
        let sum = match own.remove(&(level, place)) {
            Some(sum) => Ok(sum),
            None => pool.install(|| GramSum::of_values(size, node[2], values, device)),
        };
        pool.install(|| tree.put_node((level, place), sum.map(OfChunk)));
    }
    let sum = pool.install(|| tree.finish()).transpose().map_err(WeightsError::from)?;
    Ok(sum.map(|sum| sum.0))
}

/// Rows that are summed together: all of them, unless it is a card that holds the matrix, which is large, and several
/// chunks are summed.
fn stripes(size: usize, chunks: usize, device: &Device, team: &Team) -> Vec<Range<usize>> {
    // What members exchange is half of the matrix then.
    let large = if team.is_alone() { LARGE } else { LARGE / PARTS };
    if !device.is_card() || chunks < 2 || size * size * 4 <= large {
        return std::iter::once(0..size).collect();
    }
    let most = size * size / PARTS;
    let mut all: Vec<Range<usize>> = Vec::new();
    let mut first = 0;
    while first < size {
        // The end from which on the stripe, which has as many columns, would be larger: (end - first) end = most.
        let half = first as f64 / 2.0;
        let end = (half + (half * half + most as f64).sqrt()) as usize;
        let end = (end / TILE * TILE).max(first + TILE).min(size);
        all.push(first..end);
        first = end;
    }
    all
}

/// Elements of the rows that are summed together at most, where inputs of all windows are held; `None` where that is the
/// whole matrix.
pub(crate) fn held_in_parts(size: usize, chunks: usize, device: &Device) -> Option<usize> {
    let stripes = stripes(size, chunks, device, &Team::alone());
    let largest = || stripes.iter().map(|rows| rows.len() * rows.end).max();
    if stripes.len() > 1 { largest() } else { None }
}

#[cfg(test)]
mod tests {
    use mlx_quant_engine::cpu;

    use super::*;

    /// Inputs of batches of windows, of 5 tokens each.
    fn inputs(windows: usize, batch: usize, size: usize, device: &Device) -> Vec<(usize, Tensor)> {
        let number = |at: usize| ((at * 7919 % 1009) as f32 - 500.0) / 300.0;
        let of = |first: usize| {
            let count = batch.min(windows - first);
            let values = (0..count * 5 * size).map(|at| number(first * 5 * size + at)).collect();
            (first, Tensor::from_vec(values, (count, 5, size), device).unwrap())
        };
        (0..windows).step_by(batch).map(of).collect()
    }

    #[cfg(feature = "gpu")]
    fn bits(gram: &Gram) -> Vec<u32> {
        gram.values.to_vec().unwrap().into_iter().map(f32::to_bits).collect()
    }

    fn pool() -> rayon::ThreadPool {
        crate::threads::pool(1).unwrap()
    }

    fn all_of(inputs: &[(usize, Tensor)], windows: usize) -> Option<Gram> {
        let device = inputs.first().map_or_else(cpu, |(_, input)| input.device().clone());
        gram_of(inputs, (300, windows), (&Team::alone(), &device, &pool())).unwrap()
    }

    fn in_stripes(inputs: &[(usize, Tensor)]) -> Gram {
        let device = inputs[0].1.device();
        summed(inputs, 300, &STRIPES, (&Team::alone(), device, &pool())).unwrap().unwrap()
    }

    /// Whoever has which windows: one member has none of them.
    #[test]
    fn members_of_a_team_get_the_bits_of_one_device() {
        let bits =
            |gram: &Gram| gram.values.to_vec().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for (windows, batch, count) in [(40, 1, 2), (70, 16, 3), (20, 4, 4)] {
            let inputs = inputs(windows, batch, 300, &cpu());
            let whole = all_of(&inputs, windows).unwrap();
            let part = |team: &Team, stripes: &[Range<usize>]| {
                let share = team.share(windows);
                let own: Vec<_> =
                    inputs.iter().filter(|(window, _)| share.contains(window)).cloned().collect();
                summed(&own, 300, stripes, (team, &cpu(), &pool()))
            };
            let in_parts = in_stripes(&inputs);
            let all = std::iter::once(0..300).collect::<Vec<_>>();
            for (stripes, expected) in [(&STRIPES[..], &in_parts), (&all[..], &whole)] {
                let check = |team: &Team| {
                    let gram = part(team, stripes)?.unwrap();
                    assert_eq!(gram.tokens, expected.tokens);
                    assert!(bits(&gram) == bits(expected), "{windows} windows, {count} members");
                    Ok(())
                };
                crate::team::together(count, check, |team, _| check(team)).unwrap();
            }
            let nobody = |team: &Team| {
                assert!(summed(&[], 300, &STRIPES, (team, &cpu(), &pool()))?.is_none());
                Ok(())
            };
            crate::team::together(count, nobody, |team, _| nobody(team)).unwrap();
        }
    }

    /// Some stripes of 300 rows.
    const STRIPES: [Range<usize>; 3] = [0..128, 128..290, 290..300];

    #[test]
    fn stripes_are_the_matrix() {
        let inputs = inputs(40, 1, 300, &cpu());
        let whole = all_of(&inputs, inputs.len() * 16).unwrap();
        let parts = in_stripes(&inputs);
        assert_eq!((whole.tokens, parts.tokens), (200, 200));
        let apart = (&whole.values - &parts.values).unwrap().abs().unwrap().to_vec().unwrap();
        assert!(apart.into_iter().fold(0.0, f32::max) < 1e-4);
        assert!(all_of(&[], 0).is_none());
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn stripes_have_the_bits_of_the_matrix_on_a_card() {
        use mlx_quant_engine::gpu::{Gpu, adapters};
        let Some(adapter) = adapters().into_iter().next() else { return };
        let gpu = Gpu::open(&format!("gpu:{}", adapter.index).parse().unwrap()).unwrap();
        let device = Device::new(gpu);
        for (windows, batch) in [(40, 4), (9, 8), (70, 16)] {
            let inputs = inputs(windows, batch, 300, &device);
            let whole = all_of(&inputs, inputs.len() * 16).unwrap();
            let parts = in_stripes(&inputs);
            assert_eq!(parts.tokens, 5 * windows as u64);
            assert!(bits(&parts) == bits(&whole), "{windows} by {batch}");
        }
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn rows_of_large_matrices_are_summed_some_at_a_time() {
        use mlx_quant_engine::gpu::{Gpu, adapters};
        let alone = Team::alone();
        assert_eq!(stripes(14336, 8, &cpu(), &alone).len(), 1);
        let Some(adapter) = adapters().into_iter().next() else { return };
        let gpu = Gpu::open(&format!("gpu:{}", adapter.index).parse().unwrap()).unwrap();
        let device = Device::new(gpu);
        assert_eq!(stripes(4096, 8, &device, &alone).len(), 1);
        assert_eq!(stripes(14336, 1, &device, &alone).len(), 1);
        for size in [4097, 8192, 14336, 28672, 53248] {
            let all = stripes(size, 8, &device, &alone);
            assert!(all.len() < PARTS, "{size}: {all:?}");
            assert!(all[0].start == 0 && all[all.len() - 1].end == size);
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end % TILE == 0));
            let largest = held_in_parts(size, 8, &device).unwrap();
            assert!(
                largest <= size * size / PARTS && largest > size * size / PARTS * 3 / 4,
                "{size}: {largest}"
            );
        }
    }
}
