//! A strided view of one source tensor.

use std::ops::Range;

use mlx_format::checkpoint::Checkpoint;
use mlx_format::{FloatType, fp};

/// A strided view of one source tensor, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) tensor: String,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) offset: usize,
    pub(super) blocks: Option<BlockScales>,
}

/// Scales of an fp8 weight: one float32 (or bfloat16) for each block of its rows and columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockScales {
    pub(super) tensor: String,
    /// Rows and columns of a block.
    pub(super) block: [usize; 2],
    /// Columns of the weight as stored.
    pub(super) columns: usize,
}

pub(super) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        // Overflows only beside an axis of length 0, where no stride is ever used.
        strides[axis - 1] = strides[axis].wrapping_mul(shape[axis]);
    }
    strides
}

impl Piece {
    /// Keeps `count` elements of an axis, `step` apart.
    pub(super) fn slice(&mut self, axis: usize, start: usize, count: usize, step: usize) {
        self.offset += start * self.strides[axis];
        self.shape[axis] = count;
        self.strides[axis] *= step;
    }

    /// fp8 elements times the scale of their block, rounded to bfloat16.
    pub(super) fn decode(
        &self,
        checkpoint: &Checkpoint,
        blocks: &BlockScales,
        rows: Range<usize>,
        out: &mut [u8],
    ) {
        let bytes = self.bytes(checkpoint);
        let tensor =
            checkpoint.tensor(&blocks.tensor).expect("a view is used with the checkpoint it was made for");
        let (float, scales) =
            (FloatType::from_dtype(tensor.dtype).unwrap_or(FloatType::F32), checkpoint.bytes(tensor));
        let scale = |index: usize| {
            let mut value = [0f32];
            float.widen(&scales[index * float.size()..][..float.size()], &mut value);
            value[0]
        };
        let per_row = blocks.columns.div_ceil(blocks.block[1]);
        let columns = self.shape.last().copied().unwrap_or(1);
        let stride = self.strides.last().copied().unwrap_or(1);
        let mut values = vec![0f32; columns];
        for (row, out) in rows.zip(out.chunks_exact_mut(columns * 2)) {
            let start = self.row_start(row);
            for (column, value) in values.iter_mut().enumerate() {
                let element = start + column * stride;
                let (i, j) = (element / blocks.columns, element % blocks.columns);
                let block = i / blocks.block[0] * per_row + j / blocks.block[1];
                *value = fp::e4m3_decode(bytes[element]) * scale(block);
            }
            FloatType::Bf16.narrow(&values, out);
        }
    }

    pub(super) fn bytes<'c>(&self, checkpoint: &'c Checkpoint) -> &'c [u8] {
        let tensor =
            checkpoint.tensor(&self.tensor).expect("a view is used with the checkpoint it was made for");
        checkpoint.bytes(tensor)
    }

    pub(super) fn is_row_major(&self) -> bool {
        let expected = row_major(&self.shape);
        // The stride of an axis of length 1 does not matter.
        self.shape.iter().zip(self.strides.iter().zip(&expected)).all(|(n, (a, b))| *n == 1 || a == b)
    }

    /// First element of a row.
    pub(super) fn row_start(&self, row: usize) -> usize {
        let outer = self.shape.len().saturating_sub(1);
        let mut rest = row;
        let mut start = self.offset;
        for axis in (0..outer).rev() {
            start += rest % self.shape[axis] * self.strides[axis];
            rest /= self.shape[axis];
        }
        start
    }

    pub(super) fn gather(&self, bytes: &[u8], rows: Range<usize>, size: usize, out: &mut [u8]) {
        let columns = self.shape.last().copied().unwrap_or(1);
        let stride = self.strides.last().copied().unwrap_or(1);
        let row_bytes = columns * size;
        if stride == 1 {
            for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
                out.copy_from_slice(&bytes[self.row_start(row) * size..][..row_bytes]);
            }
            return;
        }
        // Transposed: walk the source along its own rows, for blocks of output rows that share a matrix.
        let starts: Vec<usize> = rows.map(|row| self.row_start(row)).collect();
        for column in 0..columns {
            for (row, start) in starts.iter().enumerate() {
                let from = (start + column * stride) * size;
                out[row * row_bytes + column * size..][..size].copy_from_slice(&bytes[from..][..size]);
            }
        }
    }
}
