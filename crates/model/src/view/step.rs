//! The steps that turn a source tensor into an output tensor.

/// One step of turning a source tensor into an output tensor; none of them touches a value but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Bytes `[.., n, 16]` read as uint32 `[.., n * 4]`.
    Words,
    /// The one element of a vector, without an axis.
    Scalar,
    /// Adds 1 in the dtype of the file: norms that multiply by `1 + w`.
    AddOne,
}
