//! A weight in the numbers that a checkpoint stores.

use std::ops::Range;

use mlx_format::fp::{E2M1, e4m3_decode, scale_byte, scale_of};
use mlx_format::{Mode, Scheme};

/// A weight in stored numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Mode, bits, group size.
    pub scheme: Scheme,
    /// Input features.
    pub columns: usize,
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, numbers of the stored dtype, or what the stored bytes stand for.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, numbers of the stored dtype; none in the fp modes.
    pub biases: Vec<f32>,
}

/// Powers of two that are looked for in [`Rounded::room`].
const ROOM: i32 = 16;

impl Rounded {
    /// The weight that these numbers stand for, `[rows, columns]`, as the stored file decodes in float32.
    pub fn decoded(&self) -> Vec<f32> {
        let group = self.scheme.group_size();
        let mut out = vec![0f32; self.codes.len()];
        let table = match self.scheme.mode() {
            Mode::Affine => None,
            Mode::Mxfp8 => Some(std::array::from_fn(|code| e4m3_decode(code as u8))),
            Mode::Mxfp4 | Mode::Nvfp4 => Some(std::array::from_fn::<_, 256, _>(|code| E2M1[code % 16])),
        };
        let groups = out.chunks_exact_mut(group).zip(self.codes.chunks_exact(group)).zip(&self.scales);
        for (at, ((out, codes), scale)) in groups.enumerate() {
            if let Some(table) = &table {
                for (value, &code) in out.iter_mut().zip(codes) {
                    *value = table[code as usize] * scale;
                }
            } else {
                let bias = self.biases[at];
                for (value, &code) in out.iter_mut().zip(codes) {
                    *value = code as f32 * scale + bias;
                }
            }
        }
        out
    }

    /// The bytes of the scales, as the fp modes store them.
    pub fn scale_bytes(&self) -> Vec<u8> {
        self.scales.iter().map(|scale| scale_byte(self.scheme.mode(), *scale)).collect()
    }

    /// For each row the powers of two by which [`Rounded::scale_rows`] may multiply it, the smallest and the largest:
    /// beyond them a scale would be no number of the fp mode any more. The affine mode has room.
    pub fn room(&self) -> Vec<(f32, f32)> {
        let mode = self.scheme.mode();
        let groups = self.columns / self.scheme.group_size();
        let fits = |scales: &[f32], factor: f32| {
            let fits = |scale: f32| scale.is_finite() && scale_of(mode, scale_byte(mode, scale)) == scale;
            scales.iter().all(|scale| fits(scale * factor))
        };
        let room = |scales: &[f32]| {
            if mode == Mode::Affine {
                return (0.0, f32::INFINITY);
            }
            let furthest = |step: f32| {
                let powers = (1..=ROOM).map(|power| step.powi(power));
                powers.take_while(|factor| fits(scales, *factor)).last().unwrap_or(1.0)
            };
            (furthest(0.5), furthest(2.0))
        };
        self.scales.chunks_exact(groups.max(1)).map(room).collect()
    }

    /// Some of the rows.
    #[must_use]
    pub fn rows_of(&self, rows: Range<usize>) -> Self {
        let groups = self.columns / self.scheme.group_size();
        let numbers = rows.start * groups..rows.end * groups;
        Self {
            scheme: self.scheme,
            columns: self.columns,
            codes: self.codes[rows.start * self.columns..rows.end * self.columns].to_vec(),
            scales: self.scales[numbers.clone()].to_vec(),
            biases: self.biases.get(numbers).map(<[f32]>::to_vec).unwrap_or_default(),
        }
    }

    /// Puts the rows of another weight of this scheme and width below these.
    pub(crate) fn append(&mut self, mut below: Self) {
        self.codes.append(&mut below.codes);
        self.scales.append(&mut below.scales);
        self.biases.append(&mut below.biases);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.codes.len() / self.columns.max(1)
    }

    /// Multiplies rows by powers of two: exact, codes stay. In the fp modes within [`Rounded::room`].
    pub fn scale_rows(&mut self, first: usize, factors: &[f32]) {
        let groups = self.columns / self.scheme.group_size();
        for numbers in [&mut self.scales, &mut self.biases].into_iter().filter(|numbers| !numbers.is_empty())
        {
            for (row, factor) in numbers[first * groups..].chunks_exact_mut(groups).zip(factors) {
                for value in row {
                    *value *= factor;
                }
            }
        }
    }
}
