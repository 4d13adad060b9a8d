//! Sixty-four rows of a weight, which are rounded column by column.
//!
//! They lie transposed, a column's values side by side, so that every step is the same arithmetic in every lane.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use mlx_format::{FloatType, Scheme};

use super::elements::{Elements, Scales, numbers};
use super::float_grid::search_float;
use super::grid::{Grid, LANES, Lanes, Search, search_in, stored};
use super::way::{Held, ROWS, Way};
use crate::exp::vectorised;

/// Largest group size of the format.
const MAX_GROUP: usize = 128;

/// Sixty-four values side by side.
type Column = [f32; ROWS];

/// Rows while they are rounded.
pub(super) struct Task {
    columns: usize,
    group: usize,
    bits: u32,
    elements: Elements,
    numbers: Scales,
    /// By column, in rounding order; after rounding, what the stored numbers decode to.
    values: Vec<Column>,
    /// As elements.
    codes: Vec<Column>,
    scales: Vec<Column>,
    biases: Vec<Column>,
}

impl Task {
    pub(super) fn new(
        values: &[f32],
        columns: usize,
        scheme: Scheme,
        float: FloatType,
        how: Way<'_>,
    ) -> Self {
        let mut transposed = vec![[0f32; ROWS]; columns];
        for (lane, row) in values.chunks_exact(columns).enumerate() {
            match how {
                Way::Plain | Way::Blind { .. } | Way::Careful { .. } | Way::Nearest { .. } => {
                    transposed.iter_mut().zip(row).for_each(|(column, value)| column[lane] = *value);
                }
                Way::Refined { factor, .. } | Way::Compensated { factor, .. } => {
                    let order = factor.order.iter();
                    transposed.iter_mut().zip(order).for_each(|(column, &from)| column[lane] = row[from]);
                }
            }
        }
        let groups = columns / scheme.group_size();
        let (elements, numbers) = numbers(scheme, float);
        Self {
            columns,
            group: scheme.group_size(),
            bits: scheme.bits(),
            elements,
            numbers,
            values: transposed,
            codes: vec![[0.0; ROWS]; columns],
            scales: vec![[0.0; ROWS]; groups],
            biases: vec![[0.0; ROWS]; groups],
        }
    }

    /// Chooses codes, scales and biases.
    pub(super) fn run(&mut self, how: Way<'_>) {
        match how {
            Way::Plain => self.nearest(&vec![0.0; self.columns], Search::Plain, false),
            Way::Blind { weights } => self.nearest(weights, Search::Full, true),
            Way::Careful { weights, blind } => self.nearest(weights, Search::Careful, blind),
            Way::Nearest { weights } => self.nearest(weights, Search::Full, false),
            Way::Refined { factor, block_size, sweeps } => {
                let block = block_size.clamp(1, self.columns).next_multiple_of(self.group);
                let original = self.values.clone();
                let weights: Vec<f32> =
                    (0..self.columns).map(|at| factor.hessian[at * self.columns + at]).collect();
                self.nearest(&weights, Search::Full, false);
                self.descend(factor, block, &original, sweeps);
            }
            Way::Compensated { factor, block_size, sweeps } => {
                let block = block_size.clamp(1, self.columns).next_multiple_of(self.group);
                let original = if sweeps > 0 { self.values.clone() } else { Vec::new() };
                self.compensate(factor, block);
                self.descend(factor, block, &original, sweeps);
            }
        }
    }

    /// Searches scale and bias of the group that begins at `start`.
    #[inline(always)]
    fn search(&mut self, start: usize, weights: &[f32], search: Search, blind: bool) {
        let mut tile = [[0f32; LANES]; MAX_GROUP];
        let tile = &mut tile[..self.group];
        for part in 0..ROWS / LANES {
            for (to, from) in tile.iter_mut().zip(&self.values[start..]) {
                to.copy_from_slice(&from[part * LANES..][..LANES]);
            }
            let (weights, place) = (&weights[start..start + self.group], part * LANES);
            let grid = match self.numbers {
                Scales::Float(float) => search_in(tile, weights, self.bits, float, search, blind),
                numbers => {
                    let scale = search_float(tile, weights, self.elements, numbers, blind);
                    Grid { scale, bias: [0.0; LANES] }
                }
            };
            self.scales[start / self.group][place..][..LANES].copy_from_slice(&grid.scale);
            self.biases[start / self.group][place..][..LANES].copy_from_slice(&grid.bias);
        }
    }

    /// Codes of one column; its values become what they decode to. Gives what was lost.
    #[inline(always)]
    fn encode(&mut self, at: usize, inverse: &Column) -> Column {
        let (scale, bias) = (&self.scales[at / self.group], &self.biases[at / self.group]);
        let values = &mut self.values[at];
        let codes = self.elements.nearest(values, inverse, bias);
        let mut lost = [0f32; ROWS];
        for lane in 0..ROWS {
            let value = values[lane];
            let decoded = codes[lane] * scale[lane] + bias[lane];
            values[lane] = decoded;
            lost[lane] = value - decoded;
        }
        self.codes[at] = codes;
        lost
    }

    #[inline(always)]
    fn inverse(&self, group: usize) -> Column {
        let mut inverse = [0f32; ROWS];
        for (part, out) in inverse.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let scale: Lanes = std::array::from_fn(|lane| self.scales[group][part * LANES + lane]);
            *out = Grid { scale, bias: scale }.inverse();
        }
        inverse
    }

    fn nearest(&mut self, weights: &[f32], search: Search, blind: bool) {
        vectorised(
            #[inline(always)]
            || {
                for start in (0..self.columns).step_by(self.group) {
                    self.search(start, weights, search, blind);
                    let inverse = self.inverse(start / self.group);
                    for at in start..start + self.group {
                        self.encode(at, &inverse);
                    }
                }
            },
        );
    }

    /// GPTQ, `block` columns at a time.
    fn compensate(&mut self, factor: Held<'_>, block: usize) {
        let size = self.columns;
        let weights = factor.weights();
        let mut errors = vec![[0f32; ROWS]; block];
        for first in (0..size).step_by(block) {
            let end = (first + block).min(size);
            vectorised(
                #[inline(always)]
                || {
                    for at in first..end {
                        if at % self.group == 0 {
                            self.search(at, &weights, Search::Full, false);
                        }
                        let inverse = self.inverse(at / self.group);
                        let mut error = self.encode(at, &inverse);
                        let row = &factor.upper[at * size..][..size];
                        let diagonal = 1.0 / row[at];
                        for error in &mut error {
                            *error *= diagonal;
                        }
                        subtract(&mut self.values[at + 1..end], &row[at + 1..end], &error);
                        errors[at - first] = error;
                    }
                },
            );
            // values[end..] -= U[first..end, end..]^T errors
            update(&mut self.values[end..], factor.upper, (first, end), end, size, &errors, true);
        }
    }

    /// Coordinate descent: each group's scale and bias by least squares, then each of its codes.
    fn descend(&mut self, factor: Held<'_>, block: usize, original: &[Column], sweeps: usize) {
        if sweeps == 0 {
            return;
        }
        let size = self.columns;
        let hessian = factor.hessian;
        // H (original - decoded): half the negative gradient of the error.
        let mut gradient = vec![[0f32; ROWS]; size];
        let lost: Vec<Column> = original
            .iter()
            .zip(&self.values)
            .map(|(a, b)| std::array::from_fn(|lane| a[lane] - b[lane]))
            .collect();
        update(&mut gradient, hessian, (0, size), 0, size, &lost, false);
        drop(lost);
        for _ in 0..sweeps {
            for first in (0..size).step_by(block) {
                let end = (first + block).min(size);
                let mut changes = vec![[0f32; ROWS]; end - first];
                vectorised(
                    #[inline(always)]
                    || {
                        for at in first..end {
                            if at % self.group == 0 {
                                self.refit(at, hessian, &mut gradient[first..end], &mut changes, first);
                            }
                            self.recode(at, hessian, &mut gradient[first..end], &mut changes, first);
                        }
                    },
                );
                if changes.iter().flatten().any(|change| *change != 0.0) {
                    let (before, after) = gradient.split_at_mut(first);
                    update(before, hessian, (first, end), 0, size, &changes, true);
                    update(&mut after[end - first..], hessian, (first, end), end, size, &changes, true);
                }
            }
        }
    }

    /// Scale and bias of the group at `start`, where that lowers the error.
    #[inline(always)]
    fn refit(
        &mut self,
        start: usize,
        hessian: &[f32],
        gradient: &mut [Column],
        changes: &mut [Column],
        first: usize,
    ) {
        let (size, group) = (self.columns, self.group);
        let place = start - first;
        let mut ones = 0f32;
        let [mut qq, mut q1, mut gq, mut g1] = [[0f32; ROWS]; 4];
        for at in 0..group {
            let row = &hessian[(start + at) * size + start..][..group];
            let codes = &self.codes[start + at];
            let mut product = [0f32; ROWS];
            let mut sum = 0f32;
            for (value, codes) in row.iter().zip(&self.codes[start..]) {
                sum += value;
                for lane in 0..ROWS {
                    product[lane] += value * codes[lane];
                }
            }
            ones += sum;
            let slope = &gradient[place + at];
            for lane in 0..ROWS {
                qq[lane] += codes[lane] * product[lane];
                q1[lane] += product[lane];
                gq[lane] += codes[lane] * slope[lane];
                g1[lane] += slope[lane];
            }
        }
        let (scales, biases) = (&mut self.scales[start / group], &mut self.biases[start / group]);
        let [mut for_scale, mut for_bias] = [[0f32; ROWS]; 2];
        for part in 0..ROWS / LANES {
            let [mut scale, mut bias] = [[0f32; LANES]; 2];
            for lane in 0..LANES {
                let at = part * LANES + lane;
                let determinant = qq[at] * ones - q1[at] * q1[at];
                let sound = determinant > 1e-5 * qq[at] * ones;
                let ds = (gq[at] * ones - g1[at] * q1[at]) / determinant;
                let db = (g1[at] * qq[at] - gq[at] * q1[at]) / determinant;
                scale[lane] = scales[at] + if sound { ds } else { 0.0 };
                bias[lane] = biases[at] + if sound { db } else { 0.0 };
            }
            if let Scales::Float(float) = self.numbers {
                stored(float, &mut bias);
            } else {
                bias = [0.0; LANES];
                // Of a parabola, the number nearest to the best is the best one.
                for (lane, scale) in scale.iter_mut().enumerate() {
                    let at = part * LANES + lane;
                    let best = scales[at] + gq[at] / qq[at];
                    *scale = if best > 0.0 { best } else { scales[at] };
                }
            }
            self.numbers.stored(&mut scale);
            for lane in 0..LANES {
                let at = part * LANES + lane;
                let (ds, db) = (scale[lane] - scales[at], bias[lane] - biases[at]);
                let change = ds * ds * qq[at] + 2.0 * ds * db * q1[at] + db * db * ones
                    - 2.0 * (ds * gq[at] + db * g1[at]);
                let better = change < 0.0;
                for_scale[at] = if better { ds } else { 0.0 };
                for_bias[at] = if better { db } else { 0.0 };
                scales[at] = if better { scale[lane] } else { scales[at] };
                biases[at] = if better { bias[lane] } else { biases[at] };
            }
        }
        for at in start..start + group {
            let mut change = [0f32; ROWS];
            for lane in 0..ROWS {
                let decoded = self.codes[at][lane] * scales[lane] + biases[lane];
                let moved = for_scale[lane] != 0.0 || for_bias[lane] != 0.0;
                change[lane] = if moved { decoded - self.values[at][lane] } else { 0.0 };
                self.values[at][lane] = if moved { decoded } else { self.values[at][lane] };
                changes[at - first][lane] += change[lane];
            }
            subtract(gradient, &hessian[at * size + first..][..gradient.len()], &change);
        }
    }

    /// The code of one column that is best with everything else as it is.
    #[inline(always)]
    fn recode(
        &mut self,
        at: usize,
        hessian: &[f32],
        gradient: &mut [Column],
        changes: &mut [Column],
        first: usize,
    ) {
        let inverse = self.inverse(at / self.group);
        let own = 1.0 / hessian[at * self.columns + at];
        let (scale, bias) = (&self.scales[at / self.group], &self.biases[at / self.group]);
        let slope = &gradient[at - first];
        let mut wanted = [0f32; ROWS];
        for lane in 0..ROWS {
            wanted[lane] = self.values[at][lane] + slope[lane] * own;
        }
        let codes = self.elements.nearest(&wanted, &inverse, bias);
        let mut change = [0f32; ROWS];
        let mut any = false;
        for lane in 0..ROWS {
            let code = codes[lane];
            let moved = code != self.codes[at][lane];
            let decoded = code * scale[lane] + bias[lane];
            change[lane] = if moved { decoded - self.values[at][lane] } else { 0.0 };
            self.values[at][lane] = if moved { decoded } else { self.values[at][lane] };
            self.codes[at][lane] = code;
            changes[at - first][lane] += change[lane];
            any |= moved;
        }
        if any {
            subtract(gradient, &hessian[at * self.columns + first..][..gradient.len()], &change);
        }
    }

    /// Into the places of the weight's own order.
    pub(super) fn give(&self, how: Way<'_>, codes: &mut [u8], scales: &mut [f32], biases: &mut [f32]) {
        let place = |at: usize| match how {
            Way::Plain | Way::Blind { .. } | Way::Careful { .. } | Way::Nearest { .. } => at,
            Way::Refined { factor, .. } | Way::Compensated { factor, .. } => factor.order[at],
        };
        let groups = self.columns / self.group;
        for (at, column) in self.codes.iter().enumerate() {
            let place = place(at);
            for (row, code) in codes.chunks_exact_mut(self.columns).zip(column) {
                row[place] = self.elements.stored(*code);
            }
        }
        for group in 0..groups {
            debug_assert!(
                (0..self.group).all(|at| place(group * self.group + at) / self.group
                    == place(group * self.group) / self.group)
            );
            let place = place(group * self.group) / self.group;
            for (lane, (scales, biases)) in
                scales.chunks_exact_mut(groups).zip(biases.chunks_exact_mut(groups)).enumerate()
            {
                scales[place] = self.scales[group][lane];
                biases[place] = self.biases[group][lane];
            }
        }
    }
}

/// `columns[k] -= factors[k] * change`
#[inline(always)]
fn subtract(columns: &mut [Column], factors: &[f32], change: &Column) {
    for (column, factor) in columns.iter_mut().zip(factors) {
        for lane in 0..ROWS {
            column[lane] -= factor * change[lane];
        }
    }
}

/// `out -= (or +=) M[first..end, from..]^T changes`, `M` a square matrix of `size`.
fn update(
    out: &mut [Column],
    matrix: &[f32],
    (first, end): (usize, usize),
    from: usize,
    size: usize,
    changes: &[Column],
    negative: bool,
) {
    if out.is_empty() {
        return;
    }
    let part = MatRef::from_row_major_slice(matrix, size, size);
    let part = part.submatrix(first, from, end - first, out.len());
    let changes = MatRef::from_row_major_slice(changes[..end - first].as_flattened(), end - first, ROWS);
    let rows = out.len();
    let to = MatMut::from_row_major_slice_mut(out.as_flattened_mut(), rows, ROWS);
    matmul(to, Accum::Add, part.transpose(), changes, if negative { -1.0 } else { 1.0 }, Par::Seq);
}
