//! Rotary position embedding over whole heads or their first features.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

use super::exp::vectorised;
use super::slices::values;

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
    x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, Rotary(pairing))
}

struct Rotary(Pairing);

impl CustomOp3 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        cos: &CpuStorage,
        cl: &Layout,
        sin: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, _, heads, d) = xl.shape().dims4()?;
        let r = cl.shape().dims2()?.1;
        let (x, cos, sin) = (values(x, xl)?, values(cos, cl)?, values(sin, sl)?);
        let mut out = x.to_vec();
        if !out.is_empty() {
            let angles = cos.chunks_exact(r).zip(sin.chunks_exact(r));
            vectorised(
                #[inline(always)]
                || {
                    for (token, (cos, sin)) in out.chunks_exact_mut(heads * d).zip(angles.cycle()) {
                        for head in token.chunks_exact_mut(d) {
                            rotate(&mut head[..2 * r], cos, sin, self.0);
                        }
                    }
                },
            );
        }
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let back = grad.contiguous()?.apply_op3_no_bwd(cos, &sin.detach().neg()?, self)?;
        Ok((Some(back), None, None))
    }
}

/// By index: zipped iterators are set up by calls that are not inlined, and a head is too short for that.
#[inline(always)]
fn rotate(features: &mut [f32], cos: &[f32], sin: &[f32], pairing: Pairing) {
    let r = cos.len();
    let sin = &sin[..r];
    match pairing {
        Pairing::Halves => {
            let (first, second) = features.split_at_mut(r);
            let second = &mut second[..r];
            for i in 0..r {
                (first[i], second[i]) = turn(first[i], second[i], cos[i], sin[i]);
            }
        }
        Pairing::Interleaved => {
            let (pairs, _) = features.as_chunks_mut::<2>();
            for (i, [first, second]) in pairs.iter_mut().enumerate() {
                (*first, *second) = turn(*first, *second, cos[i], sin[i]);
            }
        }
    }
}

#[inline(always)]
fn turn(first: f32, second: f32, cos: f32, sin: f32) -> (f32, f32) {
    (first * cos - second * sin, second * cos + first * sin)
}
