//! The forward pass of every zoo checkpoint against its oracle: transformers' logits where they differ from
//! mlx-lm's, else mlx-lm's.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use mlx_quant::model::{Forward, Weights};
use mlx_quant_engine::{Device, Tensor, cpu, plain};
use safetensors::SafeTensors;

/// Largest |logit - oracle| / largest |oracle|.
fn deviation(directory: &Path, device: &Device) -> f64 {
    let model = common::open_path(directory).unwrap();
    let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
    let decoder = weights.decoder(&model.config, false).unwrap();
    let bytes = std::fs::read(directory.join("oracle.safetensors")).unwrap();
    let oracle = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = oracle.tensor("tokens").unwrap();
    let ids: Vec<u32> =
        tokens.data().chunks_exact(4).map(|id| u32::from_le_bytes(id.try_into().unwrap())).collect();
    let logits = oracle.tensor("logits_transformers").or_else(|_| oracle.tensor("logits")).unwrap();
    let expected: Vec<f32> =
        logits.data().chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect();
    let length = tokens.shape()[1];
    let windows: Vec<&[u32]> = ids.chunks_exact(length).collect();

    let forward = Forward::new(&decoder, length, device).unwrap();
    let mut state = forward.embed(&weights, &windows).unwrap();
    for (index, block) in decoder.blocks.iter().enumerate() {
        let parameters = weights.load(&block.prefix, device).unwrap();
        state = forward.block(index, &parameters, state, &mut ()).unwrap();
    }
    let last = weights.load_last(&decoder, device).unwrap();
    let hidden = forward.finish(&last, &state).unwrap();
    let logits: Tensor = forward.logits(&last, &hidden).unwrap();
    let found = logits.to_vec().unwrap();
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    // transformers' logits are those of the first row alone.
    assert!(found.len() >= expected.len() && found.len().is_multiple_of(expected.len()));
    let worst = found.iter().zip(&expected).fold(0f32, |max, (a, b)| {
        assert!(a.is_finite());
        max.max((a - b).abs())
    });
    f64::from(worst / scale)
}

fn check_all(directory: &Path) {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.join("oracle.safetensors").exists());
    names.sort();
    assert!(!names.is_empty());
    let mut failed = Vec::new();
    println!("{:<24}{:>12}{:>12}", "checkpoint", "cpu", "plain");
    for path in &names {
        let name = path.file_name().unwrap().to_string_lossy();
        let run = |device: Device| {
            let path = path.clone();
            let run = AssertUnwindSafe(move || deviation(&path, &device));
            catch_unwind(run).unwrap_or(f64::NAN)
        };
        let (cpu, plain) = (run(cpu()), run(plain()));
        println!("{name:<24}{cpu:>12.1e}{plain:>12.1e}");
        if !(cpu <= 1e-4 && plain <= 1e-4) {
            failed.push(name.into_owned());
        }
    }
    println!("{} checkpoints", names.len());
    assert!(failed.is_empty(), "beyond 1e-4: {failed:?}");
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_zoo_checkpoint() {
    check_all(&common::shared().join("zoo"));
}

#[test]
fn the_seeded_checkpoints() {
    check_all(common::seeds::seeded().path());
}

#[test]
fn the_copied_checkpoints() {
    check_all(&common::fixtures().join("zoo"));
}
