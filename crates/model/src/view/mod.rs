//! A logical tensor over the bytes of a checkpoint: strided views of source tensors, stacked.
//!
//! Renaming, stacking experts, splitting fused matrices, de-interleaving and transposing only say where the
//! bytes of an output row are found; nothing is copied until a range of rows is asked for, so that a tensor of
//! any size is handled a few rows at a time. A matrix that its source has packed ([`Matrix`]) is decoded on the way, or
//! given in MLX's own packing.

mod join;
#[cfg(test)]
mod order_tests;
mod piece;
mod step;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use mlx_format::checkpoint::{Checkpoint, Tensor};
use mlx_format::{Dtype, Scheme};

use self::join::{interleaved, joined};
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
            view.apply(step)
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

    /// Takes a step; nothing if it does not fit the shape.
    fn apply(&mut self, step: &Step) -> Option<()> {
        let piece = &mut self.pieces[0];
        let axes = piece.shape.len();
        match step {
            &Step::SplitRows(parts) => {
                let rows = *piece.shape.first()?;
                if parts == 0 || !rows.is_multiple_of(parts) {
                    return None;
                }
                piece.shape.splice(0..1, [parts, rows / parts]);
                piece.strides.insert(0, piece.strides[0].wrapping_mul(rows / parts));
            }
            &Step::Rows { start, count, of } => {
                let axis = axes.checked_sub(2)?;
                if piece.shape[axis] != of || count == 0 || start.checked_add(count)? > of {
                    return None;
                }
                piece.slice(axis, start, count, 1);
            }
            &Step::EveryOther { from_last, odd } => {
                let axis = axes.checked_sub(from_last + 1)?;
                if piece.shape[axis] == 0 || !piece.shape[axis].is_multiple_of(2) {
                    return None;
                }
                piece.slice(axis, usize::from(odd), piece.shape[axis] / 2, 2);
            }
            &Step::HalfOfRows(second) => {
                let axis = axes.checked_sub(2)?;
                let half = piece.shape[axis] / 2;
                if half == 0 || half * 2 != piece.shape[axis] {
                    return None;
                }
                piece.slice(axis, if second { half } else { 0 }, half, 1);
            }
            Step::Transpose => {
                let last = axes.checked_sub(2)? + 1;
                // Packed words cannot be turned.
                if self.dtype == Dtype::U32 {
                    return None;
                }
                piece.shape.swap(last - 1, last);
                piece.strides.swap(last - 1, last);
            }
            Step::ChannelsLast => {
                // Packed words cannot be turned.
                if axes < 3 || self.dtype == Dtype::U32 {
                    return None;
                }
                if has_channels_first(&piece.shape) {
                    let (channels, stride) = (piece.shape.remove(1), piece.strides.remove(1));
                    piece.shape.push(channels);
                    piece.strides.push(stride);
                }
            }
            Step::Words => {
                let last = axes.checked_sub(2)? + 1;
                let inner = piece.shape[last];
                if self.dtype != Dtype::U8
                    || piece.offset != 0
                    || piece.strides != row_major(&piece.shape)
                    || !inner.is_multiple_of(4)
                {
                    return None;
                }
                piece.shape.truncate(last);
                piece.shape[last - 1] *= inner / 4;
                piece.strides = row_major(&piece.shape);
                self.dtype = Dtype::U32;
            }
            Step::Scalar => {
                if piece.shape.iter().product::<usize>() != 1 {
                    return None;
                }
                piece.shape.clear();
                piece.strides.clear();
            }
            Step::Flatten => {
                if !piece.is_row_major() {
                    return None;
                }
                piece.shape = vec![piece.shape.iter().product()];
                piece.strides = vec![1];
            }
            &Step::First(count) => {
                let last = axes.checked_sub(1)?;
                piece.slice(last, 0, count.min(piece.shape[last]), 1);
            }
            &Step::Interleave { of } => {
                let [piece] = &self.pieces[..] else { return None };
                self.pieces = interleaved(piece, of)?;
            }
            Step::AddOne => self.change = (axes == 1).then_some(Change::AddOne),
            Step::Times(_) | Step::UnitRows | Step::GateOfStream | Step::GateOfBranch => {
                self.change = Some(change_of(step, &piece.shape)?);
            }
        }
        Some(())
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

/// What is done with values of such a shape from a step on; nothing if it does not fit.
fn change_of(step: &Step, shape: &[usize]) -> Option<Change> {
    match step {
        Step::AddOne => Some(Change::AddOne),
        Step::Times(factors) => {
            let rows = shape[..shape.len().saturating_sub(1)].iter().product::<usize>();
            let fit = factors.0.len() <= 1 || factors.0.len() == rows;
            fit.then(|| Change::Times(factors.clone()))
        }
        Step::UnitRows => Some(Change::UnitRows),
        Step::GateOfStream => Some(Change::Gate(true)),
        Step::GateOfBranch => Some(Change::Gate(false)),
        _ => None,
    }
}

/// Whether the weight of a convolution is `[out, in, kernel..]`; else it is `[out, kernel.., in]`.
fn has_channels_first(shape: &[usize]) -> bool {
    match shape {
        [_, channels, _] => *channels == 1,
        [.., height, width] => height == width,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use mlx_format::checkpoint::Directory;

    use super::*;

    /// A checkpoint of U8 tensors `t0`, `t1` of the given shape, counting up.
    fn checkpoint(shape: &[usize]) -> (tempfile::TempDir, Checkpoint) {
        let directory = tempfile::tempdir().unwrap();
        let elements: usize = shape.iter().product();
        let header = format!(
            r#"{{"t0":{{"dtype":"U8","shape":{shape:?},"data_offsets":[0,{elements}]}},"t1":{{"dtype":"U8","shape":{shape:?},"data_offsets":[{elements},{}]}}}}"#,
            elements * 2
        );
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend((0..elements * 2).map(|i| i as u8));
        std::fs::write(directory.path().join("model.safetensors"), file).unwrap();
        let opened = Checkpoint::open(Directory::open(directory.path()).unwrap()).unwrap();
        (directory, opened)
    }

    fn view(checkpoint: &Checkpoint, steps: &[Step]) -> View {
        View::new("t0", checkpoint.tensor("t0").unwrap(), steps).unwrap()
    }

    /// All rows at once must equal all ways of cutting them.
    fn read(view: &View, checkpoint: &Checkpoint) -> Vec<u8> {
        let whole = view.rows_of(checkpoint, 0..view.rows()).into_owned();
        for step in 1..view.rows() {
            let mut cut = Vec::new();
            for start in (0..view.rows()).step_by(step) {
                let rows = start..view.rows().min(start + step);
                cut.extend_from_slice(&view.rows_of(checkpoint, rows.clone()));
                view.prefetch(checkpoint, rows);
                checkpoint.release();
            }
            assert_eq!(cut, whole, "cut by {step}");
        }
        view.scatter(0..view.rows(), &whole, |tensor, at, bytes| {
            assert_eq!(&checkpoint.bytes(checkpoint.tensor(tensor).unwrap())[at..][..bytes.len()], bytes);
        })
        .unwrap();
        whole
    }

    #[test]
    fn transpose_slice_and_split() {
        let (_directory, checkpoint) = checkpoint(&[6, 2]);
        let transposed = view(&checkpoint, &[Step::Transpose]);
        assert_eq!(transposed.shape(), [2, 6]);
        assert_eq!(read(&transposed, &checkpoint), [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]);
        let odd = view(&checkpoint, &[Step::EveryOther { from_last: 1, odd: true }]);
        assert_eq!(read(&odd, &checkpoint), [2, 3, 6, 7, 10, 11]);
        let second = view(&checkpoint, &[Step::HalfOfRows(true)]);
        assert_eq!(read(&second, &checkpoint), [6, 7, 8, 9, 10, 11]);
        let heads = view(
            &checkpoint,
            &[Step::SplitRows(2), Step::Rows { start: 0, count: 2, of: 3 }, Step::Transpose],
        );
        assert_eq!(heads.shape(), [2, 2, 2]);
        assert_eq!(read(&heads, &checkpoint), [0, 2, 1, 3, 6, 8, 7, 9]);
        let last = view(&checkpoint, &[Step::EveryOther { from_last: 0, odd: true }]);
        assert_eq!((last.shape(), read(&last, &checkpoint)), (vec![6, 1], vec![1, 3, 5, 7, 9, 11]));
    }

    #[test]
    fn channels_go_behind_a_kernel_once() {
        let (_directory, checkpoint) = checkpoint(&[1, 3, 2, 2]);
        let turned = view(&checkpoint, &[Step::ChannelsLast]);
        assert_eq!(turned.shape(), [1, 2, 2, 3]);
        assert_eq!(read(&turned, &checkpoint), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
        assert_eq!(view(&checkpoint, &[Step::ChannelsLast, Step::ChannelsLast]), turned);
        for (shape, right) in [
            (&[4, 3, 2, 6, 6][..], &[4, 2, 6, 6, 3][..]),
            (&[4, 2, 6, 6, 3], &[4, 2, 6, 6, 3]),
            (&[4, 1, 3, 3], &[4, 3, 3, 1]),
            (&[4, 1, 5], &[4, 5, 1]),
            (&[4, 5, 1], &[4, 5, 1]),
        ] {
            let (_directory, checkpoint) = self::checkpoint(shape);
            assert_eq!(view(&checkpoint, &[Step::ChannelsLast]).shape(), right, "{shape:?}");
        }
        let (_directory, checkpoint) = self::checkpoint(&[4, 4]);
        assert!(View::new("t0", checkpoint.tensor("t0").unwrap(), &[Step::ChannelsLast]).is_err());
    }

    #[test]
    fn stacks_across_tensors() {
        let (_directory, checkpoint) = checkpoint(&[2, 2]);
        let one = |name: &str| View::new(name, checkpoint.tensor(name).unwrap(), &[Step::Transpose]).unwrap();
        let stacked = View::stack(vec![one("t0"), one("t1")]).unwrap();
        assert_eq!(stacked.shape(), [2, 2, 2]);
        assert_eq!(read(&stacked, &checkpoint), [0, 2, 1, 3, 4, 6, 5, 7]);
        let other = View::new("t0", checkpoint.tensor("t0").unwrap(), &[Step::SplitRows(2)]).unwrap();
        assert!(View::stack(vec![one("t0"), other]).is_none());
    }

    #[test]
    fn bytes_as_words() {
        let (_directory, checkpoint) = checkpoint(&[3, 2, 16]);
        let words = view(&checkpoint, &[Step::Words]);
        assert_eq!((words.dtype, words.shape()), (Dtype::U32, vec![3, 8]));
        assert_eq!(read(&words, &checkpoint), (0..96).collect::<Vec<u8>>());
    }

    #[test]
    fn steps_that_do_not_fit_are_errors() {
        let (_directory, checkpoint) = checkpoint(&[6, 2]);
        let tensor = checkpoint.tensor("t0").unwrap();
        for step in [
            Step::SplitRows(4),
            Step::SplitRows(0),
            Step::Rows { start: 4, count: 3, of: 6 },
            Step::Rows { start: 0, count: 0, of: 6 },
            Step::Rows { start: 0, count: 2, of: 7 },
            Step::EveryOther { from_last: 2, odd: false },
            Step::Words,
        ] {
            assert!(View::new("t0", tensor, std::slice::from_ref(&step)).is_err(), "{step:?}");
        }
    }
}
