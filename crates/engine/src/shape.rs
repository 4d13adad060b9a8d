//! Shapes, axes, and views of one tensor's elements as another's.

use crate::error::{Result, bail};

/// As a size in a shape: as many as the other axes leave.
pub const REST: usize = usize::MAX;

/// The last axis.
pub const LAST: Last = Last;

/// The type of [`LAST`].
#[derive(Clone, Copy, Debug)]
pub struct Last;

/// An axis of a tensor.
pub trait Axis: Copy {
    /// Its index among `rank` axes.
    ///
    /// # Errors
    /// If there is no such axis.
    fn index(self, rank: usize) -> Result<usize>;
}

impl Axis for usize {
    fn index(self, rank: usize) -> Result<usize> {
        if self < rank { Ok(self) } else { bail!("no axis {self} among {rank}") }
    }
}

impl Axis for Last {
    fn index(self, rank: usize) -> Result<usize> {
        if rank > 0 { Ok(rank - 1) } else { bail!("a scalar has no last axis") }
    }
}

/// Whatever says the sizes of a shape: a number, a tuple, an array, a vector.
pub trait IntoShape {
    /// The sizes.
    fn sizes(&self) -> Vec<usize>;
}

macro_rules! shapes {
    ($($type:ty, $self:ident => $sizes:expr;)*) => {$(
        impl IntoShape for $type {
            fn sizes(&$self) -> Vec<usize> {
                $sizes
            }
        }
    )*};
}

shapes! {
    usize, self => vec![*self];
    (), self => Vec::new();
    (usize, usize), self => vec![self.0, self.1];
    (usize, usize, usize), self => vec![self.0, self.1, self.2];
    (usize, usize, usize, usize), self => vec![self.0, self.1, self.2, self.3];
    [usize], self => self.to_vec();
    Vec<usize>, self => self.clone();
}

impl<const N: usize> IntoShape for [usize; N] {
    fn sizes(&self) -> Vec<usize> {
        self.to_vec()
    }
}

impl<T: IntoShape + ?Sized> IntoShape for &T {
    fn sizes(&self) -> Vec<usize> {
        (*self).sizes()
    }
}

/// The sizes of `shape` for `count` elements, [`REST`] filled in.
pub(crate) fn filled(shape: &impl IntoShape, count: usize) -> Result<Vec<usize>> {
    let mut sizes = shape.sizes();
    if let Some(at) = sizes.iter().position(|size| *size == REST) {
        sizes[at] = 1;
        let others: usize = sizes.iter().product();
        if others == 0 || !count.is_multiple_of(others) {
            bail!("{count} elements do not fill {sizes:?} with one axis left open");
        }
        sizes[at] = count / others;
    }
    if sizes.iter().product::<usize>() == count {
        Ok(sizes)
    } else {
        bail!("{count} elements are no {sizes:?}")
    }
}

/// Elements of a tensor in another arrangement: element `i` of axis `a` lies `i * strides[a]` behind the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Sizes of the view.
    pub shape: Vec<usize>,
    /// Elements between neighbours of an axis; 0 repeats one.
    pub strides: Vec<usize>,
    /// Index of the first element.
    pub start: usize,
}

impl View {
    /// All elements of a tensor of this shape.
    pub fn all(shape: &[usize]) -> Self {
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        Self { shape: shape.to_vec(), strides, start: 0 }
    }

    /// A tensor of shape `from` repeated to `to`: axes are matched from the last, those of size 1 and those that are
    /// not there are repeated.
    ///
    /// # Errors
    /// Shapes that cannot be matched so.
    pub fn broadcast(from: &[usize], to: &[usize]) -> Result<Self> {
        let own = Self::all(from);
        let mut strides = vec![0; to.len()];
        let missing = to.len().checked_sub(from.len());
        let Some(missing) = missing else { bail!("{from:?} cannot be repeated to {to:?}") };
        for (axis, size) in from.iter().enumerate() {
            if *size == to[missing + axis] {
                strides[missing + axis] = own.strides[axis];
            } else if *size != 1 {
                bail!("{from:?} cannot be repeated to {to:?}");
            }
        }
        Ok(Self { shape: to.to_vec(), strides, start: 0 })
    }

    /// Calls `f` with the first element and the stride of each run along the last axis, in order.
    pub fn runs(&self, mut f: impl FnMut(usize, usize)) {
        let Some((&width, outer)) = self.shape.split_last() else {
            f(self.start, 0);
            return;
        };
        let stride = self.strides[outer.len()];
        if width == 0 || outer.contains(&0) {
            return;
        }
        let mut index = vec![0; outer.len()];
        let mut at = self.start;
        loop {
            f(at, stride);
            let mut axis = outer.len();
            loop {
                if axis == 0 {
                    return;
                }
                axis -= 1;
                index[axis] += 1;
                at += self.strides[axis];
                if index[axis] < outer[axis] {
                    break;
                }
                at -= self.strides[axis] * outer[axis];
                index[axis] = 0;
            }
        }
    }

    /// Elements in a run.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// The shape to which both can be repeated.
pub(crate) fn common(x: &[usize], y: &[usize]) -> Result<Vec<usize>> {
    let rank = x.len().max(y.len());
    let size =
        |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |at| shape[at]);
    (0..rank)
        .map(|axis| match (size(x, axis), size(y, axis)) {
            (a, b) if a == b || b == 1 => Ok(a),
            (1, b) => Ok(b),
            _ => bail!("{x:?} and {y:?} do not fit together"),
        })
        .collect()
}
