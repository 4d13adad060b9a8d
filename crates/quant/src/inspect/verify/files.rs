//! Weight files, and the index against them. mlx_lm reads every `model*.safetensors` and never the index; other tools,
//! and the hub, go by the index.

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Checkpoint, INDEX, Tensor, is_mlx_weights};
use serde_json::Value;

use super::findings::{Findings, what};
use crate::{Error, Model};

pub(super) fn check(model: &Model, findings: &mut Findings) -> Result<(), Error> {
    let directory = model.checkpoint.directory();
    for error in Checkpoint::open_files(directory.clone())?.1 {
        match error {
            mlx_format::checkpoint::CheckpointError::Twice { tensor, first, second } => findings.warning(
                tensor,
                format!("is in {first} and in {second}; which of the two mlx_lm takes is a matter of chance"),
            ),
            other => findings.fatal("weights", what(&other)),
        }
    }
    if !model.checkpoint.shards().any(is_mlx_weights) {
        findings.fatal(
            "weights",
            "stand in no model*.safetensors, and mlx_lm reads no others; convert the model",
        );
    }
    let Some(text) = directory.read(INDEX)? else {
        if model.checkpoint.shards().count() > 1 {
            findings.warning(INDEX, "is missing; mlx_lm does without, other tools do not");
        }
        return Ok(());
    };
    match serde_json::from_slice::<Value>(&text) {
        Ok(index) => check_index(&model.checkpoint, &index, findings),
        Err(error) => {
            findings.warning(INDEX, format!("is no JSON ({error}); mlx_lm does not read it, other tools do"));
        }
    }
    Ok(())
}

fn check_index(checkpoint: &Checkpoint, index: &Value, findings: &mut Findings) {
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        findings.warning(INDEX, "has no weight_map");
        return;
    };
    let held: BTreeMap<&str, String> = (checkpoint.tensors().iter())
        .map(|(name, tensor)| (name.as_str(), file_name(checkpoint, tensor)))
        .collect();
    for (name, file) in map {
        let file = file.as_str().unwrap_or_default();
        match held.get(name.as_str()) {
            Some(found) if found == file => {}
            Some(found) => findings.warning(name, format!("is in {found}, the index says {file}")),
            None => findings.warning(name, format!("is in the index ({file}), but in no file")),
        }
    }
    for (name, file) in &held {
        if !map.contains_key(*name) {
            findings.warning(*name, format!("of {file} is missing from the index"));
        }
    }
    let bytes: u64 = checkpoint.tensors().values().map(|tensor| tensor.bytes() as u64).sum();
    let total = index.pointer("/metadata/total_size");
    if let Some(total) = total.filter(|total| total.as_f64() != Some(bytes as f64)) {
        findings.warning(INDEX, format!("total_size is {total}, the tensors have {bytes} bytes"));
    }
}

/// The name without its directory, as the index has it.
fn file_name(checkpoint: &Checkpoint, tensor: &Tensor) -> String {
    let file = checkpoint.file_of(tensor);
    file.rsplit(['/', '\\']).next().unwrap_or(&file).to_owned()
}
