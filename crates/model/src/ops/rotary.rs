//! Rotary position embedding over whole heads or their first features.

use candle_core::{D, Result, Tensor, bail};

/// Which features of a head form the pairs that are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Feature `i` with `i + r`.
    Halves,
    /// Feature `2 * i` with `2 * i + 1`; they stay there.
    Interleaved,
}

pub(super) fn check(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    let fits = match (x.dims(), cos.dims()) {
        ([_, tokens, _, d], [rows, r]) => tokens == rows && 2 * r <= *d && *r > 0 && cos.dims() == sin.dims(),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    bail!("rotary: input {:?}, cos {:?} and sin {:?} do not fit together", x.dims(), cos.dims(), sin.dims())
}

pub(super) fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
    let (batch, tokens, heads, d) = x.dims4()?;
    let r = cos.dim(1)?;
    let cos = cos.reshape((1, tokens, 1, r))?;
    let sin = sin.reshape((1, tokens, 1, r))?;
    let (first, second) = match pairing {
        Pairing::Halves => (x.narrow(3, 0, r)?, x.narrow(3, r, r)?),
        Pairing::Interleaved => {
            let pairs = x.narrow(3, 0, 2 * r)?.reshape((batch, tokens, heads, r, 2))?;
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
    Tensor::cat(&[turned, x.narrow(D::Minus1, 2 * r, d - 2 * r)?], 3)
}

pub(super) fn fused(x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
    plain(x, cos, sin, pairing)
}
