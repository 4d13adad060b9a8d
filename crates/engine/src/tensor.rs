//! The handle of numbers: a shape, a buffer, and what it was made of.

use std::sync::Arc;

use crate::elementary::{Buffer, Combine, Map, Reduce};
use crate::engine::Device;
use crate::error::{Result, bail};
use crate::shape::{Axis, IntoShape, View, common, filled};
use crate::tape::{Node, Origin, Pull};

/// Float32 numbers in row-major order, where an engine put them. Cloning copies a pointer.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    shape: Vec<usize>,
    /// The first element in the buffer.
    start: usize,
    buffer: Buffer,
    device: Device,
    origin: Origin,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor {:?}", self.0.shape)
    }
}

/// What a vjp gives: a gradient for each input.
pub(crate) type Pulled = Result<Vec<Option<Tensor>>>;

impl Tensor {
    pub(crate) fn constant(shape: Vec<usize>, buffer: Buffer, start: usize, device: &Device) -> Self {
        let origin = Origin::Constant;
        Self(Arc::new(Inner { shape, start, buffer, device: device.clone(), origin }))
    }

    /// The same numbers on another device; no gradient passes.
    ///
    /// # Errors
    /// If either device has no room or does not answer.
    pub fn on(&self, device: &Device) -> Result<Self> {
        if self.device().is(device) {
            return Ok(self.detach());
        }
        Ok(Self::constant(self.dims().to_vec(), device.adopt(self)?, 0, device))
    }

    /// Numbers in row-major order.
    ///
    /// # Errors
    /// If they do not fill the shape, or the device has no room.
    pub fn from_vec(values: Vec<f32>, shape: impl IntoShape, device: &Device) -> Result<Self> {
        let shape = filled(&shape, values.len())?;
        Ok(Self::constant(shape, device.upload(values)?, 0, device))
    }

    /// [`Tensor::from_vec`] of a copy.
    ///
    /// # Errors
    /// As there.
    pub fn from_slice(values: &[f32], shape: impl IntoShape, device: &Device) -> Result<Self> {
        Self::from_vec(values.to_vec(), shape, device)
    }

    /// One number everywhere.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn full(value: f32, shape: impl IntoShape, device: &Device) -> Result<Self> {
        let sizes = shape.sizes();
        let buffer = device.fill(value, sizes.iter().product())?;
        Ok(Self::constant(sizes, buffer, 0, device))
    }

    /// What an operation made. `vjp` gives the gradients of `inputs`; it is kept only where gradients reach one of
    /// them.
    pub(crate) fn made(
        device: &Device,
        shape: Vec<usize>,
        buffer: Buffer,
        name: &'static str,
        inputs: &[&Tensor],
        vjp: impl Fn(&Pull<'_>) -> Pulled + Send + Sync + 'static,
    ) -> Self {
        Self::with_origin(device, shape, (buffer, 0), name, inputs, vjp)
    }

    fn with_origin(
        device: &Device,
        shape: Vec<usize>,
        (buffer, start): (Buffer, usize),
        name: &'static str,
        inputs: &[&Tensor],
        vjp: impl Fn(&Pull<'_>) -> Pulled + Send + Sync + 'static,
    ) -> Self {
        let origin = if inputs.iter().any(|input| input.is_tracked()) {
            let inputs = inputs.iter().copied().cloned().collect();
            Origin::Made(Node { name, inputs, vjp: Box::new(vjp) })
        } else {
            Origin::Constant
        };
        Self(Arc::new(Inner { shape, start, buffer, device: device.clone(), origin }))
    }

    /// The same numbers, from which no gradient goes further.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self::constant(self.0.shape.clone(), self.0.buffer.clone(), self.0.start, &self.0.device)
    }

    /// The same numbers as a variable: [`Tensor::gradients`] of whatever is made of it gives its gradient.
    #[must_use]
    pub fn variable(&self) -> Self {
        let Inner { shape, start, buffer, device, .. } = &*self.0;
        let origin = Origin::Variable;
        let (shape, buffer, device) = (shape.clone(), buffer.clone(), device.clone());
        Self(Arc::new(Inner { shape, start: *start, buffer, device, origin }))
    }

    /// Whether gradients reach it.
    pub(crate) fn is_tracked(&self) -> bool {
        !matches!(self.0.origin, Origin::Constant)
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.0.origin
    }

    /// A number that clones share, and that no other living tensor has.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// What computes with it.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Its buffer, and the place of its first element there: for engines.
    pub fn buffer(&self) -> (&Buffer, usize) {
        (&self.0.buffer, self.0.start)
    }

    /// Its numbers, if they lie in this process's memory.
    pub(crate) fn host(&self) -> Result<&[f32]> {
        match &self.0.buffer {
            Buffer::Host(values) => Ok(&values[self.0.start..self.0.start + self.elem_count()]),
            Buffer::Device(_) => bail!("a tensor {:?} of another engine", self.0.shape),
        }
    }

    /// Its numbers, to be changed: copied first if somebody else holds them too.
    pub(crate) fn host_mut(&mut self) -> Result<&mut [f32]> {
        let whole = matches!(&self.0.buffer, Buffer::Host(values) if values.len() == self.elem_count());
        if Arc::get_mut(&mut self.0).is_none() || !whole {
            *self = Self::from_vec(self.to_vec()?, self.dims(), self.device())?;
        }
        match Arc::get_mut(&mut self.0).map(|inner| &mut inner.buffer) {
            Some(Buffer::Host(values)) => Ok(Arc::make_mut(values).as_mut_slice()),
            _ => bail!("a tensor of another engine"),
        }
    }

    /// Whether nobody else holds its numbers, so that they may be changed in place: for engines.
    #[cfg(feature = "gpu")]
    pub(crate) fn is_alone(&mut self) -> bool {
        match Arc::get_mut(&mut self.0).map(|inner| &mut inner.buffer) {
            Some(Buffer::Host(values)) => Arc::get_mut(values).is_some(),
            Some(Buffer::Device(memory)) => Arc::get_mut(memory).is_some(),
            None => false,
        }
    }

    /// Calls `f` with its numbers, which are copied only if they lie in another memory.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        if let Buffer::Host(_) = &self.0.buffer {
            return Ok(f(self.host()?));
        }
        let (mut once, mut result) = (Some(f), None);
        self.device().read(self, &mut |values| {
            if let Some(f) = once.take() {
                result = Some(f(values));
            }
        })?;
        match result {
            Some(result) => Ok(result),
            None => bail!("the device gave no numbers of a tensor {:?}", self.0.shape),
        }
    }

    /// A copy of its numbers.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.read(<[f32]>::to_vec)
    }

    /// Sizes of its axes.
    pub fn dims(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.shape.len()
    }

    /// Number of elements.
    pub fn elem_count(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Size of an axis.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn dim(&self, axis: impl Axis) -> Result<usize> {
        Ok(self.0.shape[axis.index(self.rank())?])
    }

    /// Sizes of a matrix.
    ///
    /// # Errors
    /// Another number of axes.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self.0.shape[..] {
            [a, b] => Ok((a, b)),
            _ => bail!("a tensor {:?} where two axes are needed", self.0.shape),
        }
    }

    /// Sizes of three axes.
    ///
    /// # Errors
    /// Another number of axes.
    pub fn dims3(&self) -> Result<(usize, usize, usize)> {
        match self.0.shape[..] {
            [a, b, c] => Ok((a, b, c)),
            _ => bail!("a tensor {:?} where three axes are needed", self.0.shape),
        }
    }

    /// Sizes of four axes.
    ///
    /// # Errors
    /// Another number of axes.
    pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
        match self.0.shape[..] {
            [a, b, c, d] => Ok((a, b, c, d)),
            _ => bail!("a tensor {:?} where four axes are needed", self.0.shape),
        }
    }

    /// Neighbouring elements as a tensor of another shape, without a copy.
    pub(crate) fn part(&self, shape: Vec<usize>, first: usize) -> Self {
        let place = (self.0.buffer.clone(), self.0.start + first);
        let count = self.elem_count();
        Self::with_origin(self.device(), shape, place, "part", &[self], move |pull| {
            let input = &pull.inputs[0];
            if pull.grad.elem_count() == count {
                return Ok(vec![Some(pull.grad.reshape(input.dims())?)]);
            }
            let view = View { shape: vec![pull.grad.elem_count()], strides: vec![1], start: first };
            let buffer = input.device().scatter(pull.grad, &view, count)?;
            Ok(vec![Some(Self::constant(input.dims().to_vec(), buffer, 0, input.device()))])
        })
    }

    /// A function of each element.
    pub(crate) fn map(&self, function: Map) -> Result<Self> {
        let buffer = self.device().map(self, function)?;
        let name = "map";
        Ok(Self::made(self.device(), self.0.shape.clone(), buffer, name, &[self], move |pull| {
            let (x, y, grad) = (&pull.inputs[0], pull.output, pull.grad);
            let slope = match function {
                Map::Exp => y.clone(),
                Map::Log => x.recip()?,
                Map::Sqrt => (y * 2.0)?.recip()?,
                Map::Tanh => y.sqr()?.affine(-1.0, 1.0)?,
                Map::Erf => (x.sqr()?.neg()?.exp()? * std::f64::consts::FRAC_2_SQRT_PI)?,
                Map::Reciprocal => y.sqr()?.neg()?,
                Map::Absolute => x.map(Map::Sign)?,
                Map::Sign | Map::Within { .. } | Map::Rounded(_) => bail!("{function:?} has no gradient"),
                Map::Affine { factor, .. } => return Ok(vec![Some((grad * factor)?)]),
                Map::Clamp { low, high } => x.map(Map::Within { low, high })?,
            };
            Ok(vec![Some((grad * slope)?)])
        }))
    }

    /// A function of pairs, both repeated to a common shape.
    pub(crate) fn combine(&self, other: &Self, function: Combine) -> Result<Self> {
        let shape = common(self.dims(), other.dims())?;
        let buffer = self.device().combine(self, other, &shape, function)?;
        Ok(Self::made(self.device(), shape, buffer, "combine", &[self, other], move |pull| {
            let (x, y, grad) = (&pull.inputs[0], &pull.inputs[1], pull.grad);
            let for_x = || match function {
                Combine::Add | Combine::Subtract => Ok(grad.clone()),
                Combine::Multiply => grad.combine(y, Combine::Multiply),
                Combine::Divide => grad.combine(y, Combine::Divide),
            };
            let for_y = || match function {
                Combine::Add => Ok(grad.clone()),
                Combine::Subtract => grad.neg(),
                Combine::Multiply => grad.combine(x, Combine::Multiply),
                Combine::Divide => {
                    grad.combine(pull.output, Combine::Multiply)?.combine(y, Combine::Divide)?.neg()
                }
            };
            Ok(vec![
                if pull.wanted[0] { Some(for_x()?.summed_to(x.dims())?) } else { None },
                if pull.wanted[1] { Some(for_y()?.summed_to(y.dims())?) } else { None },
            ])
        }))
    }

    /// The transpose of [`Tensor::broadcast_as`].
    fn summed_to(&self, shape: &[usize]) -> Result<Self> {
        if self.0.shape == shape {
            return Ok(self.clone());
        }
        let view = View::broadcast(shape, &self.0.shape)?;
        let buffer = self.device().scatter(self, &view, shape.iter().product())?;
        Ok(Self::constant(shape.to_vec(), buffer, 0, self.device()))
    }

    fn reduce(&self, axis: usize, how: Reduce) -> Result<Self> {
        let shape = &self.0.shape;
        let sizes = [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()];
        let buffer = self.device().reduce(self, sizes, how)?;
        let mut kept = shape.clone();
        kept[axis] = 1;
        Ok(Self::made(self.device(), kept, buffer, "reduce", &[self], move |pull| match how {
            Reduce::Sum => Ok(vec![Some(pull.grad.broadcast_as(pull.inputs[0].dims())?)]),
            Reduce::Largest => bail!("the largest has no gradient"),
        }))
    }

    /// Sums over an axis, which stays with size 1.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn sum_keepdim(&self, axis: impl Axis) -> Result<Self> {
        self.reduce(axis.index(self.rank())?, Reduce::Sum)
    }

    /// Sums over an axis.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn sum(&self, axis: impl Axis) -> Result<Self> {
        let axis = axis.index(self.rank())?;
        self.reduce(axis, Reduce::Sum)?.squeeze(axis)
    }

    /// The sum of all elements, a scalar.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn sum_all(&self) -> Result<Self> {
        self.flatten_all()?.sum(0)
    }

    /// Means over an axis, which stays with size 1.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn mean_keepdim(&self, axis: impl Axis) -> Result<Self> {
        let size = self.dim(axis)?;
        self.sum_keepdim(axis)? * (1.0 / size as f64)
    }

    /// The largest along an axis, which stays with size 1. No gradient passes it.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn max_keepdim(&self, axis: impl Axis) -> Result<Self> {
        self.detach().reduce(axis.index(self.rank())?, Reduce::Largest)
    }

    /// `self [batch.., m, k] @ other [batch.., k, n]`, batches of one shape.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        let (x, y) = (self.dims(), other.dims());
        let fits = x.len() >= 2
            && x.len() == y.len()
            && x[..x.len() - 2] == y[..y.len() - 2]
            && x[x.len() - 1] == y[y.len() - 2];
        if !fits {
            bail!("matmul: {x:?} and {y:?} do not fit together");
        }
        let (outer, [m, k], n) = (&x[..x.len() - 2], [x[x.len() - 2], x[x.len() - 1]], y[y.len() - 1]);
        let buffer = self.device().multiply(self, other, [outer.iter().product(), m, k, n])?;
        let shape = [outer, &[m, n]].concat();
        Ok(Self::made(self.device(), shape, buffer, "matmul", &[self, other], |pull| {
            let (x, y, grad) = (&pull.inputs[0], &pull.inputs[1], pull.grad);
            Ok(vec![Some(grad.matmul(&y.t()?)?), Some(x.t()?.matmul(grad)?)])
        }))
    }
}
