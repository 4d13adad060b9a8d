//! What a planned layer leaves in files: its tensors, its entry in config.json.

use mlx_format::checkpoint::TensorSpec;
use mlx_format::{Dtype, FloatType, Mode, Scheme};
use mlx_quant_model::{Existing, SourceError, View, listed};
use serde_json::{Map, Value};

/// `{"group_size": .., "bits": .., "mode": ..}`.
pub(super) fn entry(scheme: Scheme) -> Value {
    let mut map = Map::new();
    map.insert("group_size".to_owned(), scheme.group_size().into());
    map.insert("bits".to_owned(), scheme.bits().into());
    map.insert("mode".to_owned(), scheme.mode().name().into());
    map.into()
}

/// Adds the `global_scale` of stacked experts in nvfp4, a float32 for each, to a layer's tensors. Gives its entry.
pub(super) fn spread(
    path: &str,
    experts: Option<usize>,
    scheme: Scheme,
    specs: &mut Vec<TensorSpec>,
) -> Option<(String, Value)> {
    let experts = experts?;
    let mut entry = (scheme.mode() == Mode::Nvfp4).then(|| entry(scheme))?;
    entry["global_scale"] = true.into();
    let name = format!("{path}.global_scale");
    specs.push(TensorSpec { name, dtype: Dtype::F32, shape: vec![experts] });
    Some((path.to_owned(), entry))
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

/// Refuses weight, scales and biases that cannot be those of one layer.
pub(super) fn check_together(
    path: &str,
    (weight, scales, biases): (&View, &View, Option<&View>),
    scheme: Scheme,
) -> Result<(), SourceError> {
    let outer = |view: &View| view.shape().split_last().map(|(_, outer)| outer.to_vec());
    let of = |view: &View| (view.dtype, view.shape());
    let alike = weight.shape().len() >= 2
        && outer(weight) == outer(scales)
        && biases.is_none_or(|biases| of(biases) == of(scales));
    if alike && biases.is_some() == scheme.has_biases() {
        return Ok(());
    }
    let (path, biases) = (path.to_owned(), biases.map(of));
    Err(SourceError::Packed { path, weight: of(weight), scales: of(scales), biases })
}

/// Puts the scheme that a packed layer really has in the place of an entry that says something else: mlx_lm believes it. A note for
/// people where that was so.
pub(super) fn settle_entry(existing: &mut Existing, path: &str, scheme: Scheme) -> Option<String> {
    let (Existing::Mlx(map) | Existing::HubMx(map)) = existing else { return None };
    let said = map.get(path)?;
    let right = match said {
        Value::Bool(true) => true,
        Value::Object(fields) => {
            let known =
                |key: &String| matches!(key.as_str(), "bits" | "group_size" | "mode" | "global_scale");
            !fields.is_empty() && fields.keys().all(known) && listed(fields) == Some(scheme)
        }
        _ => false,
    };
    if right {
        return None;
    }
    let note =
        format!("config.json says {said} of {path}, which is packed as {scheme}: that is written instead");
    map.insert(path.to_owned(), entry(scheme));
    Some(note)
}
