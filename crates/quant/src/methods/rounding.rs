//! Rounding a weight to codes, scales and biases: to nearest on a searched grid, or with GPTQ's compensation.
//!
//! Rows of a weight are independent of each other, so a task takes 64 of them through all columns. They lie transposed, a
//! column's 64 values side by side, so that every step is the same arithmetic in every lane.
//!
//! GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds column by column and lets later columns make up for each error.
//! Beyond mlx-lm's: scale and bias of a group are searched on the values as they are when the group's turn comes and are
//! rounded to the stored dtype *before* its codes are chosen, so that later columns also make up for that; and sweeps of
//! coordinate descent over groups (scale and bias by least squares) and codes follow, every step of which lowers
//! the error under the full Hessian.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use mlx_format::{FloatType, Scheme};
use mlx_quant_model::ops::exp::vectorised;
use rayon::prelude::*;

use super::grid::{Grid, LANES, Lanes, code, search_in, stored};
use super::hessian::Factor;

/// Rows of a task.
pub(crate) const ROWS: usize = 64;
/// Largest group size of the format.
const MAX_GROUP: usize = 128;

/// A weight in stored numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Mode, bits, group size; affine.
    pub scheme: Scheme,
    /// Input features.
    pub columns: usize,
    /// `[rows, columns]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, numbers of the stored dtype.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, numbers of the stored dtype.
    pub biases: Vec<f32>,
}

/// How codes, scales and biases are chosen.
#[derive(Clone, Copy, Debug)]
pub enum How<'h> {
    /// Each group's extremes as in `mx.quantize`, nearest codes to the stored numbers.
    Plain,
    /// Searched grid, nearest codes; a weight for each column.
    Nearest {
        /// `[columns]`, not negative.
        weights: &'h [f32],
    },
    /// Searched grid, later columns make up for errors of earlier ones.
    Compensated {
        /// Of the site's Hessian.
        factor: &'h Factor,
        /// Columns between updates of all columns after them.
        block_size: usize,
        /// Sweeps of coordinate descent afterwards.
        sweeps: usize,
    },
}

impl Rounded {
    /// The weight that these numbers stand for, `[rows, columns]`, as the stored file decodes in float32.
    pub fn decoded(&self) -> Vec<f32> {
        let group = self.scheme.group_size();
        let mut out = vec![0f32; self.codes.len()];
        let groups = self.scales.iter().zip(&self.biases);
        for ((out, codes), (scale, bias)) in
            out.chunks_exact_mut(group).zip(self.codes.chunks_exact(group)).zip(groups)
        {
            for (value, &code) in out.iter_mut().zip(codes) {
                *value = code as f32 * scale + bias;
            }
        }
        out
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.codes.len() / self.columns.max(1)
    }

    /// Multiplies rows by powers of two: exact, codes stay.
    pub(crate) fn scale_rows(&mut self, first: usize, factors: &[f32]) {
        let groups = self.columns / self.scheme.group_size();
        for numbers in [&mut self.scales, &mut self.biases] {
            for (row, factor) in numbers[first * groups..].chunks_exact_mut(groups).zip(factors) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }
}

/// Rounds a weight `[rows, columns]`, on the current rayon pool; the same result for any number of threads.
///
/// # Panics
/// If the scheme is not affine or the lengths do not fit together.
pub fn round(values: &[f32], columns: usize, scheme: Scheme, float: FloatType, how: How<'_>) -> Rounded {
    assert!(scheme.has_biases() && scheme.divides(columns), "{columns} columns at {scheme}");
    let groups = columns / scheme.group_size();
    let rows = values.len() / columns;
    let mut rounded = Rounded {
        scheme,
        columns,
        codes: vec![0; rows * columns],
        scales: vec![0.0; rows * groups],
        biases: vec![0.0; rows * groups],
    };
    let codes = rounded.codes.par_chunks_mut(ROWS * columns);
    let scales = rounded.scales.par_chunks_mut(ROWS * groups);
    let biases = rounded.biases.par_chunks_mut(ROWS * groups);
    values.par_chunks(ROWS * columns).zip(codes).zip(scales.zip(biases)).for_each(
        |((values, codes), (scales, biases))| {
            let mut task = Task::new(values, columns, scheme, float, how);
            match how {
                How::Plain => task.nearest(&vec![0.0; columns], false),
                How::Nearest { weights } => task.nearest(weights, true),
                How::Compensated { factor, block_size, sweeps } => {
                    let block = block_size.max(1).next_multiple_of(scheme.group_size());
                    let original = if sweeps > 0 { task.values.clone() } else { Vec::new() };
                    task.compensate(factor, block);
                    task.descend(factor, block, &original, sweeps);
                }
            }
            task.give(how, codes, scales, biases);
        },
    );
    rounded
}

/// Sixty-four values side by side.
type Column = [f32; ROWS];

/// Some rows on their way.
struct Task {
    columns: usize,
    group: usize,
    bits: u32,
    float: FloatType,
    /// By column, in rounding order; after rounding, what the stored numbers decode to.
    values: Vec<Column>,
    codes: Vec<Column>,
    scales: Vec<Column>,
    biases: Vec<Column>,
}

impl Task {
    fn new(values: &[f32], columns: usize, scheme: Scheme, float: FloatType, how: How<'_>) -> Self {
        let mut transposed = vec![[0f32; ROWS]; columns];
        for (lane, row) in values.chunks_exact(columns).enumerate() {
            match how {
                How::Plain | How::Nearest { .. } => {
                    transposed.iter_mut().zip(row).for_each(|(column, value)| column[lane] = *value);
                }
                How::Compensated { factor, .. } => {
                    let order = factor.order.iter();
                    transposed.iter_mut().zip(order).for_each(|(column, &from)| column[lane] = row[from]);
                }
            }
        }
        let groups = columns / scheme.group_size();
        Self {
            columns,
            group: scheme.group_size(),
            bits: scheme.bits(),
            float,
            values: transposed,
            codes: vec![[0.0; ROWS]; columns],
            scales: vec![[0.0; ROWS]; groups],
            biases: vec![[0.0; ROWS]; groups],
        }
    }

    /// Searches scale and bias of the group that begins at `start`.
    #[inline(always)]
    fn search(&mut self, start: usize, weights: &[f32], search: bool) {
        let mut tile = [[0f32; LANES]; MAX_GROUP];
        let tile = &mut tile[..self.group];
        for part in 0..ROWS / LANES {
            for (to, from) in tile.iter_mut().zip(&self.values[start..]) {
                to.copy_from_slice(&from[part * LANES..][..LANES]);
            }
            let grid = search_in(tile, &weights[start..start + self.group], self.bits, self.float, search);
            self.scales[start / self.group][part * LANES..][..LANES].copy_from_slice(&grid.scale);
            self.biases[start / self.group][part * LANES..][..LANES].copy_from_slice(&grid.bias);
        }
    }

    /// Codes of one column; its values become what they decode to. Gives what was lost.
    #[inline(always)]
    fn encode(&mut self, at: usize, inverse: &Column) -> Column {
        let most = ((1u32 << self.bits) - 1) as f32;
        let (scale, bias) = (&self.scales[at / self.group], &self.biases[at / self.group]);
        let (values, codes) = (&mut self.values[at], &mut self.codes[at]);
        let mut lost = [0f32; ROWS];
        for lane in 0..ROWS {
            let value = values[lane];
            let code = code(value, inverse[lane], bias[lane], most);
            let decoded = code * scale[lane] + bias[lane];
            codes[lane] = code;
            values[lane] = decoded;
            lost[lane] = value - decoded;
        }
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

    fn nearest(&mut self, weights: &[f32], search: bool) {
        vectorised(
            #[inline(always)]
            || {
                for start in (0..self.columns).step_by(self.group) {
                    self.search(start, weights, search);
                    let inverse = self.inverse(start / self.group);
                    for at in start..start + self.group {
                        self.encode(at, &inverse);
                    }
                }
            },
        );
    }

    /// GPTQ, `block` columns at a time.
    fn compensate(&mut self, factor: &Factor, block: usize) {
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
                            self.search(at, &weights, true);
                        }
                        let inverse = self.inverse(at / self.group);
                        let mut error = self.encode(at, &inverse);
                        let row = &factor.upper[at * size..][..size];
                        let diagonal = 1.0 / row[at];
                        error.iter_mut().for_each(|error| *error *= diagonal);
                        subtract(&mut self.values[at + 1..end], &row[at + 1..end], &error);
                        errors[at - first] = error;
                    }
                },
            );
            // values[end..] -= U[first..end, end..]^T errors
            update(&mut self.values[end..], &factor.upper, (first, end), end, size, &errors, true);
        }
    }

    /// Coordinate descent: each group's scale and bias by least squares, then each of its codes.
    fn descend(&mut self, factor: &Factor, block: usize, original: &[Column], sweeps: usize) {
        if sweeps == 0 {
            return;
        }
        let size = self.columns;
        let hessian = &factor.hessian;
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
            stored(self.float, &mut scale);
            stored(self.float, &mut bias);
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
        let most = ((1u32 << self.bits) - 1) as f32;
        let inverse = self.inverse(at / self.group);
        let own = 1.0 / hessian[at * self.columns + at];
        let (scale, bias) = (&self.scales[at / self.group], &self.biases[at / self.group]);
        let slope = &gradient[at - first];
        let mut change = [0f32; ROWS];
        let mut any = false;
        for lane in 0..ROWS {
            let wanted = self.values[at][lane] + slope[lane] * own;
            let code = code(wanted, inverse[lane], bias[lane], most);
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
    fn give(&self, how: How<'_>, codes: &mut [u8], scales: &mut [f32], biases: &mut [f32]) {
        let place = |at: usize| match how {
            How::Plain | How::Nearest { .. } => at,
            How::Compensated { factor, .. } => factor.order[at],
        };
        let groups = self.columns / self.group;
        for (at, column) in self.codes.iter().enumerate() {
            let place = place(at);
            for (row, code) in codes.chunks_exact_mut(self.columns).zip(column) {
                row[place] = *code as u8;
            }
        }
        for group in 0..groups {
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::hessian::{Gram, GramSum};
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // Roughly normal, so that edges are rare.
        (0..count).map(|_| next() + next() + next() + next()).collect()
    }

    /// Correlated inputs with some loud features.
    fn gram(size: usize, tokens: usize) -> Gram {
        let (mix, noise) = (numbers(8 * size, 3), numbers(tokens * (size + 8), 5));
        let mut x = Vec::new();
        for token in noise.chunks_exact(size + 8) {
            for at in 0..size {
                let shared: f32 = (0..8).map(|k| token[size + k] * mix[k * size + at]).sum();
                x.push((token[at] + 2.0 * shared) * if at % 37 == 5 { 6.0 } else { 1.0 });
            }
        }
        let mut sum = GramSum::new(size);
        sum.add(&[&Tensor::from_vec(x, (1, tokens, size), &Device::Cpu).unwrap()]).unwrap();
        sum.finish()
    }

    fn plain(values: &[f32], columns: usize, scheme: Scheme, float: FloatType) -> Vec<f32> {
        use mlx_format::{PackedMut, PackedRef};
        let mut bytes = vec![0u8; values.len() * 4];
        FloatType::F32.narrow(values, &mut bytes);
        let rows = values.len() / columns;
        let scale_bytes = rows * scheme.scale_bytes(columns, FloatType::F32);
        let (mut weight, mut scales, mut biases) =
            (vec![0; rows * scheme.words(columns) * 4], vec![0; scale_bytes], vec![0; scale_bytes]);
        let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
        mlx_format::quantize(scheme, FloatType::F32, columns, &bytes, out, false).unwrap();
        for numbers in [&mut scales, &mut biases] {
            let mut wide = vec![0f32; numbers.len() / 4];
            FloatType::F32.widen(numbers, &mut wide);
            wide.iter_mut().for_each(|value| *value = float.round(*value));
            FloatType::F32.narrow(&wide, numbers);
        }
        let packed = PackedRef { weight: &weight, scales: &scales, biases: &biases };
        mlx_format::dequantize(scheme, FloatType::F32, columns, packed, &mut bytes);
        let mut out = vec![0f32; values.len()];
        FloatType::F32.widen(&bytes, &mut out);
        out
    }

    fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| a - b).collect()
    }

    /// Every step lowers the error, at every width, group size and dtype of the format.
    #[test]
    fn each_refinement_lowers_the_error() {
        let (rows, columns) = (70, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let factor = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap();
        let weights = gram.diagonal();
        for bits in [2, 3, 4, 5, 6, 8] {
            for group in [32, 64, 128] {
                for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
                    let scheme = Scheme::affine(bits, group).unwrap();
                    let loss = |decoded: &[f32]| gram.loss(&difference(&values, decoded));
                    let by = |how| loss(&round(&values, columns, scheme, float, how).decoded());
                    let compensated = |sweeps| How::Compensated { factor: &factor, block_size: 128, sweeps };
                    let losses = [
                        loss(&plain(&values, columns, scheme, float)),
                        by(How::Nearest { weights: &weights }),
                        by(compensated(0)),
                        by(compensated(1)),
                        by(compensated(3)),
                    ];
                    println!("{bits} bits, groups of {group}, {}: {losses:.5?}", float.name());
                    assert!(losses.is_sorted_by(|a, b| a > b), "{bits} {group} {float:?} {losses:?}");
                }
            }
        }
    }

    #[test]
    fn order_block_size_and_threads() {
        let (rows, columns) = (130, 256);
        let values = numbers(rows * columns, 1);
        let gram = gram(columns, 700);
        let scheme = Scheme::affine(3, 64).unwrap();
        let forward = Factor::new(&gram, (0..columns).collect(), 0.01).unwrap();
        let groups = [2usize, 0, 3, 1];
        let order: Vec<usize> =
            groups.iter().flat_map(|group| (0..64).rev().map(move |at| group * 64 + at)).collect();
        let turned = Factor::new(&gram, order, 0.01).unwrap();
        let by = |factor, block_size, threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let how = How::Compensated { factor, block_size, sweeps: 1 };
            pool.install(|| round(&values, columns, scheme, FloatType::Bf16, how))
        };
        let first = by(&forward, 128, 1);
        assert_eq!(first, by(&forward, 128, 3), "threads decide nothing");
        let loss = |rounded: &Rounded| gram.loss(&difference(&values, &rounded.decoded()));
        let plain = loss(&round(
            &values,
            columns,
            scheme,
            FloatType::Bf16,
            How::Nearest { weights: &gram.diagonal() },
        ));
        for rounded in [by(&forward, 100, 1), by(&forward, 4096, 1), by(&turned, 128, 1)] {
            assert!((loss(&rounded) / loss(&first) - 1.0).abs() < 0.03 && loss(&rounded) < plain);
        }
    }

    #[test]
    fn groups_without_range_and_zeros() {
        let columns = 64;
        let mut values = vec![0.25f32; 3 * columns];
        values[columns..2 * columns].fill(0.0);
        values[2 * columns..].fill(-3.0);
        let scheme = Scheme::affine(4, 64).unwrap();
        for float in [FloatType::F16, FloatType::Bf16] {
            let rounded = round(&values, columns, scheme, float, How::Nearest { weights: &[1.0; 64] });
            assert_eq!(rounded.decoded(), values, "{float:?}");
        }
    }
}
