//! NVIDIA ModelOpt's checkpoints (`modelopt/torch/export`, `modelopt/torch/quantization/qtensor`): `weight` is float8_e4m3, or
//! two float4_e2m1 in a byte with the even column below; `weight_scale` a number, a byte `2^(byte - 127)` for 32 columns,
//! or float8_e4m3 for 16 columns with one float32 `weight_scale_2` for the whole matrix, which multiplies.

use mlx_format::Dtype;
use serde_json::{Map, Value};

use super::fp8;
use super::parts::Parts;
use crate::SourceError;
use crate::matrix::{Codes, Element, Global, Matrix, Order, ScaleKind, Zeros};

/// Refuses what cannot be read off the tensors.
pub(super) fn check(map: &Map<String, Value>) -> Result<(), SourceError> {
    let algorithm = map.get("quant_algo").and_then(Value::as_str).unwrap_or_default();
    // Integers are packed along rows there, and inputs are scaled by pre_quant_scale.
    if ["AWQ", "INT4", "INT8", "SVDQUANT", "NF4"]
        .iter()
        .any(|part| algorithm.to_ascii_uppercase().contains(part))
    {
        return Err(SourceError::Foreign { method: format!("ModelOpt ({algorithm})") });
    }
    Ok(())
}

/// The matrix of float8 or float4 codes.
pub(super) fn matrix(parts: &mut Parts<'_>) -> Result<Option<(String, Matrix)>, SourceError> {
    let (name, tensor) = (parts.name, parts.codes());
    let Some(path) = name.strip_suffix(".weight") else { return Ok(None) };
    if parts.take(&format!("{path}.pre_quant_scale")).is_some() {
        return Err(
            parts.refuse("its inputs are scaled (pre_quant_scale), which is not read here".to_owned())
        );
    }
    if tensor.dtype == Dtype::F8_E4M3 {
        return fp8::matrix(parts, Some([128, 128]));
    }
    if tensor.dtype != Dtype::U8 {
        return Ok(None);
    }
    let global = format!("{name}_scale_2");
    let global = parts.take(&global).map(|_| Global { tensor: global, divides: false });
    float4(parts, name.to_owned(), &format!("{name}_scale"), global).map(Some)
}

/// Two float4_e2m1 in a byte.
pub(super) fn float4(
    parts: &mut Parts<'_>,
    weight: String,
    scale: &str,
    global: Option<Global>,
) -> Result<(String, Matrix), SourceError> {
    let tensor = parts.codes();
    let [rows, bytes] = tensor.shape[..] else {
        return Err(parts.refuse("a matrix has two axes".to_owned()));
    };
    let columns = bytes.checked_mul(2).ok_or_else(|| parts.refuse("it is too large".to_owned()))?;
    let size = match parts.need(scale)?.dtype {
        Dtype::F8_E4M3 => 16,
        _ => 32,
    };
    let scales = parts.scales(scale, [rows, columns], Some([1, size]))?;
    if matches!(scales.kind, ScaleKind::Float(_)) || scales.columns != size.min(columns.max(1)) {
        return Err(parts.refuse(format!("its scales {scale} are those of neither nvfp4 nor mxfp4")));
    }
    if (scales.kind == ScaleKind::E8m0) == global.is_some() {
        let what = if global.is_some() {
            "has a scale of the whole matrix"
        } else {
            "lacks a scale of the whole matrix"
        };
        return Err(parts.refuse(format!("it {what}, which nvfp4 has and mxfp4 has not")));
    }
    let mut obstacle = None;
    if let Some(Global { tensor, divides }) = &global {
        let held = parts.need(tensor)?;
        if held.dtype != Dtype::F32 || held.elements() != 1 {
            let (dtype, shape) = (held.dtype, &held.shape);
            return Err(
                parts.refuse(format!("{tensor} is {dtype} of shape {shape:?} instead of one float32"))
            );
        }
        let number = parts.number(held);
        let number = if *divides { number.map(|number| 1.0 / number) } else { number };
        if number != Some(1.0) {
            let number = number.map_or_else(String::new, |number| format!(" ({number:e})"));
            obstacle = Some(format!(
                "it has a float32 scale of the whole matrix{number}, which MLX's nvfp4 linears lack"
            ));
        }
    }
    let codes = Codes { tensor: parts.name.to_owned(), bits: 4, order: Order::Rows { padded: false } };
    let (element, zeros, groups) = (Element::E2m1, Zeros::None, None);
    Ok((weight, Matrix { rows, columns, codes, element, scales, zeros, global, groups, obstacle }))
}
