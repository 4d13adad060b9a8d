//! A logical tensor over the bytes of a checkpoint: strided views of source tensors, stacked.
//!
//! Renaming, stacking experts, splitting fused matrices, de-interleaving and transposing only say where the
//! bytes of an output row are found; nothing is copied until a range of rows is asked for, so that a tensor of
//! any size is handled a few rows at a time. A matrix that its source has packed ([`Matrix`]) is decoded on the way, or
//! given in MLX's own packing.

mod apply;
mod join;
#[cfg(test)]
mod order_tests;
mod piece;
mod step;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use mlx_format::checkpoint::{Checkpoint, Tensor};
use mlx_format::{Dtype, Scheme};

use self::apply::apply;
use self::join::joined;
use self::piece::{Packed, Piece, row_major};
pub use self::step::{Change, Factors, Step};
use crate::matrix::{Matrix, Part};

/// A step that does not fit the shape it meets.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{step:?} does not fit shape {shape:?}")]
pub struct StepError {
    step: Step,
    shape: Vec<usize>,
}

/// Rows that cannot be written back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor {tensor} is decoded from its packed form, which has no inverse")]
pub struct ScatterError {
    tensor: String,
}

/// Pieces of equal shape, on a new first axis or one behind the other on the first that they have.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// dtype of the elements as read.
    pub dtype: Dtype,
    /// What is to be done with the values.
    pub change: Option<Change>,
    stacked: bool,
    pieces: Vec<Piece>,
}

impl View {
    /// The whole of a tensor after `steps`.
    ///
    /// # Errors
    /// [`StepError`] if a step does not fit the shape.
    pub fn new(name: &str, tensor: &Tensor, steps: &[Step]) -> Result<Self, StepError> {
        let strides = row_major(&tensor.shape);
        let piece =
            Piece { tensor: name.to_owned(), shape: tensor.shape.clone(), strides, offset: 0, packed: None };
        Self::of(piece, tensor.dtype, steps)
    }

    /// A part of a packed matrix after `steps`; as MLX's words cannot be turned, nor can their scales.
    pub(crate) fn packed(matrix: &Arc<Matrix>, part: Part, steps: &[Step]) -> Result<Self, StepError> {
        let shape = vec![matrix.rows, matrix.width(part)];
        let (tensor, strides) = (matrix.codes.tensor.clone(), row_major(&shape));
        if !matches!(part, Part::Values(_))
            && let Some(step) = steps.iter().find(|step| !step.keeps_rows())
        {
            return Err(StepError { step: step.clone(), shape });
        }
        let packed = Some(Packed { matrix: Arc::clone(matrix), part });
        Self::of(Piece { tensor, shape, strides, offset: 0, packed }, matrix.dtype(part), steps)
    }

    fn of(piece: Piece, dtype: Dtype, steps: &[Step]) -> Result<Self, StepError> {
        let mut view = Self { dtype, change: None, stacked: false, pieces: vec![piece] };
        for step in steps {
            apply(step, &mut view.pieces, &mut view.dtype, &mut view.change)
                .ok_or_else(|| StepError { step: step.clone(), shape: view.pieces[0].shape.clone() })?;
        }
        Ok(view)
    }

    /// The scheme in which MLX holds all of it exactly.
    ///
    /// # Errors
    /// What MLX lacks for it; nothing is said if the source has not packed it.
    pub(crate) fn scheme(&self) -> Result<Scheme, String> {
        let mut schemes = self.pieces.iter().map(|piece| match &piece.packed {
            Some(packed) => packed.matrix.scheme(),
            None => Err(String::new()),
        });
        let first = schemes.next().unwrap_or_else(|| Err(String::new()))?;
        for scheme in schemes {
            let other = scheme?;
            if other != first {
                return Err(format!("its parts are packed differently ({first} and {other})"));
            }
        }
        Ok(first)
    }

    /// Views of equal shape and dtype on a new first axis; `None` if they differ or there are none.
    pub fn stack(views: Vec<Self>) -> Option<Self> {
        let first = views.first()?;
        let (dtype, change) = (first.dtype, first.change.clone());
        let alike = |view: &Self| {
            view.dtype == dtype
                && view.change == change
                && !view.stacked
                && view.pieces.len() == 1
                && view.pieces[0].shape == first.pieces[0].shape
        };
        if !views.iter().all(alike) {
            return None;
        }
        Some(Self {
            dtype,
            change,
            stacked: true,
            pieces: views.into_iter().flat_map(|view| view.pieces).collect(),
        })
    }

    /// Views one behind the other on their first axis, which alone may differ; `None` if something else does, or values are to be
    /// changed.
    pub fn join(views: Vec<Self>) -> Option<Self> {
        let first = views.first()?;
        let (dtype, inner) = (first.dtype, first.pieces[0].shape.get(1..)?.to_vec());
        let alike = |view: &Self| {
            view.dtype == dtype
                && view.change.is_none()
                && !view.stacked
                && view.pieces.iter().all(|piece| piece.shape.get(1..) == Some(&inner[..]))
        };
        if !views.iter().all(alike) {
            return None;
        }
        let pieces = joined(views.into_iter().flat_map(|view| view.pieces).collect());
        (!pieces.is_empty()).then_some(Self { dtype, change: None, stacked: false, pieces })
    }

    /// Shape, outermost axis first.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.pieces[0].shape.clone();
        match shape.first_mut() {
            _ if self.stacked => shape.insert(0, self.pieces.len()),
            Some(first) => *first *= self.pieces.len(),
            None => {}
        }
        shape
    }

    /// Length of the last axis (1 for a scalar).
    pub fn columns(&self) -> usize {
        self.pieces[0].shape.last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last; 0 for an empty tensor.
    pub fn rows(&self) -> usize {
        self.pieces.len() * self.rows_per_piece()
    }

    /// An empty tensor has no rows, whatever its shape.
    fn rows_per_piece(&self) -> usize {
        let shape = &self.pieces[0].shape;
        if shape.contains(&0) { 0 } else { shape[..shape.len().saturating_sub(1)].iter().product() }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows() * self.columns()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.columns() * self.dtype.bitsize() / 8
    }

    /// The source tensor that holds a row.
    pub fn source_of(&self, row: usize) -> &str {
        let piece = row.checked_div(self.rows_per_piece()).unwrap_or(0);
        &self.pieces[piece.min(self.pieces.len() - 1)].tensor
    }

    /// Names of the source tensors that any row is read from.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().flat_map(|piece| {
            let packed = piece.packed.as_ref();
            let own = packed.is_none().then_some(piece.tensor.as_str());
            own.into_iter().chain(packed.into_iter().flat_map(|packed| packed.matrix.sources(packed.part)))
        })
    }

    /// Bytes of all rows as the source stores them; of what it has packed those of the codes.
    pub fn stored_bytes(&self) -> u64 {
        let bits = self.pieces[0].packed.as_ref().filter(|packed| matches!(packed.part, Part::Values(_)));
        let bits = bits.map_or(self.dtype.bitsize(), |packed| packed.matrix.codes.bits as usize);
        (self.elements() as u64).saturating_mul(bits as u64) / 8
    }

    /// Bytes of the source's pages that reading some rows touches, for one tensor whose rows lie all over it; else 0.
    pub fn spread_bytes(&self) -> usize {
        let spread = |piece: &Piece| {
            let matrix = &piece.packed.as_ref().filter(|packed| packed.matrix.is_spread())?.matrix;
            Some(matrix.stored_bytes(matrix.rows))
        };
        self.pieces.iter().filter_map(spread).max().unwrap_or(0)
    }

    /// The bytes of rows `rows`, row-major: borrowed from the map where they are contiguous there, else gathered.
    ///
    /// # Panics
    /// If the range is out of bounds or the view is of another checkpoint.
    pub fn rows_of<'c>(&self, checkpoint: &'c Checkpoint, rows: Range<usize>) -> Cow<'c, [u8]> {
        let (size, row_bytes, per_piece) =
            (self.dtype.bitsize() / 8, self.row_bytes(), self.rows_per_piece());
        assert!(rows.end <= self.rows());
        if rows.is_empty() || row_bytes == 0 {
            return Cow::Borrowed(&[]);
        }
        let first = rows.start / per_piece;
        if (rows.end - 1) / per_piece == first
            && self.pieces[first].is_row_major()
            && self.pieces[first].packed.is_none()
        {
            let piece = &self.pieces[first];
            let start = piece.offset * size + (rows.start - first * per_piece) * row_bytes;
            return Cow::Borrowed(&piece.bytes(checkpoint)[start..][..rows.len() * row_bytes]);
        }
        let mut out = vec![0u8; rows.len() * row_bytes];
        let mut filled = 0;
        let mut row = rows.start;
        while row < rows.end {
            let piece = &self.pieces[row / per_piece];
            let end = rows.end.min((row / per_piece + 1) * per_piece);
            let local = row % per_piece..row % per_piece + (end - row);
            let length = local.len() * row_bytes;
            let part = &mut out[filled..][..length];
            match &piece.packed {
                None => piece.gather(piece.bytes(checkpoint), local, size, part),
                Some(packed) => piece.unpack(checkpoint, packed, local, size, part),
            }
            filled += length;
            row = end;
        }
        Cow::Owned(out)
    }

    /// The inverse of [`View::rows_of`]: gives every byte of `rows` back to the place that it was read from.
    ///
    /// It shows that a renaming loses nothing, and carries values by MLX's names back under the source's names.
    /// `bytes` holds whole rows, [`View::row_bytes`] each, as `rows_of` gave them (before a [`Change`] is
    /// made). `write` gets a source tensor's name, the offset of a byte in that tensor, and what belongs there: a
    /// row where the source has it in one piece, else an element at a time.
    ///
    /// # Errors
    /// [`ScatterError`] if the source has packed the rows; nothing of that tensor has been written.
    ///
    /// # Panics
    /// If the range is out of bounds, or `bytes` has another length.
    pub fn scatter(
        &self,
        rows: Range<usize>,
        bytes: &[u8],
        mut write: impl FnMut(&str, usize, &[u8]),
    ) -> Result<(), ScatterError> {
        let (size, row_bytes, per_piece) =
            (self.dtype.bitsize() / 8, self.row_bytes(), self.rows_per_piece());
        assert!(rows.end <= self.rows() && bytes.len() == rows.len() * row_bytes);
        for (row, bytes) in rows.zip(bytes.chunks_exact(row_bytes.max(1))) {
            let piece = &self.pieces[row / per_piece];
            if piece.packed.is_some() {
                return Err(ScatterError { tensor: piece.tensor.clone() });
            }
            let start = piece.row_start(row % per_piece);
            match piece.strides.last() {
                Some(&stride) if stride != 1 => {
                    for (column, element) in bytes.chunks_exact(size).enumerate() {
                        write(&piece.tensor, (start + column * stride) * size, element);
                    }
                }
                _ => write(&piece.tensor, start * size, bytes),
            }
        }
        Ok(())
    }

    /// Asks the system to read the pages behind `rows` ahead.
    pub fn prefetch(&self, checkpoint: &Checkpoint, rows: Range<usize>) {
        let (size, per_piece) = (self.dtype.bitsize() / 8, self.rows_per_piece());
        if rows.is_empty() || per_piece == 0 || self.columns() == 0 {
            return;
        }
        for index in rows.start / per_piece..=(rows.end - 1) / per_piece {
            let piece = &self.pieces[index];
            let local = rows.start.max(index * per_piece) - index * per_piece
                ..rows.end.min((index + 1) * per_piece) - index * per_piece;
            let (mut low, mut high) = (usize::MAX, 0);
            for row in local {
                let start = piece.row_start(row);
                let last = start + (self.columns() - 1) * piece.strides.last().copied().unwrap_or(1);
                (low, high) = (low.min(start), high.max(last + 1));
            }
            if let Some(Packed { matrix, part }) = &piece.packed {
                if matches!(part, Part::Values(_) | Part::Words) {
                    let width = matrix.width(*part).max(1);
                    matrix.prefetch(checkpoint, low / width..high.div_ceil(width));
                }
                continue;
            }
            if let Some(tensor) = checkpoint.tensor(&piece.tensor) {
                checkpoint.prefetch(tensor, low * size..high * size);
            }
        }
    }
}
