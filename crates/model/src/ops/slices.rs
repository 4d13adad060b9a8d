//! From tensors to slices and back.

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, Var, bail};

/// The float32 values of an operation's argument, which its entry made contiguous.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => bail!("a tensor of shape {:?} is not contiguous", layout.dims()),
    }
}

/// A contiguous tensor of a backward pass, held while it is read.
pub(super) struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(super) fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => values(storage, self.layout),
            _ => bail!("a fused operation runs on CPU alone"),
        }
    }
}

/// One value for each element of `x` and the same element of `y`.
#[inline(always)]
pub(super) fn map_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    assert_eq!(x.len(), y.len(), "pairs of elements");
    let mut out = Vec::with_capacity(x.len());
    super::exp::vectorised(
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

/// The gradients of `inputs` through `plain`, computed anew: for operations whose own backward is not written.
pub(super) fn through_plain(
    inputs: &[&Tensor],
    grad: &Tensor,
    plain: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let variables =
        inputs.iter().map(|input| Var::from_tensor(&input.detach())).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let grads = (plain(&tensors)? * grad)?.sum_all()?.backward()?;
    Ok(tensors.iter().map(|tensor| grads.get(tensor).cloned()).collect())
}
