//! compressed-tensors (`compressed_tensors/compressors`): `weight_packed` int32 is a stream of unsigned codes along each row
//! (pack-quantized; before 0.13 with spare bits in words of 3, 5, 6 or 7 bits), uint8 two float4_e2m1 (mxfp4- and
//! nvfp4-pack-quantized); `weight` is int8 (int-quantized) or float8_e4m3 (float-quantized, mxfp8-quantized). Beside them
//! `weight_scale`, of asymmetric ones `weight_zero_point`, of ordered groups `weight_g_idx`, and of nvfp4 one
//! `weight_global_scale`, which divides. What is in no group of config.json is not packed.

use mlx_format::Dtype;
use serde_json::{Map, Value};

use super::fp8;
use super::modelopt::float4;
use super::parts::Parts;
use crate::SourceError;
use crate::matrix::{Codes, Element, Global, Matrix, Order, ScaleKind, Stream, ZeroOrder, Zeros};

/// What a group of config.json says of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Bits of a code.
    pub bits: u32,
    /// Columns of a group; none for whole rows or matrices.
    pub group_size: Option<usize>,
    /// Rows and columns of a block.
    pub block: Option<[usize; 2]>,
}

/// The groups of config.json.
pub(super) fn groups(map: &Map<String, Value>) -> Result<Vec<Group>, SourceError> {
    let foreign = |what: &str| SourceError::Foreign { method: format!("compressed-tensors ({what})") };
    let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
    let groups = map.get("config_groups").and_then(Value::as_object);
    let groups: Vec<&Map<String, Value>> =
        groups.into_iter().flatten().filter_map(|(_, group)| group.as_object()).collect();
    let formats = std::iter::once(map).chain(groups.iter().copied()).filter_map(|map| text(map, "format"));
    for format in formats {
        if matches!(&*format, "marlin-24" | "mxfp6-pack-quantized") {
            return Err(foreign(&format));
        }
    }
    let sparsity = map.get("sparsity_config").and_then(Value::as_object);
    if let Some(format) = sparsity.and_then(|map| text(map, "format")).filter(|format| format != "dense") {
        return Err(foreign(&format));
    }
    let transforms = map.get("transform_config").and_then(Value::as_object);
    if transforms.is_some_and(|map| {
        map.get("config_groups").and_then(Value::as_object).is_some_and(|map| !map.is_empty())
    }) {
        return Err(foreign("transforms of activations"));
    }
    let size = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|size| *size > 0);
    let weights = groups.into_iter().filter_map(|group| group.get("weights")?.as_object());
    let group = |weights: &Map<String, Value>| {
        let bits = weights.get("num_bits").and_then(Value::as_u64).and_then(|bits| u32::try_from(bits).ok());
        let bits =
            bits.filter(|bits| (1..=8).contains(bits)).ok_or_else(|| foreign("weights of unknown bits"))?;
        let block = weights.get("block_structure").and_then(Value::as_array);
        let block = block.and_then(|block| Some([size(block.first()?)?, size(block.get(1)?)?]));
        Ok(Group { bits, group_size: weights.get("group_size").and_then(size), block })
    };
    weights.map(group).collect()
}

/// The matrix of packed or plain codes.
pub(super) fn matrix(
    parts: &mut Parts<'_>,
    groups: &[Group],
) -> Result<Option<(String, Matrix)>, SourceError> {
    let (name, tensor) = (parts.name, parts.codes());
    if let Some(path) = name.strip_suffix(".weight_packed") {
        parts.take(&format!("{path}.weight_shape"));
        let weight = format!("{path}.weight");
        let made = match tensor.dtype {
            Dtype::U8 => {
                let global = format!("{path}.weight_global_scale");
                let global = parts.take(&global).map(|_| Global { tensor: global, divides: true });
                float4(parts, weight, &format!("{path}.weight_scale"), global)?
            }
            Dtype::I32 => (weight, packed(parts, path, groups)?),
            dtype => return Err(parts.refuse(format!("packed codes are I32 or U8, not {dtype}"))),
        };
        return Ok(Some(made));
    }
    let Some(path) = name.strip_suffix(".weight") else { return Ok(None) };
    match tensor.dtype {
        Dtype::F8_E4M3 => {
            let block = groups.iter().find_map(|group| group.block).or(Some([128, 128]));
            fp8::matrix(parts, block)
        }
        Dtype::I8 => Ok(Some((name.to_owned(), bytes(parts, path)?))),
        _ => Ok(None),
    }
}

/// A stream of unsigned codes along each row.
fn packed(parts: &mut Parts<'_>, path: &str, groups: &[Group]) -> Result<Matrix, SourceError> {
    let tensor = parts.codes();
    let [rows, words] = tensor.shape[..] else {
        return Err(parts.refuse("a matrix has two axes".to_owned()));
    };
    let scale = format!("{path}.weight_scale");
    let held = parts.need(&scale)?;
    let count = held.shape.get(1).copied().unwrap_or(1);
    // Where groups and words agree to the last bit, nothing is left to say: thousands of experts are not asked.
    let clear = groups.first().is_some_and(|group| {
        let columns = group.group_size.and_then(|size| size.checked_mul(count));
        let bits = columns.and_then(|columns| columns.checked_mul(group.bits as usize));
        groups.len() == 1 && bits.is_some() && bits == words.checked_mul(32)
    });
    let shape = format!("{path}.weight_shape");
    let shape = parts.take(&shape).filter(|_| !clear).and_then(|shape| parts.integers(shape));
    let said = shape.as_ref().map(|shape| match shape[..] {
        [high, wide] if usize::try_from(high) == Ok(rows) => usize::try_from(wide).unwrap_or(0),
        _ => 0,
    });
    // The first group of config.json that these shapes belong to; four bits where nothing is said.
    let unsaid = [Group { bits: 4, group_size: None, block: None }];
    let groups = if groups.is_empty() { &unsaid[..] } else { groups };
    let fitting = groups.iter().find_map(|group| {
        let columns = said.or_else(|| group.group_size.and_then(|size| size.checked_mul(count)));
        let columns = columns.or_else(|| Some(words.checked_mul(32)? / group.bits as usize))?;
        let grouped = group.group_size.is_none_or(|size| columns.div_ceil(size) == count);
        let stream = [false, true].into_iter().map(|padded| Stream { bits: group.bits, padded });
        let stream = stream.into_iter().find(|stream| stream.words(columns) == Some(words))?;
        (grouped && columns > 0).then_some((columns, stream, group.group_size))
    });
    let Some((columns, stream, group_size)) = fitting else {
        let shape = shape.map_or_else(String::new, |shape| format!(" and weight_shape {shape:?}"));
        let groups: Vec<String> = groups
            .iter()
            .map(|group| {
                format!(
                    "{} bits, groups of {}",
                    group.bits,
                    group.group_size.map_or("whole rows".to_owned(), |size| size.to_string())
                )
            })
            .collect();
        return Err(parts.refuse(format!(
            "these words with scales {:?}{shape} are nothing that config.json speaks of ({})",
            held.shape,
            groups.join("; ")
        )));
    };
    let block = group_size.map(|size| [1, size]);
    let scales = parts.scales(&scale, [rows, columns], block)?;
    if !matches!(scales.kind, ScaleKind::Float(_)) {
        return Err(parts.refuse(format!("its scales {scale} are {}", held.dtype)));
    }
    let own = columns.div_ceil(scales.columns);
    let zeros = zeros(parts, path, (rows, own), Some(stream))?;
    let (groups, obstacle) = ordered(parts, path, (columns, own), scales.columns)?;
    let codes = Codes {
        tensor: parts.name.to_owned(),
        bits: stream.bits,
        order: Order::Rows { padded: stream.padded },
    };
    let (element, global) = (Element::Integer, None);
    Ok(Matrix { rows, columns, codes, element, scales, zeros, global, groups, obstacle })
}

/// int8 weights.
fn bytes(parts: &mut Parts<'_>, path: &str) -> Result<Matrix, SourceError> {
    let [rows, columns] = parts.codes().shape[..] else {
        return Err(parts.refuse("a matrix has two axes".to_owned()));
    };
    let scale = format!("{path}.weight_scale");
    let scales = parts.scales(&scale, [rows, columns], None)?;
    if !matches!(scales.kind, ScaleKind::Float(_)) {
        return Err(parts.refuse(format!("its scales {scale} are no numbers")));
    }
    let zeros = zeros(parts, path, (rows, columns.div_ceil(scales.columns)), None)?;
    let codes = Codes { tensor: parts.name.to_owned(), bits: 8, order: Order::Rows { padded: false } };
    let (element, global, groups, obstacle) = (Element::Signed, None, None, None);
    Ok(Matrix { rows, columns, codes, element, scales, zeros, global, groups, obstacle })
}

/// Zero points: packed down the rows like the codes, or int8.
fn zeros(
    parts: &mut Parts<'_>,
    path: &str,
    (rows, groups): (usize, usize),
    stream: Option<Stream>,
) -> Result<Zeros, SourceError> {
    let name = format!("{path}.weight_zero_point");
    let Some(held) = parts.take(&name) else { return Ok(Zeros::Middle) };
    let packed = stream.and_then(|stream| Some((stream, stream.words(rows)?)));
    let order = match (held.dtype, packed) {
        (Dtype::I32, Some((stream, words))) if held.shape == [words, groups] => ZeroOrder::Down(stream),
        (Dtype::I8, _) if held.elements() == rows * groups => ZeroOrder::Signed,
        (dtype, _) => {
            let shape = &held.shape;
            return Err(parts
                .refuse(format!("{name} is {dtype} of shape {shape:?} for {groups} groups of {rows} rows")));
        }
    };
    Ok(Zeros::Stored { tensor: name, order, trusted: false })
}

/// The group of each column where they are not consecutive, and why that may not be known.
fn ordered(
    parts: &mut Parts<'_>,
    path: &str,
    (columns, groups): (usize, usize),
    size: usize,
) -> Result<(Option<String>, Option<String>), SourceError> {
    let name = format!("{path}.weight_g_idx");
    let Some(held) = parts.take(&name) else { return Ok((None, None)) };
    if held.dtype != Dtype::I32 || held.elements() != columns {
        let (dtype, shape) = (held.dtype, &held.shape);
        return Err(parts.refuse(format!("{name} is {dtype} of shape {shape:?} for {columns} columns")));
    }
    match parts.integers(held) {
        None if groups > 1 => {
            Ok((Some(name), Some("the order of its groups (weight_g_idx) is not here yet".to_owned())))
        }
        Some(found)
            if found.iter().any(|group| usize::try_from(*group).map_or(true, |group| group >= groups)) =>
        {
            // -1 in every place says that nothing is ordered.
            if found.iter().all(|group| *group == -1) {
                return Ok((None, None));
            }
            Err(parts.refuse(format!("{name} names groups beyond the {groups} that there are")))
        }
        Some(found)
            if found.iter().enumerate().any(|(at, group)| usize::try_from(*group) != Ok(at / size)) =>
        {
            Ok((Some(name), None))
        }
        _ => Ok((None, None)),
    }
}
