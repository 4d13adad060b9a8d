//! Readers that aim at the full-precision stream.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its figures")]

mod common;

use std::path::Path;

use mlx_format::Scheme;
use mlx_format::checkpoint::Directory;
use mlx_quant::{DataSource, Model, Pick, Plan, QuantizeSettings, Settings, Silent, Windows, open, quantize};

use crate::common::{fixtures, open_path, random_windows};

fn windows(model: &Model, data: &DataSource, pick: Pick) -> Windows {
    Windows::read(data, &model.tokenizer().unwrap(), model.vocabulary().unwrap(), 128, pick).unwrap()
}

fn settings(correction: f32) -> QuantizeSettings {
    let mut settings = QuantizeSettings::new("gptq".parse().unwrap());
    settings.threads = 2;
    settings.method.correction = correction;
    settings
}

fn plan(model: &Model, bits: u32) -> Plan {
    let quantize = Some(Scheme::affine(bits, 32).unwrap());
    Plan::new(&model.checkpoint, &model.config, Settings { quantize, ..Settings::default() }).unwrap()
}

fn weights(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

/// Half of what inputs tell about the full-precision stream is worth a tenth of KL at three bits.
#[test]
fn a_correction_brings_the_model_nearer() {
    let model = open(&Directory::Embedded { name: "demo model", files: mlx_quant_demo::FILES }).unwrap();
    let calibration =
        windows(&model, &DataSource::BuiltinCalibration, Pick::Sampled { windows: 32, seed: 123 });
    let held_out = windows(&model, &DataSource::BuiltinHeldOut, Pick::EvenlySpaced { windows: 8 });
    let kl = |correction| {
        let out = tempfile::tempdir().unwrap();
        let settings = QuantizeSettings { evaluate: Some(held_out.clone()), ..settings(correction) };
        let made =
            quantize(&model, &plan(&model, 3), &calibration, &*out.path().join("o"), &settings, &Silent);
        made.unwrap().evaluation.unwrap().total.against.unwrap().kl_mean
    };
    let (without, with) = (kl(0.0), kl(0.5));
    println!("KL {without:.4} without a correction, {with:.4} with it");
    assert!(with < 0.95 * without, "{with} {without}");
}

/// Windows that come a few at a time, some or all of them at a site together: the same bytes, those of experts among them. Kept
/// statistics leave nothing to aim at.
#[test]
fn who_takes_windows_decides_nothing() {
    for name in ["llama_tied", "qwen3_moe"] {
        let model = open_path(&fixtures().join("zoo").join(name)).unwrap();
        let windows = random_windows(&model, 1, 20, 48);
        let run = |change: &dyn Fn(&mut QuantizeSettings)| {
            let out = tempfile::tempdir().unwrap();
            let mut settings = settings(0.5);
            change(&mut settings);
            let target = out.path().join("o");
            quantize(&model, &plan(&model, 4), &windows, &*target, &settings, &Silent).unwrap();
            weights(&target)
        };
        let usual = run(&|_| {});
        assert!(run(&|settings| settings.low_memory = true) == usual, "{name}");
        assert!(run(&|settings| settings.threads = 1) == usual, "{name}");
        let none = run(&|settings| settings.method.correction = 0.0);
        assert!(none != usual, "{name}");
        let kept = tempfile::tempdir().unwrap();
        let statistics = |correction: f32| {
            run(&|settings| {
                settings.method.correction = correction;
                settings.statistics = Some(kept.path().join("s"));
            })
        };
        assert!(statistics(0.5) == statistics(0.0), "{name}");
    }
}
