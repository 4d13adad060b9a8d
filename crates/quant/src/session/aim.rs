//! What a site's readers aim at: what the full-precision model makes of the full-precision stream.
//!
//! Windows that passed quantized layers bring `x~` instead of `x`, and a residual stream `r~` instead of `r`. Of all weights
//! `W + D` the one with `D = (W E[(x - x~) x~^T] + E[(r - r~) x~^T]) E[x~ x~^T]^-1` comes nearest, in least squares, to giving
//! `W x + r - r~`; the second term is there where the reader writes to the residual stream. Qronos (Zhang et al. 2025, arXiv
//! 2505.11695) and GPTAQ (Li et al. 2025, arXiv 2504.02692) round such weights. Here the part `correction` of `D` is taken: inputs
//! are few and noisy, and what later layers can repair is not known here.

use mlx_quant_engine::{Result, Tensor};
use mlx_quant_model::Site;
use mlx_quant_model::decoder::{Block, Layer};

use super::Session;
use super::work::Stored;
use crate::methods::{Factor, Method, awq};
use crate::walks::calibrate::Drift;

impl Session<'_> {
    /// Whether readers aim at the full-precision stream: kept statistics know nothing of the quantized one.
    pub(super) fn aims(&self) -> bool {
        let settings = self.settings;
        aims(self.recipe.rounding(), settings.method.correction) && settings.statistics.is_none()
    }
}

/// Whether readers aim at the full-precision stream, where windows pass.
pub(crate) fn aims(rounding: Method, correction: f32) -> bool {
    rounding == Method::Gptq && correction > 0.0
}

/// For each site whose reader alone is added to the residual stream, what it is multiplied by before.
pub(super) fn writes(block: &Block, sites: &[Site<'_>]) -> Vec<Option<f64>> {
    let multiplier = |site: &Site<'_>| {
        let [reader] = site.readers[..] else { return None };
        let stage = block.stages.iter().find(|stage| match &stage.branches[..] {
            [branch] if branch.post_norm.is_none() && stage.post_norm.is_none() => match &branch.layer {
                Layer::Attention(attention) => attention.output == *reader,
                Layer::Mlp(mlp) => mlp.down == *reader,
                _ => false,
            },
            _ => false,
        })?;
        Some(stage.multiplier).filter(|multiplier| *multiplier != 0.0)
    };
    sites.iter().map(multiplier).collect()
}

/// The weights `[out, in]` that readers are rounded from: those of `weights` that are quantized, with the part `part` of what the
/// drift asks for. `factor` is that of the Hessian of inputs over `factors`.
pub(super) fn corrected(
    weights: &[Tensor],
    stored: &[Stored],
    (factor, factors): (&Factor, Option<&[f32]>),
    drift: &Drift,
    part: f32,
) -> Result<Vec<Tensor>> {
    let order: Vec<u32> = factor.order.iter().map(|at| *at as u32).collect();
    let mut place = vec![0u32; order.len()];
    order.iter().zip(0..).for_each(|(at, to)| place[*at as usize] = to);
    let columns = |matrix: &Tensor, ids: &[u32]| matrix.t()?.rows(ids)?.t();
    let over = |matrix: Tensor| match factors {
        Some(factors) => awq::over(&matrix, factors),
        None => Ok(matrix),
    };
    let one = |(weight, stored): (&Tensor, &Stored)| -> Result<Tensor> {
        if !matches!(stored, Stored::Quantized(..)) {
            return Ok(weight.clone());
        }
        let mut wanted = weight.matmul(&drift.inputs)?;
        if let Some(stream) = &drift.stream {
            wanted = (wanted + stream)?;
        }
        // H^-1 = U^T U, of columns in their order.
        let wanted = columns(&over(wanted)?, &order)?;
        let change = wanted.matmul(&factor.upper.t()?)?.matmul(&factor.upper)?;
        weight + over(columns(&change, &place)?)?.affine(f64::from(part), 0.0)?
    };
    weights.iter().zip(stored).map(one).collect()
}

#[cfg(test)]
mod tests {
    use mlx_format::{FloatType, Scheme};
    use mlx_quant_engine::cpu;

    use super::*;
    use crate::methods::GramSum;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|at| ((at * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn matrix(rows: usize, columns: usize, seed: usize) -> Tensor {
        Tensor::from_vec(numbers(rows * columns, seed), (rows, columns), &cpu()).unwrap()
    }

    /// The mean of `a^T b` over rows.
    fn products(a: &Tensor, b: &Tensor) -> Tensor {
        let mean = 1.0 / a.dim(0).unwrap() as f64;
        a.t().unwrap().matmul(b).unwrap().affine(mean, 0.0).unwrap()
    }

    fn squares(tensor: &Tensor) -> f32 {
        tensor.sqr().unwrap().sum_all().unwrap().to_vec().unwrap()[0]
    }

    /// Corrected weights come nearer to what is wanted, whole ones as near as any weight can; the order of columns and factors on
    /// features change nothing.
    #[test]
    fn corrected_weights_are_the_least_squares() {
        let (tokens, size, out) = (20_000, 32, 16);
        let (x, noise, weight) = (matrix(tokens, size, 1), matrix(tokens, size, 2), matrix(out, size, 3));
        let own = (x.affine(0.5, 0.0).unwrap() + noise.affine(0.2, 0.0).unwrap()).unwrap();
        let stream = own.matmul(&matrix(size, out, 4)).unwrap();
        let drift =
            Drift { inputs: products(&(&x - &own).unwrap(), &own), stream: Some(products(&stream, &own)) };
        let wanted = (x.matmul(&weight.t().unwrap()).unwrap() + stream).unwrap();
        let stored = [Stored::Quantized(Scheme::affine(4, 32).unwrap(), FloatType::Bf16)];
        let by = |part: f32, order: Vec<usize>, factors: Option<&[f32]>| {
            let mut sum = GramSum::new(size, &cpu()).unwrap();
            let inputs = match factors {
                Some(factors) => awq::over(&own, factors).unwrap(),
                None => own.clone(),
            };
            sum.add(&inputs).unwrap();
            let factor = Factor::of(sum.finish().unwrap(), order, 1e-6).unwrap().unwrap();
            let how = (&factor, factors);
            corrected(std::slice::from_ref(&weight), &stored, how, &drift, part).unwrap().remove(0)
        };
        let error =
            |weight: &Tensor| squares(&(own.matmul(&weight.t().unwrap()).unwrap() - &wanted).unwrap());
        let plain: Vec<usize> = (0..size).collect();
        let [none, half, whole] = [0.0, 0.5, 1.0].map(|part| by(part, plain.clone(), None));
        assert_eq!(none.to_vec().unwrap(), weight.to_vec().unwrap());
        assert!(error(&whole) < 0.5 * error(&half) && error(&half) < 0.5 * error(&none));
        // Off-diagonal elements are shrunk a little, so that nothing is exact.
        let left = (own.matmul(&whole.t().unwrap()).unwrap() - &wanted).unwrap();
        assert!(squares(&products(&left, &own)) < 1e-3 * squares(&products(&wanted, &own)));
        let turned: Vec<usize> = (0..size).rev().collect();
        let factors: Vec<f32> = (0..size).map(|at| [0.5, 1.0, 4.0][at % 3]).collect();
        for other in [by(1.0, turned.clone(), None), by(1.0, turned, Some(&factors))] {
            assert!(squares(&(&other - &whole).unwrap()) < 1e-3 * squares(&whole));
        }
    }

    #[test]
    fn what_is_not_quantized_stays() {
        let weight = matrix(4, 8, 1);
        let gram = crate::methods::Gram::of_squares(&[1.0; 8], &cpu()).unwrap();
        let factor = Factor::of(gram, (0..8).collect(), 0.01).unwrap().unwrap();
        let drift = Drift { inputs: matrix(8, 8, 2), stream: None };
        let stays = [Stored::Plain(FloatType::Bf16)];
        let same = corrected(std::slice::from_ref(&weight), &stays, (&factor, None), &drift, 1.0).unwrap();
        assert_eq!(same[0].to_vec().unwrap(), weight.to_vec().unwrap());
    }
}
