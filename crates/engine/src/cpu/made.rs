//! How results are made: a buffer, a tensor, a number for each pair, and into how many parts work is split.

use std::sync::Arc;

use crate::Tensor;
use crate::elementary::Buffer;
use crate::error::Result;
use crate::exp::vectorised;

/// Parts into which products and factorisations are split that use several threads. It is fixed, so that results do not
/// depend on the number of threads.
pub const PARTS: usize = 8;

/// A tensor of these numbers.
pub(super) fn tensor(values: Vec<f32>, shape: &[usize], like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, shape, like.device())
}

/// The buffer of these numbers.
pub(super) fn buffer(values: Vec<f32>) -> Buffer {
    Buffer::Host(Arc::new(values))
}

/// One value for each element of `x` and the same element of `y`.
#[inline(always)]
pub(super) fn map_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    assert_eq!(x.len(), y.len(), "pairs of elements");
    let mut out = Vec::with_capacity(x.len());
    vectorised(
        #[inline(always)]
        || {
            for ((to, x), y) in out.spare_capacity_mut().iter_mut().zip(x).zip(y) {
                to.write(f(*x, *y));
            }
        },
    );
    // SAFETY: the capacity is at least the length of `x`, which is that of `y`; the loop wrote as many elements.
    unsafe { out.set_len(x.len()) };
    out
}
