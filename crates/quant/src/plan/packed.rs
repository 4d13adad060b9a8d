//! The tensors that a packed layer is stored as.

use mlx_format::checkpoint::TensorSpec;
use mlx_format::{Dtype, FloatType, Scheme};

/// Weight, scales and biases of a layer of `shape` `[.., out, in]`.
pub(super) fn packed_specs(path: &str, shape: &[usize], scheme: Scheme, float: FloatType) -> Vec<TensorSpec> {
    let (outer, columns) = shape.split_at(shape.len() - 1);
    let spec = |leaf: &str, dtype, last: usize| TensorSpec {
        name: format!("{path}.{leaf}"),
        dtype,
        shape: [outer, &[last]].concat(),
    };
    let groups = scheme.groups(columns[0]);
    let mut specs = vec![
        spec("weight", Dtype::U32, scheme.words(columns[0])),
        spec("scales", scheme.scale_dtype(float), groups),
    ];
    if scheme.has_biases() {
        specs.push(spec("biases", float.dtype(), groups));
    }
    specs
}
