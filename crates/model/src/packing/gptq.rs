//! GPTQ (AutoGPTQ, GPTQModel: `gptqmodel/nn_modules/qlinear`): int32 `qweight` `[in * bits / 32, out]`, a stream of codes down each
//! column; `qzeros` `[groups, out * bits / 32]`, `scales` `[groups, out]`, `g_idx` `[in]`; `(code - zero) * scale` of the
//! column's group. The first version stores zero points one less.

use mlx_format::Dtype;
use serde_json::{Map, Value};

use super::awq::{group_size, turned_scales};
use super::parts::Parts;
use crate::SourceError;
use crate::matrix::{Codes, Element, Matrix, Order, Stream, ZeroOrder, Zeros};

/// What config.json says of a model in GPTQ's form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gptq {
    /// Bits, where no layer says otherwise.
    pub bits: u32,
    /// Columns of a group, where config.json says it; none for whole rows.
    pub group_size: Option<usize>,
    /// Whether zero points are stored one less (the first version).
    pub less_one: bool,
    /// Whether all zero points are the middle of the codes.
    pub symmetric: bool,
    /// Whether groups may be other than consecutive columns (`desc_act` without `static_groups`).
    pub ordered: bool,
}

impl Gptq {
    /// Reads `quantization_config`.
    pub(super) fn of(map: &Map<String, Value>) -> Result<Self, SourceError> {
        let text = |key: &str| map.get(key).and_then(Value::as_str);
        let flag = |key: &str| map.get(key).and_then(Value::as_bool);
        let bits = map.get("bits").and_then(Value::as_u64).unwrap_or(4);
        let form = text("checkpoint_format").or_else(|| text("format")).unwrap_or("gptq");
        let words = text("pack_dtype").unwrap_or("int32");
        let foreign = || SourceError::Foreign { method: format!("gptq ({form}, {bits} bits, {words})") };
        let bits =
            u32::try_from(bits).ok().filter(|bits| matches!(bits, 2 | 3 | 4 | 8)).ok_or_else(foreign)?;
        let auto = text("packing_format").is_some();
        if !(auto || matches!(form, "gptq" | "gptq_v2")) || words != "int32" {
            return Err(foreign());
        }
        Ok(Self {
            bits,
            group_size: group_size(map),
            less_one: auto || form == "gptq",
            symmetric: flag("sym").unwrap_or(false),
            ordered: flag("desc_act").unwrap_or(false) && !flag("static_groups").unwrap_or(false),
        })
    }

    /// The matrix of `qweight`.
    pub(super) fn matrix(&self, parts: &mut Parts<'_>) -> Result<Option<(String, Matrix)>, SourceError> {
        let Self { bits: said, group_size, less_one, symmetric, ordered } = *self;
        let (name, tensor) = (parts.name, parts.codes());
        let Some(path) = name.strip_suffix(".qweight") else { return Ok(None) };
        let ([words, rows], Dtype::I32) = (&tensor.shape[..], tensor.dtype) else {
            return Err(parts.refuse("GPTQ's codes are int32 of two axes".to_owned()));
        };
        let (words, rows) = (*words, *rows);
        let order = format!("{path}.g_idx");
        let listed = parts.take(&order);
        // One number for each input; without it, config.json says how many codes a word has.
        let columns = match listed {
            Some(listed) => listed.elements(),
            None => words.checked_mul(32).map_or(0, |bits| bits / said as usize),
        };
        let bits = words.checked_mul(32).and_then(|all| u32::try_from(all.checked_div(columns)?).ok());
        let bits = bits.filter(|bits| {
            matches!(bits, 2 | 3 | 4 | 8) && columns.checked_mul(*bits as usize) == words.checked_mul(32)
        });
        let Some(bits) = bits else {
            return Err(
                parts.refuse(format!("{words} words for {columns} inputs are neither 2, 3, 4 nor 8 bits"))
            );
        };
        let (scales, outputs) = turned_scales(parts, &format!("{path}.scales"), columns, group_size)?;
        let groups = columns.div_ceil(scales.columns);
        if outputs != rows {
            return Err(parts.refuse(format!("its scales are of {outputs} outputs")));
        }
        let stream = Stream { bits, padded: false };
        let zeros = format!("{path}.qzeros");
        let held = parts.need(&zeros)?;
        let expected = stream.words(rows).filter(|_| rows.saturating_mul(bits as usize).is_multiple_of(32));
        if held.dtype != Dtype::I32 || expected.is_none_or(|own| held.shape != [groups, own]) {
            let (dtype, shape) = (held.dtype, &held.shape);
            return Err(parts.refuse(format!(
                "{zeros} is {dtype} of shape {shape:?} for {groups} groups of {rows} outputs"
            )));
        }
        let words = parts.integers(held);
        let zeros = match words {
            Some(words) if symmetric && is_middle(&words, bits, less_one) => Zeros::Middle,
            words => Zeros::Stored {
                tensor: zeros,
                order: ZeroOrder::Along { stream, less_one },
                trusted: symmetric && words.is_none(),
            },
        };
        let mut obstacle = None;
        let mut index = None;
        if let Some(listed) = listed {
            match parts.integers(listed) {
                Some(found)
                    if found
                        .iter()
                        .any(|group| usize::try_from(*group).map_or(true, |group| group >= groups)) =>
                {
                    return Err(
                        parts.refuse(format!("{order} names groups beyond the {groups} that there are"))
                    );
                }
                Some(found)
                    if found
                        .iter()
                        .enumerate()
                        .any(|(at, group)| usize::try_from(*group) != Ok(at / scales.columns)) =>
                {
                    index = Some(order);
                }
                None if ordered && groups > 1 => {
                    index = Some(order);
                    obstacle = Some("the order of its groups (g_idx) is not here yet".to_owned());
                }
                _ => {}
            }
        }
        let codes = Codes { tensor: name.to_owned(), bits, order: Order::Columns };
        let (element, global) = (Element::Integer, None);
        let matrix = Matrix { rows, columns, codes, element, scales, zeros, global, groups: index, obstacle };
        Ok(Some((format!("{path}.weight"), matrix)))
    }
}

/// Whether all zero points are the middle of the codes.
fn is_middle(words: &[i64], bits: u32, less_one: bool) -> bool {
    let middle = (1u32 << (bits - 1)) - u32::from(less_one);
    let stream = Stream { bits, padded: false };
    let count = words.len() * 32 / bits as usize;
    (0..count).all(|index| {
        u32::from(stream.code(index, |at| words.get(at).map_or(0, |word| *word as u32))) == middle
    })
}
