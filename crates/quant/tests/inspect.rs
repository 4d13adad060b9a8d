//! What [`mlx_quant::inspect`] says of the zoo: that mlx_lm loads every checkpoint as it is and every conversion, which
//! mlx-lm made equal ones of (`zoo.rs`), and that the figures are those of the plan.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{PLAIN, bf16_bytes, convert_to, fixtures, open_path, quantize, shared, write_checkpoint};
use mlx_format::checkpoint::Directory;
use mlx_format::{Dtype, Mode, Scheme};
use mlx_quant::inspect::{Form, Verdict, inspect, verify};
use mlx_quant::source::open_files;
use mlx_quant::{Error, Event, Observer, Plan, Settings, Silent};

/// Verifies a directory and its conversions; returns how many directories that were.
fn verified(directory: &Path) -> usize {
    let name = directory.file_name().unwrap().display();
    let model = open_path(directory).unwrap();
    let verification = verify(&model, &Silent, 2).unwrap();
    assert_eq!(verification.verdict, Verdict::Loads, "{name}: {verification}");
    assert!(verification.tensors > 0 && verification.bytes > 0, "{name}");
    let modes = [Mode::Affine, Mode::Mxfp4, Mode::Mxfp8];
    for mode in modes {
        let temporary = tempfile::tempdir().unwrap();
        let target = temporary.path().join("out");
        let settings =
            Settings { quantize: Some(Scheme::new(mode, None, None).unwrap()), ..Settings::default() };
        let plan = Plan::new(&model.checkpoint, &model.config, settings.clone()).unwrap();
        convert_to(&model, settings, &target).unwrap();
        let converted = open_files(&Directory::open(&target).unwrap()).unwrap();
        let verification = verify(&converted, &Silent, 2).unwrap();
        assert_eq!(verification.verdict, Verdict::Loads, "{name} {}: {verification}", mode.name());
        let inspection = inspect(&converted).unwrap();
        assert_eq!(inspection.form, Form::Quantized, "{name}");
        assert_eq!(inspection.parameters, plan.parameters, "{name} {}", mode.name());
        assert_eq!(inspection.bits_per_weight, plan.bits_per_weight(), "{name} {}", mode.name());
        assert!(inspection.decoder_described && inspection.dimensions.is_some(), "{name}");
    }
    1 + modes.len()
}

fn whole(zoo: &Path) -> usize {
    let mut directories: Vec<_> =
        std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    directories.retain(|directory| directory.join("config.json").is_file());
    directories.iter().map(|directory| verified(directory)).sum()
}

#[test]
fn checkpoints_in_the_repository() {
    assert_eq!(whole(&fixtures().join("zoo")), 6 * 4);
}

#[test]
fn names_are_looked_up_once_for_a_config() {
    let mut model = open_path(&fixtures().join("packed/w8a8")).unwrap();
    let first = model.named().unwrap();
    assert!(Arc::ptr_eq(&first, &model.named().unwrap()));
    assert!(Arc::ptr_eq(&first, &model.weights().unwrap().named));
    model.config.0.insert("rms_norm_eps".to_owned(), 0.5.into());
    let other = model.named().unwrap();
    assert_ne!(other.decoder, first.decoder);
    assert_eq!(other.tensors.len(), first.tensors.len());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_checkpoint_of_the_shared_zoo() {
    assert_eq!(whole(&shared().join("zoo")), 40 * 4);
}

/// Listings of the library are per layer, in natural order, and bytes add up.
#[test]
fn layers_and_totals_add_up() {
    let temporary = tempfile::tempdir().unwrap();
    let target = temporary.path().join("out");
    let model = open_path(&fixtures().join("zoo/qwen3_moe")).unwrap();
    convert_to(&model, quantize(4, 32), &target).unwrap();
    let inspection = inspect(&open_path(&target).unwrap()).unwrap();
    let layers: u64 = inspection.layers.iter().map(|layer| layer.bytes).sum();
    assert_eq!(layers + inspection.other.bytes, inspection.tensor_bytes);
    assert_eq!(inspection.dtypes.values().sum::<u64>(), inspection.tensor_bytes);
    let experts =
        inspection.layers.iter().find(|layer| layer.path.ends_with("switch_mlp.down_proj")).unwrap();
    assert_eq!((experts.shape.len(), experts.packing.as_ref().unwrap().group_size), (3, 32));
    let gates = inspection.layers.iter().filter(|layer| layer.path.ends_with("mlp.gate"));
    assert!(gates.clone().count() > 0);
    for gate in gates {
        assert_eq!(gate.packing.as_ref().unwrap().bits, 8, "{}", gate.path);
    }
}

/// Rows are read in pieces: the element is counted from the start of the tensor, and each tensor is one problem.
#[test]
fn elements_of_large_tensors_are_counted_from_the_start() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("model");
    let (rows, columns) = (3000usize, 512usize);
    let mut head = bf16_bytes((0..rows * columns).map(|_| 0.5));
    for element in [1_400_000, 1_500_001] {
        head[element * 2..][..2].copy_from_slice(&bf16_bytes([f32::NEG_INFINITY]));
    }
    let ones = bf16_bytes((0..rows * columns).map(|_| 1.0));
    let norm = bf16_bytes([1.0; 512]);
    write_checkpoint(
        &directory,
        PLAIN,
        &[
            ("lm_head.weight", Dtype::BF16, vec![rows, columns], head),
            ("model.embed_tokens.weight", Dtype::BF16, vec![rows, columns], ones),
            ("model.norm.weight", Dtype::BF16, vec![columns], norm),
        ],
    );
    let model = open_path(&directory).unwrap();
    for threads in [1, 3] {
        let verification = verify(&model, &Silent, threads).unwrap();
        let values: Vec<_> =
            verification.problems.iter().filter(|problem| problem.subject == "lm_head.weight").collect();
        assert_eq!(values.len(), 1);
        assert!(values[0].message.contains("2 value(s)"), "{}", values[0]);
        assert!(values[0].message.contains("element 1400000 is -inf"), "{}", values[0]);
    }
}

/// Stops at once, and says so.
struct Impatient;

impl Observer for Impatient {
    fn event(&self, _: Event<'_>) {}

    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn stops_when_asked_to() {
    let model = open_path(&fixtures().join("zoo/gpt2")).unwrap();
    assert!(matches!(verify(&model, &Impatient, 1), Err(Error::Interrupted)));
}

#[test]
fn other_tools_quantizations_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("model");
    let config = PLAIN.replacen('{', "{\"quantization_config\": {\"quant_method\": \"bitsandbytes\"}, ", 1);
    write_checkpoint(&directory, &config, &[("a.qweight", Dtype::I32, vec![2, 2], vec![0; 16])]);
    let model = open_path(&directory).unwrap();
    let error = verify(&model, &Silent, 1).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("bitsandbytes"));
    assert!(inspect(&model).is_err());
}
