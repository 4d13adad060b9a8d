//! AWQ: factors on a site's features that make what is loud there easier to round, folded into what stands before.
//!
//! `W x = (W s) (x / s)`: columns of a weight times `s`, what makes the activation divided by `s`. Lin et al. 2023, arXiv
//! 2306.00978, section 3.2; factors are `magnitude^r`, normed by the root of their largest times their smallest, `r` on
//! a grid, also divided by `weight magnitude^(1 - r)` as in the paper's code.
//!
//! Factors are rounded to powers of two. Then folding is exact in every dtype, and a producer whose rows are already
//! rounded is folded by its scales and biases alone, its codes stay: so a site's factors may be chosen when the site is reached,
//! on the inputs it really gets.

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::{Result, Tensor};
use rayon::prelude::*;

use super::MethodSettings;
use super::{Factor, Gram, How};

/// Rows of a weight on which candidates are judged.
const SAMPLE: usize = 64;
/// A fold in front of GPTQ has to win by this much on the sample: smaller gains are not seen again in the model's outputs.
const MARGIN: f64 = 0.97;
/// Factors stay within these powers of two.
const REACH: f32 = 8.0;

/// A weight that reads the site.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'w> {
    /// A sample of its rows, `[rows, columns]`.
    pub(crate) values: &'w Tensor,
    /// How it will be stored.
    pub(crate) scheme: Scheme,
    /// dtype of scales and biases.
    pub(crate) float: FloatType,
}

/// Features that need the same factor, as the query heads that share a value head; each alone otherwise.
pub(crate) type Ties<'t> = Option<&'t (dyn Fn(usize) -> usize + Sync)>;

/// Makes candidates what there is room for.
pub(crate) type Within<'w> = &'w dyn Fn(Vec<f32>) -> Vec<f32>;

/// The factors (powers of two) of least `tr(dW H dW^T)` over all readers, on a sample of their rows, when rounded with or
/// without `search`; `None` if no candidate is better than `base`, ones as a rule.
pub(crate) fn choose(
    gram: &Gram,
    readers: &[Reader<'_>],
    (n_grid, within): (usize, Within<'_>),
    base: &[f32],
    search: bool,
    ties: Ties<'_>,
) -> Result<Option<Vec<f32>>> {
    let columns = gram.size;
    let diagonal = gram.diagonal()?;
    let loud = tied(&diagonal, ties);
    let magnitude: Vec<f32> = loud.iter().map(|square| square.sqrt().max(1e-8)).collect();
    let weight = tied(&weight_squares(readers, columns)?, ties);
    let weight: Vec<f32> = weight.iter().map(|square| square.sqrt().max(1e-8)).collect();
    let mut candidates: Vec<Vec<f32>> = Vec::new();
    for step in 1..=n_grid {
        let r = step as f32 / n_grid as f32;
        for duo in [false, true] {
            let raw: Vec<f32> = magnitude
                .iter()
                .zip(&weight)
                .map(|(x, w)| x.powf(r) / if duo { w.powf(1.0 - r) } else { 1.0 })
                .collect();
            let factors = within(powers_of_two(&raw));
            if factors != base && !candidates.contains(&factors) {
                candidates.push(factors);
            }
        }
    }
    let none = loss(gram, &diagonal, readers, base, search)?;
    let losses = candidates
        .par_iter()
        .map(|factors| loss(gram, &diagonal, readers, factors, search))
        .collect::<Result<Vec<f64>>>()?;
    // The first of equals, whatever the timing.
    let best = (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b]));
    Ok(best.filter(|best| losses[*best] < none).map(|best| candidates.swap_remove(best)))
}

/// Whether factors still help when GPTQ rounds: it makes up for much of what they are for. The same loss on the same rows, with the
/// figures of `settings` and columns in their own order; against `base`.
pub(crate) fn helps_gptq(
    gram: &Gram,
    readers: &[Reader<'_>],
    (factors, base): (&[f32], &[f32]),
    settings: &MethodSettings,
) -> Result<bool> {
    let compensated = |factors: &[f32]| -> Result<Option<f64>> {
        let order = (0..gram.size).collect();
        let Some(factor) = Factor::of(gram.scaled(factors)?, order, settings.damping)? else {
            return Ok(None);
        };
        let how =
            How::Compensated { factor: &factor, block_size: settings.block_size, sweeps: settings.sweeps };
        let of = |reader: &Reader<'_>| loss_of(gram, reader, factors, how);
        let losses = readers.par_iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok(Some(losses.iter().sum()))
    };
    Ok(match (compensated(factors)?, compensated(base)?) {
        (Some(with), Some(without)) => with < MARGIN * without,
        _ => true,
    })
}

/// Evenly spaced rows of a weight `[rows, columns]`, one below the other.
pub(crate) fn sample(weight: &Tensor) -> Result<Tensor> {
    let (rows, _) = weight.dims2()?;
    let count = rows.min(SAMPLE);
    let ids: Vec<u32> = (0..count).map(|index| (index * rows / count) as u32).collect();
    weight.rows(&ids)
}

fn weight_squares(readers: &[Reader<'_>], columns: usize) -> Result<Vec<f32>> {
    let mut sums = vec![0f32; columns];
    for reader in readers {
        let squares = reader.values.sqr()?.sum(0)?.to_vec()?;
        sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
    }
    Ok(sums)
}

/// Means over tied features.
fn tied(squares: &[f32], ties: Ties<'_>) -> Vec<f32> {
    let Some(tie) = ties else { return squares.to_vec() };
    let mut sums = vec![(0f32, 0f32); squares.len()];
    for (at, square) in squares.iter().enumerate() {
        let (sum, count) = &mut sums[tie(at)];
        *sum += square;
        *count += 1.0;
    }
    (0..squares.len()).map(|at| sums[tie(at)]).map(|(sum, count)| sum / count).collect()
}

/// Normed by the root of largest times smallest, then the nearest powers of two.
fn powers_of_two(raw: &[f32]) -> Vec<f32> {
    let (low, high) =
        raw.iter().fold((f32::INFINITY, 0f32), |(low, high), value| (low.min(*value), high.max(*value)));
    let middle = (low * high).sqrt();
    let power = |value: &f32| (value / middle).log2().round_ties_even().clamp(-REACH, REACH).exp2();
    raw.iter().map(power).collect()
}

/// `tr(dW H dW^T)` over all readers' samples if columns are multiplied by `factors` before rounding and divided afterwards.
pub(crate) fn loss(
    gram: &Gram,
    diagonal: &[f32],
    readers: &[Reader<'_>],
    factors: &[f32],
    search: bool,
) -> Result<f64> {
    let weights: Vec<f32> =
        diagonal.iter().zip(factors).map(|(square, factor)| square / (factor * factor)).collect();
    let how = if search { How::Nearest { weights: &weights } } else { How::Plain };
    let of = |reader: &Reader<'_>| loss_of(gram, reader, factors, how);
    let losses = readers.par_iter().map(of).collect::<Result<Vec<f64>>>()?;
    Ok(losses.iter().sum())
}

fn loss_of(gram: &Gram, reader: &Reader<'_>, factors: &[f32], how: How<'_>) -> Result<f64> {
    let scaled = times(reader.values, factors)?;
    let (_, decoded) = scaled.device().round(&scaled, reader.scheme, reader.float, how)?;
    gram.loss(&(over(&decoded, factors)? - reader.values)?)
}

/// Multiplies columns of `[rows, columns]`.
pub(crate) fn times(weight: &Tensor, factors: &[f32]) -> Result<Tensor> {
    weight.broadcast_mul(&Tensor::from_slice(factors, factors.len(), weight.device())?)
}

/// Divides columns of `[rows, columns]`.
pub(crate) fn over(weight: &Tensor, factors: &[f32]) -> Result<Tensor> {
    weight.broadcast_div(&Tensor::from_slice(factors, factors.len(), weight.device())?)
}

#[cfg(test)]
mod tests {
    use mlx_quant_engine::cpu;

    use super::*;

    #[test]
    fn factors_are_powers_of_two_around_one() {
        let factors = powers_of_two(&[1.0, 3.9, 16.0, 0.3]);
        assert_eq!(factors, [0.5, 2.0, 8.0, 0.125]);
        assert_eq!(powers_of_two(&[7.0; 3]), [1.0; 3]);
    }

    #[test]
    fn a_loud_feature_gets_a_large_factor() {
        let columns = 64;
        let squares: Vec<f32> = (0..columns).map(|at| if at == 5 { 1e4 } else { 1.0 }).collect();
        let gram = Gram::of_squares(&squares, &cpu()).unwrap();
        let values: Vec<f32> =
            (0..16 * columns).map(|at| ((at * 7919) % 1000) as f32 / 1000.0 - 0.5).collect();
        let values = Tensor::from_vec(values, (16, columns), &cpu()).unwrap();
        let scheme = Scheme::affine(3, 64).unwrap();
        let reader = Reader { values: &values, scheme, float: FloatType::Bf16 };
        let (same, ones) = (|factors| factors, [1.0; 64]);
        let factors = choose(&gram, &[reader], (20, &same), &ones, false, None).unwrap().unwrap();
        assert!(factors[5] > factors[6] && factors[6] == factors[7], "{factors:?}");
        let tie = |at: usize| at / 2;
        let factors = choose(&gram, &[reader], (20, &same), &ones, false, Some(&tie)).unwrap().unwrap();
        assert!(factors[4] == factors[5] && factors[5] > factors[6], "{factors:?}");
    }
}
