//! A run that one engine began and another one is to go on with.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;

use mlx_format::Scheme;
use mlx_format::checkpoint::{Checkpoint, Destination, Directory, WriteError};
use mlx_quant::dwq::DwqSettings;
use mlx_quant::recipes::Device;
use mlx_quant::session::{Computed, Quantized};
use mlx_quant::{Error, Model, Observer, Plan, QuantizeSettings, Settings, Silent, Windows, quantize};
use mlx_quant_engine::{Cpu, cpu};

use crate::common::{Stopper, Warned, fixtures, open_path, random_windows};

/// No whole number of batches.
const WINDOWS: usize = 6;

/// The processor twice: with batches of another size it is another engine. And a card, where there is an adapter.
fn engines() -> Vec<Device> {
    let mut all = vec![cpu(), Device::new(Cpu::in_batches(4))];
    all.extend(card());
    all
}

#[cfg(feature = "gpu")]
fn card() -> Option<Device> {
    let first = mlx_quant_engine::gpu::adapters().into_iter().next()?;
    Some(Device::new(
        mlx_quant_engine::gpu::Gpu::open(&format!("gpu:{}", first.index).parse().unwrap()).unwrap(),
    ))
}

#[cfg(not(feature = "gpu"))]
fn card() -> Option<Device> {
    None
}

fn model(name: &str, device: &Device) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap().on(device)
}

fn windows(model: &Model, seed: u64) -> Windows {
    random_windows(model, seed, WINDOWS, 32)
}

fn run<'d>(
    model: &Model,
    recipe: &str,
    low_memory: bool,
    target: impl Into<Destination<'d>>,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    let settings = Settings { quantize: Some(Scheme::affine(4, 32).unwrap()), ..Settings::default() };
    let plan = Plan::new(&model.checkpoint, &model.config, settings).unwrap();
    let dwq = DwqSettings { iterations: 3, batch_size: 3, ..DwqSettings::default() };
    let lessons = Some((windows(model, 1), windows(model, 2)));
    let settings = QuantizeSettings {
        threads: 2,
        low_memory,
        dwq,
        lessons,
        ..QuantizeSettings::new(recipe.parse().unwrap())
    };
    quantize(model, &plan, &windows(model, 3), target, &settings, observer)
}

/// Every tensor of the first block, in its order.
fn first_block(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let made = Checkpoint::open(Directory::open(directory).unwrap()).unwrap();
    let own = made.tensors().iter().filter(|(name, _)| name.starts_with("model.layers.0."));
    own.map(|(name, tensor)| (name.clone(), made.bytes(tensor).to_vec())).collect()
}

#[test]
fn another_engine_goes_on_only_if_it_is_told_to() {
    let engines = engines();
    for name in ["llama_tied", "qwen3_moe"] {
        let directory = tempfile::tempdir().unwrap();
        for (from, first) in engines.iter().enumerate() {
            let whole = directory.path().join(format!("{from}"));
            run(&model(name, first), "awq+gptq", false, &whole, &Silent).unwrap();
            for (to, second) in engines.iter().enumerate().filter(|(to, _)| *to != from) {
                let low_memory = (from + to) % 2 == 0;
                let target = directory.path().join(format!("{from}-{to}"));
                let stopped = run(&model(name, first), "awq+gptq", low_memory, &target, &Stopper(1.into()));
                assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
                let refused =
                    run(&model(name, second), "awq+gptq", low_memory, &target, &Silent).unwrap_err();
                assert!(
                    refused.is_refusal() && matches!(refused, Error::Write(WriteError::OtherEngine { .. }))
                );
                let text = refused.to_string();
                for word in [&first.name(), &second.name(), "--restart-block"] {
                    assert!(text.contains(word), "{text}");
                }
                let told = Warned::default();
                let on = Destination { restart_block: true, ..Destination::from(&target) };
                let made = run(&model(name, second), "awq+gptq", low_memory, on, &told).unwrap();
                assert_eq!(made.resumed_blocks, 1);
                let told = told.0.into_inner().unwrap();
                assert!(told.len() == 1 && told[0].contains(&first.name()), "{told:?}");
                let named: Vec<_> = made.engines.iter().map(|one| (&one.engine, one.blocks)).collect();
                assert_eq!(named[0], (&first.name(), 1));
                assert!(named.len() == 2 && *named[1].0 == second.name() && named[1].1 > 0, "{named:?}");
                let card = std::fs::read_to_string(target.join("README.md")).unwrap();
                assert!(card.contains(&Computed::list(&made.engines)), "{card}");
                // What was finished stays as it was.
                assert!(first_block(&target) == first_block(&whole), "{name}: {first:?}, {second:?}");
            }
        }
    }
}

/// Behind the last block the training goes on too, and a third engine may follow.
#[test]
fn a_training_goes_on_with_another_engine() {
    let engines = engines();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    // All blocks, the head, and a step.
    let blocks =
        mlx_quant::walks::Walk::open(&model("llama_tied", &cpu())).unwrap().decoder.blocks.len() as u64;
    let stopped =
        run(&model("llama_tied", &engines[0]), "gptq+dwq", false, &target, &Stopper((blocks + 2).into()));
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    let last = engines.last().unwrap();
    let refused = run(&model("llama_tied", last), "gptq+dwq", false, &target, &Silent).unwrap_err();
    assert!(matches!(refused, Error::Write(WriteError::OtherEngine { .. })), "{refused}");
    let on = Destination { restart_block: true, ..Destination::from(&target) };
    let made = run(&model("llama_tied", last), "gptq+dwq", false, on, &Silent).unwrap();
    assert_eq!(made.resumed_blocks as u64, blocks);
    assert_eq!(made.distilled.unwrap().steps, 3);
}
