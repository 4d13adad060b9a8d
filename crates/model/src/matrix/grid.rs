//! Scales and zero points of a row.

use mlx_format::checkpoint::Checkpoint;
use mlx_format::fp;

use super::codes::interleaved;
use super::data::{Element, Matrix, ScaleKind, ZeroOrder, Zeros};
use super::stream::word;

/// What one row of a matrix has: a scale and a zero point for each group.
pub(super) struct Grid<'c> {
    matrix: &'c Matrix,
    stored: &'c [u8],
    zero_points: &'c [u8],
    global: Option<f32>,
    pub(super) scales: Vec<f32>,
    pub(super) zeros: Vec<i32>,
}

/// A word in which every code is 1.
const fn ones(bits: u32) -> u32 {
    u32::MAX / ((1 << bits) - 1)
}

fn bytes_of<'c>(checkpoint: &'c Checkpoint, name: &str) -> &'c [u8] {
    let tensor = checkpoint.tensor(name).expect("a view is used with the checkpoint it was made for");
    checkpoint.bytes(tensor)
}

/// The float32 number in a tensor.
pub(crate) fn number(checkpoint: &Checkpoint, name: &str) -> f32 {
    f32::from_bits(word(bytes_of(checkpoint, name), 0))
}

impl<'c> Grid<'c> {
    pub(super) fn open(matrix: &'c Matrix, checkpoint: &'c Checkpoint) -> Self {
        let zero_points = match &matrix.zeros {
            Zeros::Stored { tensor, .. } => bytes_of(checkpoint, tensor),
            _ => &[],
        };
        let groups = matrix.columns.div_ceil(matrix.scales.columns.max(1));
        Self {
            matrix,
            stored: bytes_of(checkpoint, &matrix.scales.tensor),
            zero_points,
            global: matrix.global.as_ref().map(|global| number(checkpoint, &global.tensor)),
            scales: vec![0.0; groups],
            zeros: vec![0; groups],
        }
    }

    /// The group of each column.
    pub(super) fn order(checkpoint: &Checkpoint, name: &str) -> Vec<usize> {
        bytes_of(checkpoint, name)
            .as_chunks::<4>()
            .0
            .iter()
            .map(|raw| u32::from_le_bytes(*raw) as usize)
            .collect()
    }

    fn index(&self, row: usize, group: usize) -> usize {
        let scales = &self.matrix.scales;
        let row = row / scales.rows.max(1);
        if scales.turned { group * self.matrix.rows + row } else { row * self.scales.len() + group }
    }

    /// Turns to a row.
    pub(super) fn row(&mut self, row: usize) {
        for group in 0..self.scales.len() {
            let index = self.index(row, group);
            let scale = match self.matrix.scales.kind {
                ScaleKind::Float(float) => {
                    let mut value = [0f32];
                    float.widen(&self.stored[index * float.size()..][..float.size()], &mut value);
                    value[0]
                }
                ScaleKind::E8m0 => e8m0(self.stored[index]),
                ScaleKind::E4m3 => fp::e4m3_decode(self.stored[index]),
            };
            self.scales[group] = match (&self.matrix.global, self.global) {
                (Some(global), Some(number)) if global.divides => scale / number,
                (Some(_), Some(number)) => scale * number,
                _ => scale,
            };
            self.zeros[group] = self.zero(row, group);
        }
    }

    fn zero(&self, row: usize, group: usize) -> i32 {
        let bits = self.matrix.codes.bits;
        let (bytes, groups) = (self.zero_points, self.scales.len());
        let middle = 1i32 << (bits - 1);
        let order = match &self.matrix.zeros {
            Zeros::None => return 0,
            Zeros::Middle => return middle,
            Zeros::Stored { order, .. } => *order,
        };
        match order {
            ZeroOrder::Down(stream) => i32::from(stream.code(row, |at| word(bytes, at * groups + group))),
            ZeroOrder::Along { stream, less_one } => {
                let own = stream.words(self.matrix.rows).unwrap_or(0);
                let crosses = !32u32.is_multiple_of(bits);
                let code = stream.code(row, |at| {
                    let stored = word(bytes, group * own + at);
                    if less_one && !crosses { stored.wrapping_add(ones(bits)) } else { stored }
                });
                let code = if less_one && crosses { (code + 1) & ((1 << bits) - 1) as u8 } else { code };
                i32::from(code)
            }
            ZeroOrder::Interleaved => {
                let own = self.matrix.rows / 8;
                (word(bytes, group * own + row / 8) >> (4 * interleaved(row)) & 15).cast_signed()
            }
            ZeroOrder::Signed => middle + i32::from(bytes[row * groups + group].cast_signed()),
        }
    }

    /// A scale as MLX's fp modes store it.
    pub(super) fn byte(&self, group: usize) -> u8 {
        let scale = self.scales[group];
        match (self.matrix.element, self.matrix.scales.kind) {
            (Element::E2m1, ScaleKind::E4m3) => fp::e4m3_encode(scale),
            // Its exponent; 2^-127 is subnormal.
            _ => (scale.to_bits() >> 23) as u8,
        }
    }
}

/// `2^(byte - 127)`; 255 is NaN.
fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        byte => f32::from_bits(u32::from(byte) << 23),
    }
}
