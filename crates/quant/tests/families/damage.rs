//! Checkpoints that are not what their config.json says.

use std::collections::BTreeSet;
use std::path::Path;

use mlx_format::checkpoint::Config;
use mlx_format::{Dtype, checkpoint::Checkpoint};
use mlx_quant::Model;
use mlx_quant::model::{Decoder, Named, Weights};
use serde_json::{Value, json};

use crate::common::write_checkpoint;
use crate::{Verdict, model};

type OwnedTensor<'n> = (&'n str, Dtype, Vec<usize>, Vec<u8>);

fn tensors(checkpoint: &Checkpoint) -> Vec<OwnedTensor<'_>> {
    let all = checkpoint.tensors().iter();
    all.map(|(name, tensor)| {
        (name.as_str(), tensor.dtype, tensor.shape.clone(), checkpoint.bytes(tensor).to_vec())
    })
    .collect()
}

/// Opens and describes a model; what it says if it cannot.
fn describe(model: &Model, config: &Config) -> Result<Decoder, String> {
    let weights = Weights::open(&model.checkpoint, config).map_err(model::text)?;
    weights.decoder(config, false).map_err(model::text)
}

/// The answer to a checkpoint of these tensors.
fn answer(model: &Model, tensors: &[OwnedTensor<'_>]) -> Result<Decoder, String> {
    let temporary = tempfile::tempdir().unwrap();
    write_checkpoint(temporary.path(), &Value::Object(model.config.0.clone()).to_string(), tensors);
    describe(&model::open(temporary.path()), &model.config)
}

/// MLX's names of what is made of these tensors.
fn made(model: &Model, tensors: &[OwnedTensor<'_>]) -> BTreeSet<String> {
    let temporary = tempfile::tempdir().unwrap();
    write_checkpoint(temporary.path(), &Value::Object(model.config.0.clone()).to_string(), tensors);
    let own = model::open(temporary.path());
    Named::read(&own.checkpoint, &own.config).unwrap().tensors.iter().map(|(name, _)| name.clone()).collect()
}

/// Each tensor in turn is missing: an error that names it, or its module where the module is told by its tensors.
/// Only what MLX drops may be missing, and biases that no other block has. A tensor too many is an error that names it.
pub(crate) fn weights(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let named = Named::read(&model.checkpoint, &model.config).map_err(model::text)?;
    let all = tensors(&model.checkpoint);
    let (mut optional, mut wrong) = (Vec::new(), Vec::new());
    for missing in 0..all.len() {
        let name = all[missing].0;
        let mut rest = all.clone();
        rest.remove(missing);
        let become_of = |(_, view): &&(String, _)| {
            let view: &mlx_quant::model::View = view;
            (0..view.rows()).any(|row| view.source_of(row) == name)
        };
        let names = named.tensors.iter().filter(become_of).map(|(name, _)| name.as_str());
        let names: Vec<&str> = names.chain([name]).collect();
        match answer(&model, &rest) {
            // What MLX makes of another tensor then is not missed.
            Ok(_) if made(&model, &rest).is_superset(&names.iter().copied().map(str::to_owned).collect()) => {
            }
            Ok(_) => optional.push(name),
            Err(message) => {
                let module = |name: &str| name.rsplitn(3, '.').last().unwrap_or(name).to_owned();
                if !names.iter().any(|name| message.contains(name) || message.contains(&module(name))) {
                    wrong.push(format!("without {name}: {message}"));
                }
            }
        }
    }
    let may_miss = |name: &&str| {
        let leaf = name.rsplit('.').next().unwrap();
        // Of what several blocks have none may be missing; what one block alone has may.
        let kind = mlx_quant::model::without_numbers(name);
        let alone =
            || all.iter().filter(|(other, ..)| mlx_quant::model::without_numbers(other) == kind).count() == 1;
        // Of what sees only the number of blocks is known.
        let sees = || named.towers.iter().any(|(_, view)| view.sources().any(|source| source == *name));
        named.dropped.iter().any(|dropped| dropped == name) || leaf.ends_with("bias") && alone() || sees()
    };
    wrong.extend(optional.iter().filter(|name| !may_miss(name)).map(|name| format!("{name} is not missed")));
    let beside =
        named.tensors.iter().find(|(name, _)| name.contains(".0.")).map(|(_, view)| view.source_of(0));
    let stray = format!("{}.stray", beside.and_then(|name| name.rsplit_once('.')).unwrap().0);
    let mut more = all.clone();
    more.push((&stray, Dtype::F32, vec![1], vec![0; 4]));
    match answer(&model, &more) {
        Err(message) if message.contains("stray") => {}
        Err(message) => wrong.push(format!("a stray tensor: {message}")),
        Ok(_) => wrong.push("a stray tensor is passed over".to_owned()),
    }
    if wrong.is_empty() {
        Ok(format!("{:>4}{:>4}", all.len(), optional.len()))
    } else {
        Err(wrong.join("\n  "))
    }
}

/// Wrong sizes in config.json are errors that name the key or a tensor.
pub(crate) fn config(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let (mut tried, mut wrong) = (Vec::new(), Vec::new());
    for key in [
        "hidden_size",
        "n_embd",
        "num_attention_heads",
        "n_head",
        "num_hidden_layers",
        "n_layer",
        "vocab_size",
    ] {
        let mut config = model.config.clone();
        let map = match config.0.get_mut("text_config") {
            Some(Value::Object(nested)) if nested.contains_key(key) => nested,
            _ => &mut config.0,
        };
        let Some(size) = map.get(key).and_then(Value::as_u64) else { continue };
        map.insert(key.to_owned(), json!(size + 1));
        tried.push(key);
        match describe(&model, &config) {
            Ok(_) => wrong.push(format!("{key} {} is accepted", size + 1)),
            Err(message) => {
                // A tensor, a layer, or a key: another one where it is that which does not fit any more.
                let told = message.contains(" is no whole ")
                    || ["tensor ", "layer ", "config.json: "].iter().any(|what| message.starts_with(what));
                if !told {
                    wrong.push(format!("{key} {}: {message}", size + 1));
                }
            }
        }
    }
    if wrong.is_empty() { Ok(format!("errors for {}", tried.join(", "))) } else { Err(wrong.join("\n  ")) }
}
