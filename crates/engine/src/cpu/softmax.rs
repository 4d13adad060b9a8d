//! Softmax over the last axis.

use super::made::{buffer, tensor};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::exp::{exponentials, largest, vectorised};

pub(super) fn softmax(x: &Tensor) -> Result<Tensor> {
    let Some(&d) = x.dims().last() else { bail!("softmax of a scalar") };
    let mut out = x.host()?.to_vec();
    vectorised(
        #[inline(always)]
        || {
            for row in out.chunks_exact_mut(d.max(1)) {
                let factor = 1.0 / exponentials(row, largest(row));
                for value in row {
                    *value *= factor;
                }
            }
        },
    );
    // y * (g - sum(g * y))
    Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(out), "softmax", &[x], move |pull| {
        let (y, grad) = (pull.output.host()?, pull.grad.host()?);
        let mut out = Vec::with_capacity(y.len());
        for (y, grad) in y.chunks_exact(d.max(1)).zip(grad.chunks_exact(d.max(1))) {
            let sum: f32 = y.iter().zip(grad).map(|(y, grad)| y * grad).sum();
            out.extend(y.iter().zip(grad).map(|(y, grad)| y * grad - y * sum));
        }
        Ok(vec![Some(tensor(out, pull.grad.dims(), pull.grad)?)])
    }))
}
