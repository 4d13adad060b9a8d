//! Every coarse operation, made of elementary ones in the order of the maths: what an engine without something better
//! does, and what the test suite compares with. Beside them [`Plain`], the engine whose elementary operations are
//! obvious loops.

mod attention;
mod elementary;
mod learning;
mod linear;
mod linear_attention;
mod losses;
mod second_order;
mod training;

use std::borrow::Cow;

use crate::error::{Result, bail};
use crate::routing::Selection;
use crate::settings::{Activation, Pairing};
use crate::{LAST, Tensor};

pub(crate) use self::attention::{Shapes, attention, check_delta, gated_delta};
pub use self::elementary::Plain;
#[cfg(feature = "gpu")]
pub(crate) use self::learning::{LONGEST, check_count, check_learning, check_start};
pub(crate) use self::learning::{
    fetch_codes, learned_codes, learned_grid, learned_weight, learning_step, without_largest,
};
pub(crate) use self::linear::{
    check as check_linear, check_codes, decode, linear, linears, observed_linear, packed_linear,
    shape as linear_shape, sum_of_rows,
};
#[cfg(feature = "gpu")]
pub(crate) use self::linear::{check_decode, check_linears};
pub(crate) use self::linear_attention::{
    Way, check_linear_attention, linear_attention, linear_attention_gradients,
};
#[cfg(feature = "gpu")]
pub(crate) use self::losses::{check_tile, place_in_tile, target_of};
pub(crate) use self::losses::{
    compare, divergence_slopes, keep_likeliest, label_slopes, likeliest_probability, likeliest_slopes, score,
};
#[cfg(feature = "gpu")]
pub(crate) use self::second_order::{check_count as check_matrices, check_parts, check_round};
pub(crate) use self::second_order::{
    factor, factors, gram_add, gram_finish, gram_place, gram_scaled, permuted, quadratic, round, round_parts,
};
#[cfg(feature = "gpu")]
pub(crate) use self::training::{EPSILON, check_adam, check_grid};
pub(crate) use self::training::{adam, grid_squares, stored_grid};

/// A tensor's numbers, lent where they lie in this process's memory.
fn numbers(x: &Tensor) -> Result<Cow<'_, [f32]>> {
    match x.host() {
        Ok(values) => Ok(Cow::Borrowed(values)),
        Err(_) => Ok(Cow::Owned(x.to_vec()?)),
    }
}

/// Refuses a parameter that is not as wide as the last axes of what it belongs to.
pub(crate) fn check_norm(x: &Tensor, weight: Option<&Tensor>, what: &str) -> Result<()> {
    let Some(weight) = weight else {
        return if x.rank() == 0 { bail!("norm of a scalar") } else { Ok(()) };
    };
    let fits = (1..=2).contains(&weight.rank()) && x.dims().ends_with(weight.dims());
    if fits { Ok(()) } else { bail!("{what}: {:?} does not fit input {:?}", weight.dims(), x.dims()) }
}

/// Refuses two tensors of different shapes.
pub(crate) fn check_same(x: &Tensor, y: &Tensor, what: &str) -> Result<()> {
    if x.dims() == y.dims() { Ok(()) } else { bail!("{what}: {:?} and {:?} differ", x.dims(), y.dims()) }
}

/// Refuses angles that do not fit the heads.
pub(crate) fn check_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    let fits = match (x.dims(), cos.dims()) {
        ([_, tokens, _, d], [rows, r]) => tokens == rows && 2 * r <= *d && *r > 0 && cos.dims() == sin.dims(),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    bail!("rotary: input {:?}, cos {:?} and sin {:?} do not fit together", x.dims(), cos.dims(), sin.dims())
}

pub(crate) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check_norm(x, weight, "weight of rms_norm")?;
    let mean = (x.sqr()?.mean_keepdim(LAST)? + eps)?;
    let y = x.broadcast_div(&mean.sqrt()?)?;
    if let Some(weight) = weight { y.broadcast_mul(weight) } else { Ok(y) }
}

pub(crate) fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    check_norm(x, weight, "weight of layer_norm")?;
    check_norm(x, bias, "bias of layer_norm")?;
    let centred = x.broadcast_sub(&x.mean_keepdim(LAST)?)?;
    let y = rms_norm(&centred, weight, eps)?;
    if let Some(bias) = bias { y.broadcast_add(bias) } else { Ok(y) }
}

pub(crate) fn add(x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    check_same(x, y, "add")?;
    if factor == 1.0 { x + y } else { x + (y * factor)? }
}

pub(crate) fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
    check_rotary(x, cos, sin)?;
    let (batch, tokens, heads, d) = x.dims4()?;
    let r = cos.dim(1)?;
    let cos = cos.detach().reshape((1, tokens, 1, r))?;
    let sin = sin.detach().reshape((1, tokens, 1, r))?;
    let (first, second) = match pairing {
        Pairing::Halves => (x.narrow(3, 0, r)?, x.narrow(3, r, r)?),
        Pairing::Interleaved => {
            let pairs = x.narrow(3, 0, 2 * r)?.reshape([batch, tokens, heads, r, 2])?;
            (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
        }
    };
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    let turned = match pairing {
        Pairing::Halves => Tensor::cat(&[turned_first, turned_second], 3)?,
        Pairing::Interleaved => {
            Tensor::stack(&[turned_first, turned_second], 4)?.reshape((batch, tokens, heads, 2 * r))?
        }
    };
    if 2 * r == d {
        return Ok(turned);
    }
    Tensor::cat(&[turned, x.narrow(LAST, 2 * r, d - 2 * r)?], 3)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

pub(crate) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x * sigmoid(x)?,
        Activation::Gelu => {
            let normal = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5))?;
            x * normal
        }
        Activation::GeluTanh => {
            let inner = (x + (x.sqr()? * x)?.affine(0.044_715, 0.0)?)?;
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            x * (inner * scale)?.tanh()?.affine(0.5, 0.5)?
        }
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu()?.sqr(),
        Activation::Sigmoid => sigmoid(x),
        Activation::Softplus => x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?,
        Activation::Identity => Ok(x.clone()),
        Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"),
    }
}

pub(crate) fn glu(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    check_same(gate, up, "glu: gate and up")?;
    if let Activation::ClampedSwiglu { alpha, limit } = glu {
        let gate = gate.clamp(f32::NEG_INFINITY, limit)?;
        let up = up.clamp(-limit, limit)?;
        return (&gate * sigmoid(&(&gate * f64::from(alpha))?)?)? * (up + 1.0)?;
    }
    activate(gate, glu)? * up
}

pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponentials = x.broadcast_sub(&x.max_keepdim(LAST)?)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(LAST)?)
}

pub(crate) fn route(scores: &Tensor, selection: &Selection) -> Result<Vec<Vec<u32>>> {
    let (_, experts) = scores.dims2()?;
    scores.read(|values| values.chunks_exact(experts.max(1)).map(|row| selection.choose(row)).collect())
}
