//! Rotary position embedding over whole heads or their first features.

use super::made::{buffer, tensor};
use crate::Tensor;
use crate::error::Result;
use crate::exp::vectorised;
use crate::settings::Pairing;

/// The heads of `x` (`heads` of `d` a token), turned by the angles of `tokens` tokens, forwards or back.
fn turned(x: &Tensor, cos: &[f32], sin: &[f32], pairing: Pairing) -> Result<Vec<f32>> {
    let (_, tokens, heads, d) = x.dims4()?;
    let r = cos.len() / tokens.max(1);
    let mut out = x.host()?.to_vec();
    if !out.is_empty() {
        let angles = cos.chunks_exact(r).zip(sin.chunks_exact(r));
        vectorised(
            #[inline(always)]
            || {
                for (token, (cos, sin)) in out.chunks_exact_mut(heads * d).zip(angles.cycle()) {
                    for head in token.chunks_exact_mut(d) {
                        rotate(&mut head[..2 * r], cos, sin, pairing);
                    }
                }
            },
        );
    }
    Ok(out)
}

pub(super) fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
    let out = turned(x, cos.host()?, sin.host()?, pairing)?;
    let (cos, sin) = (cos.detach(), sin.detach());
    Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(out), "rotary", &[x], move |pull| {
        let back: Vec<f32> = sin.host()?.iter().map(|sin| -sin).collect();
        let out = turned(pull.grad, cos.host()?, &back, pairing)?;
        Ok(vec![Some(tensor(out, pull.grad.dims(), pull.grad)?)])
    }))
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
