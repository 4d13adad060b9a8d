//! The steps that turn a source tensor into an output tensor.

use std::sync::Arc;

use mlx_format::FloatType;

/// One step of turning a source tensor into an output tensor; none of them touches a value but the last ones.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Splits the first axis into `[parts, rows / parts]`.
    SplitRows(usize),
    /// Keeps `count` rows (the axis before the last) from `start` on; there are `of`.
    Rows {
        /// First row.
        start: usize,
        /// How many, at least one.
        count: usize,
        /// Length of the axis.
        of: usize,
    },
    /// Keeps every other element of the axis that many places before the last (0 is the last), the odd ones
    /// or the even ones.
    EveryOther {
        /// 0 is the last axis.
        from_last: usize,
        /// Odd ones.
        odd: bool,
    },
    /// One of the two halves of the axis before the last (`false` the first).
    HalfOfRows(bool),
    /// Swaps the last two axes.
    Transpose,
    /// Puts the channels of a convolution behind its kernel, `[out, in, kernel..]` to `[out, kernel.., in]`, unless they are there
    /// already. Kernels over images are square, those over sound go channel by channel (`in` is 1): that tells the two apart.
    ChannelsLast,
    /// Bytes `[.., n, 16]` read as uint32 `[.., n * 4]`.
    Words,
    /// The one element of a vector, without an axis.
    Scalar,
    /// All axes become one.
    Flatten,
    /// Keeps so many elements of the last axis; all, if there are fewer.
    First(usize),
    /// Every two halves of `of` rows (the first axis), one row of each in turn: rows `i` and `i + of / 2` stand together.
    Interleave {
        /// Rows that belong together.
        of: usize,
    },
    /// Adds 1 in the dtype of the file: norms that multiply by `1 + w`.
    AddOne,
    /// Multiplies values in the dtype of the file.
    Times(Factors),
    /// Divides each row by its length.
    UnitRows,
    /// The weight that a gate of Muse Spark gives to the residual stream, in float32.
    GateOfStream,
    /// The weight that it gives to what is added.
    GateOfBranch,
}

impl Step {
    /// Whether whole rows of the last axis stay what they are, so that words of packed codes can take it too.
    pub(crate) fn keeps_rows(&self) -> bool {
        match self {
            Self::SplitRows(_)
            | Self::Rows { .. }
            | Self::EveryOther { from_last: 1.., .. }
            | Self::HalfOfRows(_)
            | Self::ChannelsLast
            | Self::Words
            | Self::Interleave { .. } => true,
            Self::EveryOther { from_last: 0, .. }
            | Self::Transpose
            | Self::Scalar
            | Self::Flatten
            | Self::First(_)
            | Self::AddOne
            | Self::Times(_)
            | Self::UnitRows
            | Self::GateOfStream
            | Self::GateOfBranch => false,
        }
    }
}

/// What rows are multiplied with: one factor for all, or one for each.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors(pub(super) Arc<[f32]>);

impl Factors {
    /// One factor for all rows.
    pub fn even(factor: f64) -> Self {
        Self([factor as f32].into())
    }

    /// One for each row.
    pub fn of_rows(factors: Vec<f32>) -> Self {
        Self(factors.into())
    }

    fn of(&self, row: usize) -> f32 {
        self.0.get(row).or(self.0.first()).copied().unwrap_or(1.0)
    }
}

/// What is done with the values of a view when they are read.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// [`Step::AddOne`].
    AddOne,
    /// [`Step::Times`].
    Times(Factors),
    /// [`Step::UnitRows`].
    UnitRows,
    /// [`Step::GateOfStream`] (`true`) or [`Step::GateOfBranch`].
    Gate(bool),
}

impl Change {
    /// Changes `values`, whole rows of `columns` from row `first` on. In float32; each operation is rounded to `rounds` if there
    /// is one, as mlx-lm computes in the dtype of the file.
    pub fn apply(&self, values: &mut [f32], first: usize, columns: usize, rounds: Option<FloatType>) {
        let round = |value: f32| rounds.map_or(value, |float| float.round(value));
        let sigmoid = |value: f32| 1.0 / (1.0 + (-value).exp());
        for (row, values) in (first..).zip(values.chunks_mut(columns.max(1))) {
            match self {
                Self::AddOne => {
                    for value in values {
                        *value = round(*value + 1.0);
                    }
                }
                Self::Times(factors) => {
                    let factor = round(factors.of(row));
                    for value in values {
                        *value = round(*value * factor);
                    }
                }
                Self::UnitRows => {
                    // The guard is mlx-lm's (`baichuan_m1.py`).
                    let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
                    let length = squares.sqrt() as f32 + 1e-7;
                    for value in values {
                        *value = round(*value / length);
                    }
                }
                // Temperature and least square are `mlx_lm/models/muse_spark.py`'s.
                Self::Gate(of_stream) => {
                    for value in values {
                        let gate = *value / 0.3;
                        let branch = sigmoid(gate);
                        let stream = (sigmoid(-gate) * (1.0 + branch)).max(1e-3).sqrt();
                        *value = if *of_stream { stream } else { branch };
                    }
                }
            }
        }
    }
}
