//! Where the codes of a row lie.

use std::ops::Range;

use mlx_format::checkpoint::Checkpoint;

use super::data::{Codes, Element, Matrix, Order};
use super::stream::{Stream, word};

/// Place of a row among the eight of a word: AutoAWQ packs rows 0, 2, 4, 6, 1, 3, 5, 7 (`awq/utils/packing_utils.py`).
pub(super) const fn interleaved(row: usize) -> usize {
    row % 8 / 2 + row % 2 * 4
}

impl Codes {
    /// Codes of `rows`, one a byte, row after row.
    pub(super) fn read(&self, checkpoint: &Checkpoint, matrix: &Matrix, rows: Range<usize>, out: &mut [u8]) {
        let tensor =
            checkpoint.tensor(&self.tensor).expect("a view is used with the checkpoint it was made for");
        let (bytes, columns) = (checkpoint.bytes(tensor), matrix.columns);
        match self.order {
            Order::Rows { padded } => {
                let length = bytes.len() / matrix.rows.max(1);
                for (row, out) in rows.zip(out.chunks_exact_mut(columns.max(1))) {
                    self.row(&bytes[row * length..][..length], padded, out);
                }
            }
            Order::Columns => self.columns(bytes, (matrix.rows, columns), rows, out),
            Order::Interleaved => {
                // Columns in blocks, so that the lines that are written stay in the cache.
                const BLOCK: usize = 64;
                let own = matrix.rows / 8;
                for start in (0..columns).step_by(BLOCK) {
                    let block = start..columns.min(start + BLOCK);
                    for (place, row) in rows.clone().enumerate() {
                        let shift = 4 * interleaved(row);
                        for column in block.clone() {
                            out[place * columns + column] =
                                (word(bytes, column * own + row / 8) >> shift & 15) as u8;
                        }
                    }
                }
            }
        }
        if matrix.element == Element::Signed {
            for code in out {
                *code ^= 0x80;
            }
        }
    }

    fn row(&self, bytes: &[u8], padded: bool, out: &mut [u8]) {
        match self.bits {
            8 => out.copy_from_slice(&bytes[..out.len()]),
            4 => {
                for (pair, byte) in out.chunks_mut(2).zip(bytes) {
                    pair[0] = byte & 15;
                    if let Some(high) = pair.get_mut(1) {
                        *high = byte >> 4;
                    }
                }
            }
            bits => {
                let stream = Stream { bits, padded };
                for (index, code) in out.iter_mut().enumerate() {
                    *code = stream.code(index, |at| word(bytes, at));
                }
            }
        }
    }

    fn columns(&self, bytes: &[u8], (all, columns): (usize, usize), rows: Range<usize>, out: &mut [u8]) {
        let bits = self.bits as usize;
        // As many words as hold whole codes.
        let (words, held) = if 32 % bits == 0 { (1, 32 / bits) } else { (bits, 32) };
        let mask = (1u128 << bits) - 1;
        for (block, start) in (0..columns).step_by(held).enumerate() {
            let end = columns.min(start + held);
            for (place, row) in rows.clone().enumerate() {
                let stream = (0..words).fold(0u128, |stream, at| {
                    stream | u128::from(word(bytes, (block * words + at) * all + row)) << (32 * at)
                });
                for (index, code) in
                    out[place * columns + start..place * columns + end].iter_mut().enumerate()
                {
                    *code = (stream >> (index * bits) & mask) as u8;
                }
            }
        }
    }
}
