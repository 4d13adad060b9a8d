//! Keys of config.json that mlx_lm goes by.

use mlx_quant_model::arch::{self, Loader};
use mlx_quant_model::{Existing, Packing, known};
use serde_json::Value;

use super::findings::Findings;
use crate::Model;

pub(super) fn check(model: &Model, findings: &mut Findings) {
    let config = &model.config.0;
    match config.get("model_type").and_then(Value::as_str) {
        None => findings.fatal("model_type", "is missing from config.json, or no string"),
        Some(name) if !known::model_type(name) && arch::loader(&model.config) == Loader::MlxLm => {
            findings.fatal("model_type", format!("{name:?} is no model type of mlx_lm 0.32.2"));
        }
        Some(_) => {}
    }
    if let Some(file) = config.get("model_file").filter(|file| !file.is_null()) {
        findings
            .fatal("model_file", format!("{file} is code, which mlx_lm runs only with trust_remote_code"));
    }
    let packed = |key: &str| config.get(key).filter(|value| !value.is_null());
    match (packed("quantization"), packed("quantization_config")) {
        (Some(Value::Object(shared)), copy) => {
            for key in ["group_size", "bits"] {
                // Null stands for the default.
                if !shared.get(key).is_some_and(|value| value.is_null() || value.is_u64()) {
                    findings.fatal(
                        "quantization",
                        format!("has no number {key} at its top level, mlx_lm stops there"),
                    );
                }
            }
            match copy {
                None => findings.warning(
                    "quantization_config",
                    "is missing: the hub does not see that the model is quantized",
                ),
                Some(copy) if copy != &config["quantization"] => {
                    findings.warning(
                        "quantization_config",
                        "differs from quantization, which is what mlx_lm goes by",
                    );
                }
                Some(_) => {}
            }
        }
        (Some(_), _) => findings.fatal("quantization", "is no object"),
        (None, Some(copy)) => check_copy(model, copy, findings),
        (None, None) => {}
    }
}

/// A `quantization_config` alone: the hub's, or what is left of MLX's.
fn check_copy(model: &Model, copy: &Value, findings: &mut Findings) {
    let model_type = model.config.model_type().unwrap_or_default();
    match Existing::of_config(&model.config) {
        Ok(Existing::Mlx(_)) => {
            let shown = copy.get("bits").unwrap_or(&Value::Null);
            findings.fatal(
                "quantization",
                format!("is missing from config.json; its copy quantization_config ({shown} bits) alone is not read"),
            );
        }
        Ok(Existing::Packed(Packing::Fp8 { .. })) if !known::decodes_fp8(model_type) => findings.warning(
            "quantization_config",
            format!(
                "mlx_lm does not decode fp8 weights of {model_type} itself, it loads the converted model"
            ),
        ),
        _ => {}
    }
}
