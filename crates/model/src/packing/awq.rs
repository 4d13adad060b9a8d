//! AutoAWQ's gemm form (`awq/utils/packing_utils.py`): 4 bits, int32 `qweight` `[in, out / 8]`, `qzeros` `[groups, out / 8]`,
//! `scales` `[groups, out]`; `(code - zero) * scale`.

use mlx_format::{Dtype, FloatType};
use serde_json::{Map, Value};

use super::parts::Parts;
use crate::SourceError;
use crate::matrix::{Codes, Element, Matrix, Order, ScaleKind, Scales, ZeroOrder, Zeros};

/// What config.json says of a model in AWQ's form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awq {
    /// Columns of a group, where config.json says it; none for whole rows.
    pub group_size: Option<usize>,
}

impl Awq {
    /// Reads `quantization_config`.
    pub(super) fn of(map: &Map<String, Value>) -> Result<Self, SourceError> {
        let text = |key: &str| map.get(key).and_then(Value::as_str).map(str::to_ascii_lowercase);
        let version = text("version").or_else(|| text("format")).unwrap_or_else(|| "gemm".to_owned());
        let bits = map.get("bits").or_else(|| map.get("w_bit")).and_then(Value::as_u64).unwrap_or(4);
        let own = text("quant_method").is_some_and(|method| method == "awq");
        if own && version != "gemm" || bits != 4 {
            return Err(SourceError::Foreign { method: format!("awq ({version}, {bits} bits)") });
        }
        Ok(Self { group_size: group_size(map) })
    }

    /// The matrix of `qweight`.
    pub(super) fn matrix(&self, parts: &mut Parts<'_>) -> Result<Option<(String, Matrix)>, SourceError> {
        matrix(parts, self.group_size)
    }
}

/// Columns of a group; none for -1, which are whole rows, or if nothing is said, or not the same of all layers.
pub(super) fn group_size(map: &Map<String, Value>) -> Option<usize> {
    if map.get("dynamic").and_then(Value::as_object).is_some_and(|dynamic| !dynamic.is_empty()) {
        return None;
    }
    let size = map.get("group_size").or_else(|| map.get("q_group_size"))?;
    usize::try_from(size.as_u64()?).ok().filter(|size| *size > 0)
}

/// `[groups, out]` scales of a matrix `[out, in]`.
pub(super) fn turned_scales(
    parts: &mut Parts<'_>,
    name: &str,
    columns: usize,
    group_size: Option<usize>,
) -> Result<(Scales, usize), SourceError> {
    let scales = parts.need(name)?;
    let (Some(float), [groups, rows]) = (FloatType::from_dtype(scales.dtype), &scales.shape[..]) else {
        let (dtype, shape) = (scales.dtype, &scales.shape);
        return Err(parts.refuse(format!("its scales {name} are {dtype} of shape {shape:?}")));
    };
    let own = columns.checked_div(*groups).filter(|own| *own > 0 && columns.is_multiple_of(*groups));
    // The last group may be short.
    let size = match group_size {
        Some(size) if columns.div_ceil(size) == *groups => size.min(columns),
        None => own.unwrap_or(0),
        Some(_) => 0,
    };
    if size == 0 {
        let said =
            group_size.map_or_else(String::new, |size| format!(", and config.json says groups of {size}"));
        return Err(parts.refuse(format!("its scales {name} are {groups} groups of {columns} inputs{said}")));
    }
    let (tensor, kind) = (name.to_owned(), ScaleKind::Float(float));
    Ok((Scales { tensor, kind, rows: 1, columns: size, turned: true }, *rows))
}

fn matrix(parts: &mut Parts<'_>, group_size: Option<usize>) -> Result<Option<(String, Matrix)>, SourceError> {
    let (name, tensor) = (parts.name, parts.codes());
    let Some(path) = name.strip_suffix(".qweight") else { return Ok(None) };
    let [columns, words] = tensor.shape[..] else {
        return Err(parts.refuse("AWQ's codes have two axes".to_owned()));
    };
    let (scales, rows) = turned_scales(parts, &format!("{path}.scales"), columns, group_size)?;
    let groups = columns.div_ceil(scales.columns);
    if tensor.dtype != Dtype::I32 || words.checked_mul(8) != Some(rows) {
        return Err(parts.refuse(format!(
            "AWQ's gemm form of {rows} outputs and {columns} inputs is I32 of shape [{columns}, {}]",
            rows / 8
        )));
    }
    let zeros = format!("{path}.qzeros");
    let zeros = match parts.take(&zeros) {
        None => Zeros::Middle,
        Some(held) if held.dtype == Dtype::I32 && held.shape == [groups, words] => {
            Zeros::Stored { tensor: zeros, order: ZeroOrder::Interleaved, trusted: false }
        }
        Some(held) => {
            let (dtype, shape) = (held.dtype, &held.shape);
            return Err(
                parts.refuse(format!("{zeros} is {dtype} of shape {shape:?} instead of [{groups}, {words}]"))
            );
        }
    };
    let codes = Codes { tensor: name.to_owned(), bits: 4, order: Order::Interleaved };
    let (element, global, groups, obstacle) = (Element::Integer, None, None, None);
    let matrix = Matrix { rows, columns, codes, element, scales, zeros, global, groups, obstacle };
    Ok(Some((format!("{path}.weight"), matrix)))
}
