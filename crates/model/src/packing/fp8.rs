//! float8_e4m3: `weight` with `weight_scale_inv` (DeepSeek, Qwen, MiniMax) or `weight_scale` (compressed-tensors, ModelOpt,
//! fbgemm) beside it: a number for each block, each row, or the whole matrix; or a byte for each block, `2^(byte - 127)`,
//! as in mxfp8 and where `scale_fmt` is `ue8m0`.

use mlx_format::Dtype;
use serde_json::{Map, Value};

use super::parts::Parts;
use crate::SourceError;
use crate::matrix::{Codes, Element, Matrix, Order, ScaleKind, Zeros};

/// `weight_block_size`, 128 x 128 if unsaid.
pub(super) fn block(map: &Map<String, Value>) -> [usize; 2] {
    let sizes = || {
        let sizes = map.get("weight_block_size")?.as_array()?;
        let size = |index: usize| Some(usize::try_from(sizes.get(index)?.as_u64()?).ok()?.clamp(1, 1 << 20));
        Some([size(0)?, size(1)?])
    };
    sizes().unwrap_or([128, 128])
}

/// The matrix of float8 codes.
pub(super) fn matrix(
    parts: &mut Parts<'_>,
    block: Option<[usize; 2]>,
) -> Result<Option<(String, Matrix)>, SourceError> {
    let (name, tensor) = (parts.name, parts.codes());
    if tensor.dtype != Dtype::F8_E4M3 || name.ends_with("_scale") || name.ends_with("_scale_inv") {
        return Ok(None);
    }
    let scale = [format!("{name}_scale_inv"), format!("{name}_scale")];
    let there = scale.iter().find_map(|name| Some((name, parts.take(name)?)));
    let missing = || SourceError::Fp8 {
        tensor: name.to_owned(),
        scale: scale[0].clone(),
        shape: tensor.shape.clone(),
        block: block.unwrap_or([1, tensor.shape.last().copied().unwrap_or(1)]),
    };
    let ([rows, columns], Some((scale, scales))) =
        (<[usize; 2]>::try_from(tensor.shape.as_slice()).map_err(|_| missing())?, there)
    else {
        return Err(missing());
    };
    // Groups of 32 columns are those of mxfp8, whatever else is said.
    let micro =
        matches!(scales.dtype, Dtype::U8 | Dtype::F8_E8M0) && scales.shape == [rows, columns.div_ceil(32)];
    let block = if micro { Some([1, 32]) } else { block };
    let scales = parts.scales(scale, [rows, columns], block).map_err(|_| missing())?;
    if scales.kind == ScaleKind::E4m3 {
        return Err(missing());
    }
    let codes = Codes { tensor: name.to_owned(), bits: 8, order: Order::Rows { padded: false } };
    let matrix = Matrix {
        rows,
        columns,
        codes,
        element: Element::E4m3,
        scales,
        zeros: Zeros::None,
        global: None,
        groups: None,
        obstacle: None,
    };
    Ok(Some((name.to_owned(), matrix)))
}
