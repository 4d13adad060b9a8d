//! Tensors of other shapes, of parts, and of several put together.

use crate::Tensor;
use crate::error::{Result, bail};
use crate::shape::{Axis, IntoShape, View, filled};

impl Tensor {
    /// The same elements in order, with other axes.
    ///
    /// # Errors
    /// If the sizes have another product.
    pub fn reshape(&self, shape: impl IntoShape) -> Result<Self> {
        let shape = filled(&shape, self.elem_count())?;
        if shape == self.dims() {
            return Ok(self.clone());
        }
        Ok(self.part(shape, 0))
    }

    /// All in one axis.
    ///
    /// # Errors
    /// None today.
    pub fn flatten_all(&self) -> Result<Self> {
        self.reshape(self.elem_count())
    }

    /// Without an axis of size 1.
    ///
    /// # Errors
    /// An axis of another size.
    pub fn squeeze(&self, axis: impl Axis) -> Result<Self> {
        let axis = axis.index(self.rank())?;
        if self.dims()[axis] != 1 {
            bail!("axis {axis} of {:?} is not of size 1", self.dims());
        }
        let mut shape = self.dims().to_vec();
        shape.remove(axis);
        Ok(self.part(shape, 0))
    }

    /// With an axis of size 1 in front of axis `at`.
    ///
    /// # Errors
    /// A place beyond all axes.
    pub fn unsqueeze(&self, at: usize) -> Result<Self> {
        let mut shape = self.dims().to_vec();
        if at > shape.len() {
            bail!("no place {at} among the axes of {shape:?}");
        }
        shape.insert(at, 1);
        Ok(self.part(shape, 0))
    }

    /// Element `index` of the first axis.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, index: usize) -> Result<Self> {
        self.narrow(0, index, 1)?.squeeze(0)
    }

    /// Elements `start..start + length` of an axis.
    ///
    /// # Errors
    /// If it does not reach so far.
    pub fn narrow(&self, axis: impl Axis, start: usize, length: usize) -> Result<Self> {
        let axis = axis.index(self.rank())?;
        let size = self.dims()[axis];
        if start.checked_add(length).is_none_or(|end| end > size) {
            bail!("{start}..{start}+{length} of axis {axis} of {:?}", self.dims());
        }
        if length == size {
            return Ok(self.clone());
        }
        let mut view = View::all(self.dims());
        view.shape[axis] = length;
        view.start = start * view.strides[axis];
        if self.dims()[..axis].iter().all(|size| *size == 1) {
            return Ok(self.part(view.shape, view.start));
        }
        self.seen(view)
    }

    /// With two axes exchanged.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn transpose(&self, a: impl Axis, b: impl Axis) -> Result<Self> {
        let (a, b) = (a.index(self.rank())?, b.index(self.rank())?);
        let mut view = View::all(self.dims());
        view.shape.swap(a, b);
        view.strides.swap(a, b);
        self.seen(view)
    }

    /// The diagonal of a square matrix.
    ///
    /// # Errors
    /// Something else than a square matrix.
    pub fn diagonal(&self) -> Result<Self> {
        match self.dims2()? {
            (rows, columns) if rows == columns => {
                self.seen(View { shape: vec![rows], strides: vec![rows + 1], start: 0 })
            }
            _ => bail!("a tensor {:?} has no diagonal", self.dims()),
        }
    }

    /// Repeated to `shape` ([`View::broadcast`]).
    ///
    /// # Errors
    /// If it cannot be.
    pub fn broadcast_as(&self, shape: impl IntoShape) -> Result<Self> {
        let shape = shape.sizes();
        if shape == self.dims() {
            return Ok(self.clone());
        }
        self.seen(View::broadcast(self.dims(), &shape)?)
    }

    fn seen(&self, view: View) -> Result<Self> {
        let buffer = self.device().arrange(self, &view)?;
        let count = self.elem_count();
        Ok(Self::made(self.device(), view.shape.clone(), buffer, "view", &[self], move |pull| {
            let input = &pull.inputs[0];
            let buffer = input.device().scatter(pull.grad, &view, count)?;
            Ok(vec![Some(Self::constant(input.dims().to_vec(), buffer, 0, input.device()))])
        }))
    }

    /// Tensors one after the other along an axis.
    ///
    /// # Errors
    /// None at all; other axes that differ.
    pub fn cat<T: std::borrow::Borrow<Self>>(parts: &[T], axis: impl Axis) -> Result<Self> {
        let parts: Vec<&Self> = parts.iter().map(std::borrow::Borrow::borrow).collect();
        let Some(first) = parts.first() else { bail!("nothing to put together") };
        let axis = axis.index(first.rank())?;
        let mut shape = first.dims().to_vec();
        shape[axis] = 0;
        for part in &parts {
            let mut own = part.dims().to_vec();
            if own.len() != shape.len() {
                bail!("{own:?} beside {:?}", first.dims());
            }
            shape[axis] += std::mem::replace(&mut own[axis], shape[axis]);
            if own.iter().zip(&shape).enumerate().any(|(at, (a, b))| at != axis && a != b) {
                bail!("{:?} beside {:?} along axis {axis}", part.dims(), first.dims());
            }
        }
        let widths: Vec<usize> = parts.iter().map(|part| part.dims()[axis..].iter().product()).collect();
        let buffer = first.device().join(&parts, &widths)?;
        Ok(Self::made(first.device(), shape, buffer, "cat", &parts, move |pull| {
            let mut start = 0;
            let own = |part: &Self| {
                let size = part.dims()[axis];
                start += size;
                pull.grad.narrow(axis, start - size, size).map(Some)
            };
            pull.inputs.iter().map(own).collect()
        }))
    }

    /// Tensors of one shape along a new axis.
    ///
    /// # Errors
    /// As [`Tensor::cat`].
    pub fn stack<T: std::borrow::Borrow<Self>>(parts: &[T], axis: usize) -> Result<Self> {
        let parts: Vec<Self> =
            parts.iter().map(|part| part.borrow().unsqueeze(axis)).collect::<Result<_>>()?;
        Self::cat(&parts, axis)
    }

    /// With zeros before and behind along an axis.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn pad_with_zeros(&self, axis: usize, before: usize, behind: usize) -> Result<Self> {
        let zeros = |size: usize| {
            let mut shape = self.dims().to_vec();
            *shape.get_mut(axis).unwrap_or(&mut 0) = size;
            Self::full(0.0, shape, self.device())
        };
        let parts = [zeros(before)?, self.clone(), zeros(behind)?];
        let parts: Vec<&Self> = parts.iter().filter(|part| part.elem_count() > 0).collect();
        if parts.is_empty() { Ok(self.clone()) } else { Self::cat(&parts, axis) }
    }

    /// `ids` of the first axis, one below the other.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn rows(&self, ids: &[u32]) -> Result<Self> {
        let count = self.dim(0)?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
            bail!("row {id} of {:?}", self.dims());
        }
        let width = self.dims()[1..].iter().product();
        let mut shape = self.dims().to_vec();
        shape[0] = ids.len();
        let buffer = self.device().rows(self, width, ids)?;
        let ids = ids.to_vec();
        Ok(Self::made(self.device(), shape, buffer, "rows", &[self], move |pull| {
            let input = &pull.inputs[0];
            let buffer = input.device().add_rows(pull.grad, width, &ids, count)?;
            Ok(vec![Some(Self::constant(input.dims().to_vec(), buffer, 0, input.device()))])
        }))
    }

    /// With its last two axes exchanged.
    ///
    /// # Errors
    /// Fewer than two axes.
    pub fn t(&self) -> Result<Self> {
        if self.rank() < 2 {
            bail!("a tensor {:?} has no transpose", self.dims());
        }
        self.transpose(self.rank() - 2, self.rank() - 1)
    }
}
