//! A matrix as other quantizers pack it: codes, scales and zero points of a `[rows, columns]` weight, each in a tensor of its own.
//!
//! `weight = element(code) * scale`, where an integer element is `code - zero`. Every packing that is read here is this
//! with another order of codes ([`Order`]), another kind of element and scales of another shape, so one reader decodes
//! all of them to float32 ([`Part::Values`]) and gives the parts that MLX stores ([`Part::Words`], [`Part::Scales`],
//! [`Part::Biases`]) where MLX's format holds the same numbers ([`Matrix::scheme`]). Rows are read a few at a time.

mod codes;
mod data;
mod grid;
mod stream;

use std::ops::Range;

use mlx_format::checkpoint::Checkpoint;
use mlx_format::{Dtype, FloatType, Mode, Scheme, fp};

pub(crate) use self::data::{
    Codes, Element, Global, Matrix, Order, Part, ScaleKind, Scales, ZeroOrder, Zeros,
};
use self::grid::Grid;
pub(crate) use self::stream::Stream;

/// A group size of MLX's affine mode that divides these groups.
fn affine_group(group: usize) -> Option<usize> {
    [128, 64, 32].into_iter().find(|size| group.is_multiple_of(*size))
}

impl Matrix {
    /// The scheme in which MLX holds exactly these numbers.
    ///
    /// # Errors
    /// What MLX's format lacks for them.
    pub(crate) fn scheme(&self) -> Result<Scheme, String> {
        if let Some(obstacle) = &self.obstacle {
            return Err(obstacle.clone());
        }
        if self.groups.is_some() {
            return Err("its groups are not consecutive columns (g_idx), which MLX's always are".to_owned());
        }
        let group = self.scales.columns.min(self.columns);
        let whole = self.columns.is_multiple_of(group.max(1));
        let none = |what: String| Err(format!("{what}, for which MLX has no form"));
        let fixed = |mode: Mode| {
            let (_, size) = mode.defaults();
            match Scheme::new(mode, None, None) {
                Ok(scheme) if whole && group.is_multiple_of(size) => Ok(scheme),
                _ => none(format!("it has groups of {group} of {} columns", self.columns)),
            }
        };
        match (self.element, self.scales.kind) {
            (Element::Integer | Element::Signed, ScaleKind::Float(_)) => {
                let scheme = affine_group(group)
                    .filter(|_| whole)
                    .and_then(|size| Scheme::affine(self.codes.bits, size).ok()?.widely_loaded().ok());
                scheme.map_or_else(
                    || {
                        none(format!(
                            "it has {} bits in groups of {group} of {} columns",
                            self.codes.bits, self.columns
                        ))
                    },
                    Ok,
                )
            }
            (Element::E4m3, ScaleKind::E8m0) => fixed(Mode::Mxfp8),
            (Element::E2m1, ScaleKind::E8m0) => fixed(Mode::Mxfp4),
            (Element::E2m1, ScaleKind::E4m3) => fixed(Mode::Nvfp4),
            (Element::E4m3, _) => none("it is float8 with scales that are no powers of two".to_owned()),
            _ => none("its scales are of another kind than its elements".to_owned()),
        }
    }

    /// The dtype of decoded weights: float32, which holds every product exactly but those of float8 and a number. Where
    /// that number is a `weight_scale_inv`, mlx-lm's rounding to bfloat16 is the model (`mlx_lm/models/deepseek_v3.py`, `dequant`).
    pub(crate) fn decoded(&self) -> FloatType {
        let inverse = self.scales.tensor.ends_with("_scale_inv");
        match (self.element, self.scales.kind) {
            (Element::E4m3, ScaleKind::Float(_)) if inverse => FloatType::Bf16,
            _ => FloatType::F32,
        }
    }

    /// The dtype that decoded weights have in a file where nothing asks for another.
    pub(crate) fn usual(&self) -> FloatType {
        match self.scales.kind {
            ScaleKind::Float(FloatType::F16) => FloatType::F16,
            _ => FloatType::Bf16,
        }
    }

    /// Whether MLX has codes for such a packing, so that decoding it is a choice.
    pub(crate) fn has_codes(&self) -> bool {
        !matches!((self.element, self.scales.kind), (Element::E4m3, ScaleKind::Float(_)))
    }

    /// The dtype in which MLX's scales and biases hold this grid: that of the scales where zero points are powers of two,
    /// else float32, as a product of a scale and another zero point needs more bits than the scale has.
    pub(crate) fn exact(&self) -> FloatType {
        match (self.scales.kind, &self.zeros) {
            (ScaleKind::Float(float), Zeros::Middle | Zeros::Stored { trusted: true, .. }) => float,
            _ => FloatType::F32,
        }
    }

    /// dtype of a part.
    pub(crate) fn dtype(&self, part: Part) -> Dtype {
        match part {
            Part::Words => Dtype::U32,
            Part::Scales(_) if matches!(self.element, Element::E4m3 | Element::E2m1) => Dtype::U8,
            Part::Values(float) | Part::Scales(float) | Part::Biases(float) => float.dtype(),
        }
    }

    /// Elements of a row of a part; those of codes and scales as `scheme` has them.
    pub(crate) fn width(&self, part: Part) -> usize {
        let packed = |width: &dyn Fn(Scheme) -> usize| self.scheme().map_or(0, width);
        match part {
            Part::Values(_) => self.columns,
            Part::Words => packed(&|scheme| scheme.words(self.columns)),
            Part::Scales(_) | Part::Biases(_) => packed(&|scheme| scheme.groups(self.columns)),
        }
    }

    /// Names of the tensors that a part is read from, the codes first where they are.
    pub(crate) fn sources(&self, part: Part) -> impl Iterator<Item = &str> {
        let codes = matches!(part, Part::Values(_) | Part::Words).then_some(self.codes.tensor.as_str());
        let scales = (part != Part::Words).then_some(self.scales.tensor.as_str());
        let zeros = match &self.zeros {
            Zeros::Stored { tensor, .. } if matches!(part, Part::Values(_) | Part::Biases(_)) => {
                Some(tensor.as_str())
            }
            _ => None,
        };
        let global =
            self.global.as_ref().filter(|_| part != Part::Words).map(|global| global.tensor.as_str());
        let groups = self.groups.as_deref().filter(|_| matches!(part, Part::Values(_)));
        codes.into_iter().chain(scales).chain(zeros).chain(global).chain(groups)
    }

    /// Bytes of the source behind `rows` rows, scales left aside.
    pub(crate) fn stored_bytes(&self, rows: usize) -> usize {
        rows.saturating_mul(self.columns).saturating_mul(self.codes.bits as usize) / 8
    }

    /// Whether a row's codes lie all over their tensor.
    pub(crate) fn is_spread(&self) -> bool {
        !matches!(self.codes.order, Order::Rows { .. })
    }

    /// Asks the system to read the codes behind some rows ahead.
    pub(crate) fn prefetch(&self, checkpoint: &Checkpoint, rows: Range<usize>) {
        let Some(tensor) = checkpoint.tensor(&self.codes.tensor) else { return };
        let row = tensor.bytes() / self.rows.max(1);
        let range = if self.is_spread() { 0..tensor.bytes() } else { rows.start * row..rows.end * row };
        checkpoint.prefetch(tensor, range);
    }

    /// Rows `rows` of a part, whole, little-endian; `out` has exactly their size.
    ///
    /// # Panics
    /// If the checkpoint is not the one that this was made for.
    pub(crate) fn read(&self, checkpoint: &Checkpoint, part: Part, rows: Range<usize>, out: &mut [u8]) {
        match part {
            Part::Values(float) => self.values(checkpoint, float, rows, out),
            Part::Words => {
                let Ok(scheme) = self.scheme() else { return };
                let mut codes = vec![0u8; rows.len() * self.columns];
                self.codes.read(checkpoint, self, rows, &mut codes);
                match scheme.mode() {
                    Mode::Affine => mlx_format::pack(scheme, &codes, out),
                    Mode::Mxfp8 => out.copy_from_slice(&codes),
                    Mode::Mxfp4 | Mode::Nvfp4 => {
                        for (byte, pair) in out.iter_mut().zip(codes.chunks_exact(2)) {
                            *byte = pair[0] | pair[1] << 4;
                        }
                    }
                }
            }
            Part::Scales(float) => self.grids(checkpoint, rows, out, |grid, group, out: &mut Vec<u8>| {
                if self.dtype(part) == Dtype::U8 {
                    out.push(grid.byte(group));
                } else {
                    push(float, grid.scales[group], out);
                }
            }),
            Part::Biases(float) => self.grids(checkpoint, rows, out, |grid, group, out: &mut Vec<u8>| {
                let bias = -(grid.zeros[group] as f32) * grid.scales[group];
                // Never a number that is not the source's.
                push(float, if float.round(bias) == bias { bias } else { f32::NAN }, out);
            }),
        }
    }

    fn values(&self, checkpoint: &Checkpoint, float: FloatType, rows: Range<usize>, out: &mut [u8]) {
        let mut codes = vec![0u8; rows.len() * self.columns];
        self.codes.read(checkpoint, self, rows.clone(), &mut codes);
        let mut grid = Grid::open(self, checkpoint);
        let order = self.groups.as_ref().map(|name| Grid::order(checkpoint, name));
        let mut values = vec![0f32; self.columns];
        let last = grid.scales.len().saturating_sub(1);
        let lines = codes
            .chunks_exact(self.columns.max(1))
            .zip(out.chunks_exact_mut(self.columns.max(1) * float.size()));
        for (row, (codes, out)) in rows.zip(lines) {
            grid.row(row);
            let of = |code: u8, group: usize| {
                let scale = grid.scales[group];
                match self.element {
                    Element::Integer | Element::Signed => {
                        (i32::from(code) - grid.zeros[group]) as f32 * scale
                    }
                    Element::E4m3 => fp::e4m3_decode(code) * scale,
                    Element::E2m1 => fp::E2M1[usize::from(code & 15)] * scale,
                }
            };
            if let Some(order) = &order {
                for ((value, code), group) in values.iter_mut().zip(codes).zip(order) {
                    *value = of(*code, (*group).min(last));
                }
            } else {
                let size = self.scales.columns.max(1);
                for (group, (values, codes)) in values.chunks_mut(size).zip(codes.chunks(size)).enumerate() {
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = of(*code, group);
                    }
                }
            }
            float.narrow(&values, out);
        }
    }

    /// What `write` makes of each of MLX's groups.
    fn grids(
        &self,
        checkpoint: &Checkpoint,
        rows: Range<usize>,
        out: &mut [u8],
        write: impl Fn(&Grid<'_>, usize, &mut Vec<u8>),
    ) {
        let Ok(scheme) = self.scheme() else { return };
        let mut grid = Grid::open(self, checkpoint);
        let mut bytes = Vec::with_capacity(out.len());
        for row in rows {
            grid.row(row);
            for group in 0..scheme.groups(self.columns) {
                write(&grid, group * scheme.group_size() / self.scales.columns.max(1), &mut bytes);
            }
        }
        out.copy_from_slice(&bytes);
    }
}

fn push(float: FloatType, value: f32, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + float.size(), 0);
    float.narrow(&[value], &mut out[start..]);
}
