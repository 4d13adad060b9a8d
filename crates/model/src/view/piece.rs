//! A strided view of one source tensor.

use std::ops::Range;
use std::sync::Arc;

use mlx_format::checkpoint::Checkpoint;

use crate::matrix::{Matrix, Part};

/// A strided view of one source tensor, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) tensor: String,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) offset: usize,
    pub(super) packed: Option<Packed>,
}

/// A part of a packed matrix that takes the place of a tensor's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) matrix: Arc<Matrix>,
    pub(super) part: Part,
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

    /// Rows of a packed matrix, `size` bytes an element, decoded or as MLX has them.
    pub(super) fn unpack(
        &self,
        checkpoint: &Checkpoint,
        packed: &Packed,
        rows: Range<usize>,
        size: usize,
        out: &mut [u8],
    ) {
        let Packed { matrix, part } = packed;
        let (columns, stride) =
            (self.shape.last().copied().unwrap_or(1), self.strides.last().copied().unwrap_or(1));
        let width = matrix.width(*part).max(1);
        let lines: Vec<(usize, usize)> =
            rows.map(|row| self.row_start(row)).map(|start| (start / width, start % width)).collect();
        if stride >= width && columns > 1 {
            return self.turn(checkpoint, packed, (&lines, width), size, out);
        }
        let mut source = Vec::new();
        let mut done = 0;
        while done < lines.len() {
            let (first, _) = lines[done];
            let run = lines[done..].iter().enumerate().take_while(|(at, line)| line.0 == first + at).count();
            let out = &mut out[done * columns * size..][..run * columns * size];
            if columns == width && stride == 1 {
                matrix.read(checkpoint, *part, first..first + run, out);
            } else {
                source.resize(run * width * size, 0);
                matrix.read(checkpoint, *part, first..first + run, &mut source);
                for (at, out) in out.chunks_exact_mut(columns * size).enumerate() {
                    let own = &source[(at * width + lines[done + at].1) * size..];
                    for (column, out) in out.chunks_exact_mut(size).enumerate() {
                        out.copy_from_slice(&own[column * stride * size..][..size]);
                    }
                }
            }
            done += run;
        }
    }

    /// Rows that are columns of the packed matrix: each of its rows is decoded once for all of them that begin in one row.
    fn turn(
        &self,
        checkpoint: &Checkpoint,
        packed: &Packed,
        (lines, width): (&[(usize, usize)], usize),
        size: usize,
        out: &mut [u8],
    ) {
        /// Rows of the matrix at a time.
        const BLOCK: usize = 32;
        let columns = self.shape.last().copied().unwrap_or(1);
        let mut source = Vec::new();
        let mut done = 0;
        while done < lines.len() {
            let first = lines[done].0;
            let run = lines[done..].iter().take_while(|line| line.0 == first).count();
            for start in (0..columns).step_by(BLOCK) {
                let block = start..columns.min(start + BLOCK);
                source.resize(block.len() * width * size, 0);
                let apart = self.strides.last().map_or(1, |stride| stride / width);
                if apart == 1 {
                    let rows = first + block.start..first + block.end;
                    packed.matrix.read(checkpoint, packed.part, rows, &mut source);
                } else {
                    for (column, line) in block.clone().zip(source.chunks_exact_mut(width * size)) {
                        let row = first + column * apart;
                        packed.matrix.read(checkpoint, packed.part, row..row + 1, line);
                    }
                }
                for (at, line) in lines[done..done + run].iter().enumerate() {
                    for (place, column) in block.clone().enumerate() {
                        let from = (place * width + line.1) * size;
                        out[((done + at) * columns + column) * size..][..size]
                            .copy_from_slice(&source[from..][..size]);
                    }
                }
            }
            done += run;
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
