//! What a planned layer leaves in files: its tensors, its entry in config.json.

use mlx_format::checkpoint::TensorSpec;
use mlx_format::{Dtype, FloatType, Scheme};
use serde_json::{Map, Value};

/// `{"group_size": .., "bits": .., "mode": ..}`.
pub(super) fn entry(scheme: Scheme) -> Value {
    let mut map = Map::new();
    map.insert("group_size".to_owned(), scheme.group_size().into());
    map.insert("bits".to_owned(), scheme.bits().into());
    map.insert("mode".to_owned(), scheme.mode().name().into());
    map.into()
}

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
