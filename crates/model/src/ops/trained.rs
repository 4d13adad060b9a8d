//! Linears whose gradients serve the methods: observed ones, and those whose grids are trained.

use std::sync::{Arc, Mutex, PoisonError};

use super::exp::vectorised;
use super::linear::{self, Linear};
use super::slices::{Held, values};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

/// Sums over the tokens that passed an observed linear.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Tokens.
    pub tokens: u64,
    /// `[in]`: squares of the inputs.
    pub inputs: Vec<f64>,
    /// `[out]`: squares of the loss's gradients with respect to the outputs.
    pub gradients: Vec<f64>,
}

impl Observed {
    /// Adds what another saw.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        for (own, other) in [(&mut self.inputs, &other.inputs), (&mut self.gradients, &other.gradients)] {
            own.resize(own.len().max(other.len()), 0.0);
            own.iter_mut().zip(other).for_each(|(own, other)| *own += other);
        }
    }
}

/// Where an observed linear leaves its sums. One for each window: sums of several threads would come in any order.
pub type Notebook = Arc<Mutex<Observed>>;

/// `x [.., k] @ weight [n, k]^T (+ bias [n])`, which notes squares of inputs now and squares of output gradients when gradients are
/// taken. No gradient reaches weight or bias.
///
/// # Errors
/// Shapes that do not fit together.
pub fn observed_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    notebook: &Notebook,
) -> Result<Tensor> {
    linear::check(x, weight, bias)?;
    let (x, weight) = (x.contiguous()?, weight.detach().contiguous()?);
    let features = weight.dim(1)?.max(1);
    {
        let held = Held::new(&x);
        let all = held.values()?;
        let mut seen = notebook.lock().unwrap_or_else(PoisonError::into_inner);
        seen.tokens += (all.len() / features) as u64;
        squares(&mut seen.inputs, all, features);
    }
    let y = x.apply_op2(&weight, Observe { notebook: notebook.clone() })?;
    match bias {
        None => Ok(y),
        Some(bias) => y.broadcast_add(&bias.detach()),
    }
}

fn squares(sums: &mut Vec<f64>, rows: &[f32], features: usize) {
    sums.resize(features, 0.0);
    vectorised(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(features) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += f64::from(*value) * f64::from(*value);
                }
            }
        },
    );
}

struct Observe {
    notebook: Notebook,
}

impl CustomOp2 for Observe {
    fn name(&self) -> &'static str {
        "observed-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Linear::forward((values(x, xl)?, xl), (values(w, wl)?, wl), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        {
            let held = Held::new(&grad);
            let mut seen = self.notebook.lock().unwrap_or_else(PoisonError::into_inner);
            squares(&mut seen.gradients, held.values()?, weight.dim(0)?.max(1));
        }
        Linear::backward(x, weight, &grad)
    }
}

/// A weight `[rows, columns]` in codes, whose grids are trained: `(code - middle) * scale + center` for each group.
#[derive(Clone, Debug)]
pub struct Codes {
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// Columns that share a scale.
    pub group_size: usize,
    /// The code that decodes to the center.
    pub middle: f32,
    /// `[rows, columns]`: what codes and stored scales and biases decode to.
    pub weight: Tensor,
}

/// `x [.., columns] @ weight^T (+ bias)`; gradients go to `scales` and `centers`, both `[rows, groups]`, as if the weight were
/// `(code - middle) * scale + center`, whatever rounding the stored weight has seen (a straight-through estimate).
///
/// # Errors
/// Shapes that do not fit together.
pub fn packed_linear(
    x: &Tensor,
    codes: &Arc<Codes>,
    scales: &Tensor,
    centers: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    linear::check(x, &codes.weight, bias)?;
    let (rows, columns) = codes.weight.dims2()?;
    if scales.dims() != [rows, columns / codes.group_size.max(1)] || centers.dims() != scales.dims() {
        bail!("packed_linear: scales {:?} for weight [{rows}, {columns}]", scales.dims());
    }
    let x = x.contiguous()?;
    let y = x.apply_op3(&scales.contiguous()?, &centers.contiguous()?, Packed { codes: codes.clone() })?;
    match bias {
        None => Ok(y),
        Some(bias) => y.broadcast_add(&bias.detach()),
    }
}

struct Packed {
    codes: Arc<Codes>,
}

impl CustomOp3 for Packed {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = Held::new(&self.codes.weight);
        Linear::forward((values(x, xl)?, xl), (weight.values()?, self.codes.weight.layout()), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        scales: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Codes { codes, group_size, middle, weight } = &*self.codes;
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (for_x, _) = Linear::backward(x, weight, &grad)?;
        let held = (Held::new(x), Held::new(&grad));
        let m = grad.elem_count() / n.max(1);
        let for_weight = linear::outer(held.1.values()?, held.0.values()?, (m, n, k));
        let (for_scales, for_centers) = by_group(&for_weight, codes, *group_size, *middle);
        let like = |values| Tensor::from_vec(values, scales.shape(), scales.device());
        Ok((for_x, Some(like(for_scales)?), Some(like(for_centers)?)))
    }
}

/// What a weight's gradient means for the scale and the center of each group.
pub fn by_group(gradient: &[f32], codes: &[u8], group_size: usize, middle: f32) -> (Vec<f32>, Vec<f32>) {
    const LANES: usize = 16;
    let groups = gradient.len() / group_size.max(1);
    let (mut scales, mut centers) = (Vec::with_capacity(groups), Vec::with_capacity(groups));
    vectorised(
        #[inline(always)]
        || {
            for (gradient, codes) in gradient.chunks_exact(group_size).zip(codes.chunks_exact(group_size)) {
                let [mut scale, mut center] = [[0f32; LANES]; 2];
                let gradient = gradient.as_chunks::<LANES>().0.iter();
                for (gradient, codes) in gradient.zip(codes.as_chunks::<LANES>().0) {
                    for lane in 0..LANES {
                        scale[lane] += gradient[lane] * (f32::from(codes[lane]) - middle);
                        center[lane] += gradient[lane];
                    }
                }
                scales.push(super::exp::tree(scale));
                centers.push(super::exp::tree(center));
            }
        },
    );
    (scales, centers)
}

/// A scalar whose gradient with respect to `y` is `grad`: where a chain of gradients goes on that was cut at `y`.
///
/// # Errors
/// Shapes that differ.
pub fn seeded(y: &Tensor, grad: &Tensor) -> Result<Tensor> {
    if y.dims() != grad.dims() {
        bail!("a gradient {:?} for {:?}", grad.dims(), y.dims());
    }
    y.contiguous()?.apply_op1(Seed { grad: grad.detach() })
}

struct Seed {
    grad: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let factor = f64::from(grad.to_scalar::<f32>()?);
        if factor == 1.0 { Ok(Some(self.grad.clone())) } else { Ok(Some((&self.grad * factor)?)) }
    }
}
