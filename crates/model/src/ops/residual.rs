//! What a branch adds to the residual stream.
//!
//! candle spreads elementwise sums over threads of its own, one sum at a time in the whole process: windows that
//! run side by side would wait for each other.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::slices::{map_pairs, values};

pub(super) fn check(x: &Tensor, y: &Tensor) -> Result<()> {
    if x.dims() != y.dims() {
        bail!("add: {:?} and {:?} differ", x.dims(), y.dims());
    }
    Ok(())
}

pub(super) fn plain(x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { x + y } else { x + (y * factor)? }
}

pub(super) fn fused(x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&y.contiguous()?, Add { factor: factor as f32 })
}

struct Add {
    factor: f32,
}

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let factor = self.factor;
        let sum = map_pairs(values(x, xl)?, values(y, yl)?, |x, y| x + factor * y);
        Ok((CpuStorage::F32(sum), xl.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some((grad * f64::from(self.factor))?)))
    }
}
