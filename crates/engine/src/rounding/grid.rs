//! The searched grid: scales and biases that lose least, in the numbers that are stored.
//!
//! MLX's affine format lets a group's scale and bias be any numbers of the stored dtype; `mx.quantize` takes them from
//! the group's extremes. Here both edges of the range are moved inwards over a small grid and the best range is
//! improved by weighted least squares, every candidate being judged with scale and bias already rounded to the stored
//! dtype. The loss is `sum over columns of weight * (value - decoded)^2`. The grid of `mx.quantize` is among the
//! candidates, so that the loss is never above round-to-nearest's.
//!
//! Sixteen rows are searched side by side, one in each lane, so that no sum crosses lanes and the same bits come out on
//! every instruction set.

use mlx_format::FloatType;

/// Rows searched side by side.
pub(crate) const LANES: usize = 16;

/// One number for each of sixteen rows.
pub(crate) type Lanes = [f32; LANES];

/// Adding and taking it away rounds what is below 2^22 to a whole number, halves to even.
const ROUND: f32 = 12_582_912.0;
/// Positions of each edge that are tried.
const STEPS: usize = 7;
/// Rounds of least squares.
const REFINEMENTS: usize = 3;
/// How far edges move in a careful search, as a part of how far they move in a full one.
pub(crate) const CAREFUL: f32 = 0.25;
/// The smallest step, as in `mx.quantize`.
const EPS: f32 = 1e-7;

/// Which grids are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// That of `mx.quantize` alone.
    Plain,
    /// Both edges of the range move, then least squares.
    Full,
    /// Edges move a quarter as far, and one of them and zero stay exact, as in `mx.quantize`.
    Careful,
}

/// Scale and bias of one group of sixteen rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    pub(crate) scale: Lanes,
    pub(crate) bias: Lanes,
}

/// How far an edge moves inwards at most, as a fraction of the range: the fewer codes, the further.
pub(crate) const fn reach(bits: u32) -> f32 {
    match bits {
        0..=2 => 0.36,
        3 => 0.27,
        4 => 0.2,
        5 => 0.14,
        6 => 0.09,
        _ => 0.04,
    }
}

/// The code of a value, as a number, for any finite value.
#[inline(always)]
pub(crate) fn code(value: f32, inverse: f32, bias: f32, most: f32) -> f32 {
    let code = (value - bias) * inverse;
    let code = if code > 0.0 { code } else { 0.0 };
    let code = if code < most { code } else { most };
    (code + ROUND) - ROUND
}

/// Rounds to the stored dtype. Values are finite.
#[inline(always)]
pub(crate) fn stored<const N: usize>(float: FloatType, values: &mut [f32; N]) {
    match float {
        FloatType::F32 => {}
        FloatType::Bf16 => {
            for value in values {
                let bits = value.to_bits();
                *value = f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000);
            }
        }
        FloatType::F16 => {
            for value in values {
                *value = float.round(*value);
            }
        }
    }
}

/// What one element weighs beside its column's weight: all alike, or large ones more.
#[inline(always)]
pub(super) fn weighed(column: &Lanes, heavy: Option<&Lanes>, lane: usize) -> f32 {
    heavy.map_or(1.0, |mean| mean[lane] + column[lane] * column[lane])
}

#[inline(always)]
pub(super) fn mean_square(columns: &[Lanes]) -> Lanes {
    let mut sum = [0.0; LANES];
    for column in columns {
        for lane in 0..LANES {
            sum[lane] += column[lane] * column[lane];
        }
    }
    let part = 1.0 / columns.len().max(1) as f32;
    for sum in &mut sum {
        *sum *= part;
    }
    sum
}

impl Grid {
    #[inline(always)]
    fn of_range(low: &Lanes, high: &Lanes, most: f32, float: FloatType) -> Self {
        let mut grid = Self { scale: [0.0; LANES], bias: *low };
        for lane in 0..LANES {
            let step = (high[lane] - low[lane]) / most;
            grid.scale[lane] = if step < EPS { EPS } else { step };
        }
        stored(float, &mut grid.scale);
        stored(float, &mut grid.bias);
        grid
    }

    /// That of `mx.quantize`.
    #[inline(always)]
    fn plain(low: &Lanes, high: &Lanes, most: f32, float: FloatType) -> Self {
        let mut grid = Self { scale: [0.0; LANES], bias: [0.0; LANES] };
        for lane in 0..LANES {
            let step = (high[lane] - low[lane]) / most;
            let step = if step < EPS { EPS } else { step };
            let negative = low[lane].abs() > high[lane].abs();
            let scale = if negative { step } else { -step };
            let edge = if negative { low[lane] } else { high[lane] };
            let zero = (edge / scale + ROUND) - ROUND;
            grid.scale[lane] = if zero == 0.0 { scale } else { edge / zero };
            grid.bias[lane] = if zero == 0.0 { 0.0 } else { edge };
        }
        stored(float, &mut grid.scale);
        stored(float, &mut grid.bias);
        grid
    }

    #[inline(always)]
    pub(crate) fn inverse(&self) -> Lanes {
        let mut inverse = self.scale;
        for value in &mut inverse {
            // float16 may have rounded the scale of a group of equal values to zero.
            *value = if *value == 0.0 { 0.0 } else { 1.0 / *value };
        }
        inverse
    }

    #[inline(always)]
    fn loss(&self, columns: &[Lanes], weights: &[f32], heavy: Option<&Lanes>, most: f32) -> Lanes {
        let inverse = self.inverse();
        let mut loss = [0.0; LANES];
        for (column, &weight) in columns.iter().zip(weights) {
            for lane in 0..LANES {
                let code = code(column[lane], inverse[lane], self.bias[lane], most);
                let error = column[lane] - (code * self.scale[lane] + self.bias[lane]);
                loss[lane] += weight * weighed(column, heavy, lane) * (error * error);
            }
        }
        loss
    }

    /// Takes over those lanes of `other` whose loss is lower.
    #[inline(always)]
    fn improve(&mut self, best: &mut Lanes, other: &Self, loss: &Lanes) {
        for lane in 0..LANES {
            let better = loss[lane] < best[lane];
            best[lane] = if better { loss[lane] } else { best[lane] };
            self.scale[lane] = if better { other.scale[lane] } else { self.scale[lane] };
            self.bias[lane] = if better { other.bias[lane] } else { self.bias[lane] };
        }
    }

    /// The best scale and bias for the codes that this grid gives.
    #[inline(always)]
    fn refined(
        &self,
        columns: &[Lanes],
        weights: &[f32],
        heavy: Option<&Lanes>,
        most: f32,
        float: FloatType,
    ) -> Self {
        let inverse = self.inverse();
        let middle = most / 2.0;
        let mut total = [0.0f32; LANES];
        let ([mut q, mut qq, mut w], mut qw) = ([[0.0f32; LANES]; 3], [0.0f32; LANES]);
        for (column, &weight) in columns.iter().zip(weights) {
            for lane in 0..LANES {
                let weight = weight * weighed(column, heavy, lane);
                total[lane] += weight;
                // Codes around zero, so that 8 bits do not cancel.
                let code = code(column[lane], inverse[lane], self.bias[lane], most) - middle;
                let weighted = weight * code;
                q[lane] += weighted;
                qq[lane] += weighted * code;
                w[lane] += weight * column[lane];
                qw[lane] += weighted * column[lane];
            }
        }
        let mut grid = *self;
        for lane in 0..LANES {
            let determinant = total[lane] * qq[lane] - q[lane] * q[lane];
            let sound = determinant > 1e-6 * total[lane] * qq[lane];
            let scale = (total[lane] * qw[lane] - q[lane] * w[lane]) / determinant;
            let center = (w[lane] - scale * q[lane]) / total[lane];
            grid.scale[lane] = if sound { scale } else { self.scale[lane] };
            grid.bias[lane] = if sound { center - scale * middle } else { self.bias[lane] };
        }
        stored(float, &mut grid.scale);
        stored(float, &mut grid.bias);
        grid
    }
}

/// The grid of least weighted loss among those tried. `columns` holds one group, `weights` one weight (not negative) a
/// column.
///
/// Inlined, so that it runs in its caller's instruction set.
#[inline(always)]
pub(crate) fn search_in(
    columns: &[Lanes],
    weights: &[f32],
    bits: u32,
    float: FloatType,
    search: Search,
    blind: bool,
) -> Grid {
    let most = ((1u32 << bits) - 1) as f32;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for column in columns {
        for lane in 0..LANES {
            low[lane] = if column[lane] < low[lane] { column[lane] } else { low[lane] };
            high[lane] = if column[lane] > high[lane] { column[lane] } else { high[lane] };
        }
    }
    let mut best = Grid::plain(&low, &high, most, float);
    if search == Search::Plain {
        return best;
    }
    let careful = search == Search::Careful;
    let mean = mean_square(columns);
    let heavy = blind.then_some(&mean);
    let mut least = best.loss(columns, weights, heavy, most);
    let unit = reach(bits) * if careful { CAREFUL } else { 1.0 } / (STEPS - 1) as f32;
    for from_low in 0..STEPS {
        for from_high in 0..STEPS {
            let (mut lower, mut upper) = (low, high);
            for lane in 0..LANES {
                let range = high[lane] - low[lane];
                lower[lane] = low[lane] + range * (unit * from_low as f32);
                upper[lane] = high[lane] - range * (unit * from_high as f32);
            }
            let grid = if careful {
                Grid::plain(&lower, &upper, most, float)
            } else {
                Grid::of_range(&lower, &upper, most, float)
            };
            let loss = grid.loss(columns, weights, heavy, most);
            best.improve(&mut least, &grid, &loss);
        }
    }
    for _ in 0..if careful { 0 } else { REFINEMENTS } {
        let grid = best.refined(columns, weights, heavy, most, float);
        let loss = grid.loss(columns, weights, heavy, most);
        best.improve(&mut least, &grid, &loss);
    }
    best
}
