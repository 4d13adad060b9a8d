//! What second-order rounding asks of an engine: a part of what every engine is.

use mlx_format::{FloatType, Scheme};

use crate::Tensor;
use crate::error::Result;
use crate::rounding::{How, Pending};

/// Gram matrices of a site's inputs, their factors, and rounding by them. Without an override operations are what
/// [`plain`](crate::plain) makes of elementary ones.
pub trait SecondOrder {
    /// Adds `x^T x` of inputs `x [.., size]` to the lower triangle of `sum [size, size]`; in place if no other tensor
    /// has its buffer. A `sum [rows, end]` is that of rows `end - rows..end` alone, with as many columns as the last of
    /// them has: its elements are summed in the same order.
    ///
    /// # Errors
    /// If the device has no room. The other operations on Gram matrices fail in the same case.
    fn gram_add(&self, sum: &mut Tensor, x: &Tensor) -> Result<()> {
        crate::plain::gram_add(sum, x)
    }

    /// Puts rows `[rows, end]` of a lower triangle (as in [`SecondOrder::gram_add`]) times `factor` into a symmetric matrix
    /// `whole [size, size]`: into its rows `end - rows..end` and into the columns that mirror them. In place if no other
    /// tensor has its buffer.
    fn gram_place(&self, whole: &mut Tensor, rows: &Tensor, factor: f32) -> Result<()> {
        crate::plain::gram_place(whole, rows, factor)
    }

    /// The symmetric matrix whose lower triangle is that of `sum [size, size]` times `factor`.
    fn gram_finish(&self, sum: Tensor, factor: f32) -> Result<Tensor> {
        crate::plain::gram_finish(&sum, factor)
    }

    /// Each element of a Gram matrix `[size, size]` divided by the factors of its row and its column: the Gram matrix
    /// of the inputs divided by `factors`.
    fn gram_scaled(&self, gram: &Tensor, factors: &[f32]) -> Result<Tensor> {
        crate::plain::gram_scaled(gram, factors)
    }

    /// `tr(D H D^T)` of a Gram matrix `H [size, size]` and changes `D [rows, size]`.
    fn quadratic(&self, gram: &Tensor, changes: &Tensor) -> Result<f64> {
        crate::plain::quadratic(gram, changes)
    }

    /// Rows and columns of a Gram matrix in `order`, with off-diagonal elements times `kept`.
    fn permuted(&self, gram: &Tensor, order: &[usize], kept: f32) -> Result<Tensor> {
        crate::plain::permuted(gram, order, kept)
    }

    /// `U [size, size]` with `(H + added)^-1 = U^T U`, upper triangular, where `added` goes to the diagonal of
    /// `H [size, size]`, which becomes `H + added`, in place if no other tensor has its buffer. `None` if that is not
    /// positive definite, and `H` stays as it is.
    fn factor(&self, hessian: &mut Tensor, added: f32) -> Result<Option<Tensor>> {
        crate::plain::factor(hessian, added)
    }

    /// [`SecondOrder::factor`] of matrices of one size one behind the other, `[count, size, size]`, each with its own number
    /// added: what a card does for all of them in one launch.
    ///
    /// # Errors
    /// As there; another number of numbers than of matrices.
    fn factors(&self, hessians: &mut Tensor, added: &[f32]) -> Result<Vec<Option<Tensor>>> {
        crate::plain::factors(hessians, added)
    }

    /// Codes, scales and biases of a weight `[rows, columns]` at an affine scheme, and the weight that they decode to.
    /// Without an override they are chosen on the processor.
    ///
    /// # Errors
    /// A weight that is no matrix, or that the scheme does not divide.
    fn round(
        &self,
        weight: &Tensor,
        scheme: Scheme,
        float: FloatType,
        how: How<'_>,
    ) -> Result<(Pending, Tensor)> {
        crate::plain::round(weight, scheme, float, how)
    }

    /// [`SecondOrder::round`] of weights below each other, equally many rows for each of `hows`: what a card does for all
    /// of them in one launch.
    ///
    /// # Errors
    /// As there; rows that do not go into equal parts.
    fn round_parts(
        &self,
        weight: &Tensor,
        scheme: Scheme,
        float: FloatType,
        hows: &[How<'_>],
    ) -> Result<(Pending, Tensor)> {
        crate::plain::round_parts(weight, scheme, float, hows)
    }
}
