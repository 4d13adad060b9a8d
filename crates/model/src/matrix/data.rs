//! What a packed matrix is made of.

use mlx_format::FloatType;

use super::stream::Stream;

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// The integer itself, less the zero point.
    Integer,
    /// A byte that holds the integer with a sign: 128 is added, and so to the zero point.
    Signed,
    /// float8_e4m3.
    E4m3,
    /// float4_e2m1.
    E2m1,
}

/// What is read of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Decoded weights, `[rows, columns]`.
    Values(FloatType),
    /// MLX's codes, uint32 `[rows, words]`.
    Words,
    /// MLX's scales, `[rows, groups]`.
    Scales(FloatType),
    /// MLX's biases, `[rows, groups]`: affine only.
    Biases(FloatType),
}

/// A packed matrix over the tensors of a checkpoint. Whoever makes one has checked that their shapes belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) codes: Codes,
    pub(crate) element: Element,
    pub(crate) scales: Scales,
    pub(crate) zeros: Zeros,
    /// A scale of the whole matrix.
    pub(crate) global: Option<Global>,
    /// int32 `[columns]`: the group of each column, where groups are not consecutive columns.
    pub(crate) groups: Option<String>,
    /// Why MLX's format does not hold these numbers, beyond what shapes tell.
    pub(crate) obstacle: Option<String>,
}

/// The order of codes in their tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Row after row; each begins at a byte or word of its own.
    Rows {
        /// As of [`Stream`].
        padded: bool,
    },
    /// int32 `[columns * bits / 32, rows]`: a stream down each column of the tensor (GPTQ).
    Columns,
    /// int32 `[columns, rows / 8]`, 4 bits: eight rows in a word, even ones first (AWQ's gemm).
    Interleaved,
}

/// Codes of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    pub(crate) tensor: String,
    pub(crate) bits: u32,
    pub(crate) order: Order,
}

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleKind {
    /// A number.
    Float(FloatType),
    /// A byte, `2^(byte - 127)`.
    E8m0,
    /// A byte, float8_e4m3.
    E4m3,
}

/// Scales of a matrix: one for each block of its rows and columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scales {
    pub(crate) tensor: String,
    pub(crate) kind: ScaleKind,
    /// Rows of a block.
    pub(crate) rows: usize,
    /// Columns of a block.
    pub(crate) columns: usize,
    /// Whether the tensor is `[groups, rows]` instead of `[rows, groups]`.
    pub(crate) turned: bool,
}

/// Zero points of a matrix of integers, `[rows, groups]` in some order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// There are none: elements have a sign of their own.
    None,
    /// The middle of the codes, `2^(bits - 1)`.
    Middle,
    /// A tensor.
    Stored {
        tensor: String,
        order: ZeroOrder,
        /// Whether config.json says that all are the middle, and the tensor is not here to be asked: what is read then and is
        /// something else becomes NaN, which nobody writes.
        trusted: bool,
    },
}

/// The order of zero points in their tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroOrder {
    /// int32 `[words, groups]`: a stream down the rows of each group (compressed-tensors).
    Down(Stream),
    /// int32 `[groups, words]`: a stream along the rows (GPTQ); `less_one` if what is stored is one less (its first version).
    Along {
        /// Bits, no spare ones.
        stream: Stream,
        /// 1 is added as gptqmodel adds it: to words of 2, 4 or 8 bits with the carries of that addition, to 3 bits each alone.
        less_one: bool,
    },
    /// int32 `[groups, rows / 8]` (AWQ's gemm).
    Interleaved,
    /// int8 `[rows, groups]`, to be added to the middle.
    Signed,
}

/// A scale of the whole matrix, float32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Global {
    pub(crate) tensor: String,
    /// Whether it divides scales instead of multiplying them.
    pub(crate) divides: bool,
}
