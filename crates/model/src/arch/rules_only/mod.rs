//! Model types whose checkpoints are described and whose decoders are not: they convert exactly as mlx-lm converts them, and
//! methods that look at text refuse them.
//!
//! A type is what its model's `sanitize`, `quant_predicate`, `cast_predicate` and module tree in `mlx_lm/models` say, version
//! 0.32.2: its linears by the ends of their paths, its other tensors with several axes (`parameters`), and rules for what
//! changes its name or form. A matrix that is in neither list is refused, because nothing else would notice it. A type that gets
//! a decoder moves into a file of its own above.

pub(super) mod bailing;
mod dense;
mod experts;
mod kimi;
mod mamba;
mod muse_spark;
mod recurrent;
mod words;

use super::family::Family;

/// The families, a line for each file.
pub(super) const REGISTRY: &[&[Family]] = &[
    dense::FAMILIES,
    experts::FAMILIES,
    bailing::FAMILIES,
    kimi::FAMILIES,
    mamba::FAMILIES,
    recurrent::FAMILIES,
    muse_spark::FAMILIES,
];
