//! Sources that another quantizer has packed: which tensors are one matrix, and what their numbers mean.
//!
//! One module for each packing reads names, dtypes and shapes (and the few tensors that say how others lie) and makes
//! [`Matrix`]es of them; whatever does not belong together is an error that names file, layer and shapes. Nothing is
//! read of the weights themselves, and nothing is as large as config.json claims without a tensor of that size.
//!
//! | [`Packing`] | `quant_method` | module |
//! |---|---|---|
//! | `Fp8` | fp8, fbgemm_fp8, mxfp8 | [`fp8`] |
//! | `CompressedTensors` | compressed-tensors | [`compressed`] |
//! | `ModelOpt` | modelopt, or hf_quant_config.json alone | [`modelopt`] |
//! | `Awq` | awq, or auto-round packed so | [`awq`] |
//! | `Gptq` | gptq, or auto-round packed so | [`gptq`] |

mod awq;
mod compressed;
mod fp8;
mod gptq;
mod modelopt;
mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mlx_format::checkpoint::Checkpoint;
use serde_json::{Map, Value};

pub use self::awq::Awq;
pub use self::compressed::Group;
pub use self::gptq::Gptq;
use self::parts::Parts;
use crate::SourceError;
use crate::matrix::Matrix;

/// How a source is packed, by its `quantization_config`.
#[derive(Clone, Debug, PartialEq)]
pub enum Packing {
    /// float8_e4m3 with scales of blocks, rows or whole matrices.
    Fp8 {
        /// Rows and columns of a block.
        block: [usize; 2],
    },
    /// The formats of compressed-tensors (llm-compressor, Kimi).
    CompressedTensors(Vec<Group>),
    /// NVIDIA ModelOpt: float8, nvfp4, mxfp4, mxfp8.
    ModelOpt,
    /// AutoAWQ's gemm: 4 bits.
    Awq(Awq),
    /// GPTQ: 2, 3, 4 or 8 bits.
    Gptq(Gptq),
}

/// Matrices by the name that their weight would have, and names that count for nothing beside them.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) matrices: BTreeMap<String, Arc<Matrix>>,
    pub(crate) consumed: BTreeSet<String>,
}

/// Ends of names of what is known of activations, or belongs to weights that are none.
const ASIDE: [&str; 3] = ["activation_scale", ".input_scale", "_scale_inv"];

/// Ends of names that count for nothing where they are one number, or a list of two: activations, caches, shapes.
const NUMBERS: [&str; 9] = [
    ".input_global_scale",
    ".input_zero_point",
    ".k_scale",
    ".k_zero_point",
    ".output_scale",
    ".q_scale",
    ".v_scale",
    ".v_zero_point",
    ".weight_shape",
];

/// Beyond this no arithmetic on a row overflows.
const MOST_COLUMNS: usize = 1 << 32;

impl Packing {
    /// The packing that a `quantization_config` describes; none if its method is another program's.
    ///
    /// # Errors
    /// [`SourceError::Foreign`] for forms of a known method that are not read.
    pub(crate) fn of(map: &Map<String, Value>) -> Result<Option<Self>, SourceError> {
        let text = |key: &str| map.get(key).and_then(Value::as_str);
        let method = text("quant_method").unwrap_or_default();
        Ok(Some(match method {
            "fp8" | "fbgemm_fp8" | "mxfp8" => Self::Fp8 { block: fp8::block(map) },
            "compressed-tensors" => Self::CompressedTensors(compressed::groups(map)?),
            "modelopt" => {
                modelopt::check(map)?;
                Self::ModelOpt
            }
            "awq" => Self::Awq(Awq::of(map)?),
            "gptq" => Self::Gptq(Gptq::of(map)?),
            "auto-round" | "intel/auto-round" => {
                let form = text("packing_format").unwrap_or_default();
                if form.ends_with("auto_awq") {
                    Self::Awq(Awq::of(map)?)
                } else if form.ends_with("auto_gptq") {
                    Self::Gptq(Gptq::of(map)?)
                } else {
                    return Err(SourceError::Foreign { method: format!("{method} ({form})") });
                }
            }
            _ => return Ok(None),
        }))
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fp8 { .. } => "fp8",
            Self::CompressedTensors(_) => "compressed-tensors",
            Self::ModelOpt => "ModelOpt",
            Self::Awq(_) => "AWQ",
            Self::Gptq(_) => "GPTQ",
        }
    }

    /// All packed matrices of a checkpoint.
    ///
    /// # Errors
    /// If tensors of a matrix are missing, or config.json and their shapes do not belong together.
    pub(crate) fn find(&self, checkpoint: &Checkpoint) -> Result<Found, SourceError> {
        let mut found = Found::default();
        for (name, tensor) in checkpoint.tensors() {
            let mut parts = Parts::new(checkpoint, name, self.name());
            let made = match self {
                Self::Fp8 { block } => fp8::matrix(&mut parts, Some(*block))?,
                Self::CompressedTensors(groups) => compressed::matrix(&mut parts, groups)?,
                Self::ModelOpt => modelopt::matrix(&mut parts)?,
                Self::Awq(awq) => awq.matrix(&mut parts)?,
                Self::Gptq(gptq) => gptq.matrix(&mut parts)?,
            };
            if let Some((weight, matrix)) = made {
                if matrix.rows == 0 || !(1..=MOST_COLUMNS).contains(&matrix.columns) {
                    let (rows, columns) = (matrix.rows, matrix.columns);
                    return Err(parts.refuse(format!("{rows} rows of {columns} columns are no matrix")));
                }
                if weight != *name && checkpoint.tensor(&weight).is_some() {
                    return Err(SourceError::Twice { output: weight, source_name: name.clone() });
                }
                found.consumed.extend(parts.taken());
                found.matrices.insert(weight, Arc::new(matrix));
            } else if ASIDE.iter().any(|end| name.ends_with(end))
                || tensor.elements() <= 2 && NUMBERS.iter().any(|end| name.ends_with(end))
            {
                found.consumed.insert(name.clone());
            }
        }
        Ok(found)
    }
}
