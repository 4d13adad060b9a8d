//! Evaluation: what it measures, that nothing but the model and the text changes it, and what it refuses.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_imports,
    reason = "a test panics to fail, and shares its vocabulary"
)]

mod cache;
#[path = "../common/mod.rs"]
mod common;
mod invariance;
mod numbers;
mod read;
mod refusals;
mod sources;
mod suite;

use std::path::{Path, PathBuf};

use common::{convert_to, fixtures, open_path, quantize, write_checkpoint};
use mlx_format::checkpoint::Directory;
use mlx_format::{Dtype, Mode, Scheme};
use mlx_quant::data::DataError;
use mlx_quant::evaluate::{Against, Measures, TokenMeasure, measure, memory};
use mlx_quant::model::{SourceError, WeightsError};
use mlx_quant::walks::{Residency, Walk};
use mlx_quant::{
    DataSource, Error, Evaluation, EvaluationSettings, Event, Model, Observer, Pick, Settings, Silent,
    Windows, evaluate,
};
use mlx_quant_engine::Tensor;
use serde_json::Value;
use tempfile::TempDir;

/// Copied from the zoo: dense, mixtures of experts, latent attention, delta nets, sinks, learned positions.
const ZOO: [&str; 6] = ["deepseek_v3", "gpt2", "gpt_oss", "llama_tied", "qwen3_5", "qwen3_moe"];

fn demo() -> Model {
    mlx_quant::open(&Directory::Embedded { name: "demo model", files: mlx_quant_demo::FILES }).unwrap()
}

fn demo_moe() -> Model {
    open_path(&fixtures().join("demo-moe")).unwrap()
}

fn zoo(name: &str) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap()
}

/// A converted model, and the directory that goes with it.
struct Converted {
    model: Model,
    path: PathBuf,
    directory: TempDir,
}

impl std::ops::Deref for Converted {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

fn converted(model: &Model, settings: Settings) -> Converted {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    convert_to(model, settings, &path).unwrap();
    Converted { model: open_path(&path).unwrap(), path, directory }
}

fn four_bits(model: &Model) -> Converted {
    converted(model, quantize(4, 64))
}

/// Windows of the beginning of the built-in held-out text.
fn windows(model: &Model, sequence_length: usize, windows: usize) -> Windows {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    std::fs::write(&file, text(0)).unwrap();
    read(model, &file, sequence_length, windows).unwrap()
}

/// Some thousand bytes of the built-in held-out text.
fn text(part: usize) -> &'static [u8] {
    &mlx_quant_texts::HELD_OUT.as_bytes()[part * 6000..][..6000]
}

fn read(model: &Model, data: &Path, sequence_length: usize, windows: usize) -> Result<Windows, DataError> {
    let pick = Pick::EvenlySpaced { windows };
    let vocabulary = model.vocabulary().unwrap();
    let data = DataSource::Path(data.to_owned());
    Windows::read(&data, &model.tokenizer().unwrap(), vocabulary, sequence_length, pick)
}

/// Without the one field that differs between runs.
fn timeless(mut evaluation: Evaluation) -> Evaluation {
    evaluation.subject.seconds = 0.0;
    evaluation
}

fn evaluated(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
) -> Evaluation {
    timeless(evaluate(model, reference, windows, settings, &Silent).unwrap())
}

fn refused(model: &Model, reference: Option<&Model>, windows: &Windows) -> Error {
    let error = evaluate(model, reference, windows, &EvaluationSettings::default(), &Silent).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("hint: "), "{error}");
    error
}

fn against(measures: &Measures) -> &Against {
    measures.against.as_ref().unwrap()
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn tokens(windows: &Windows) -> Vec<&[u32]> {
    windows.picked.iter().map(|window| window.tokens.as_slice()).collect()
}

fn hidden(walk: &Walk<'_>, windows: &[&[u32]]) -> Vec<Tensor> {
    walk.hidden(windows, &pool(2), &Silent, &mut 0).unwrap()
}

fn numbers(tensors: &[Tensor]) -> Vec<f32> {
    tensors.iter().flat_map(|tensor| tensor.flatten_all().unwrap().to_vec().unwrap()).collect()
}

fn measured(model: &Walk<'_>, reference: &Walk<'_>, windows: &[&[u32]]) -> Vec<Vec<TokenMeasure>> {
    let (own, theirs) = (hidden(model, windows), hidden(reference, windows));
    measure((model, own), Some((reference, theirs)), windows, &pool(2), &Silent).unwrap()
}

fn mxfp4() -> Settings {
    Settings { quantize: Some(Scheme::new(Mode::Mxfp4, None, None).unwrap()), ..Settings::default() }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn edit(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

fn edit_config(directory: &Path, change: impl FnOnce(&mut Value)) {
    edit(&directory.join("config.json"), |bytes| {
        let mut config = serde_json::from_slice(bytes).unwrap();
        change(&mut config);
        *bytes = config.to_string().into_bytes();
    });
}

/// Changes the header of model.safetensors and the data behind it.
fn edit_weights(directory: &Path, change: impl FnOnce(&mut Value, &mut [u8])) {
    edit(&directory.join("model.safetensors"), |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes.split_off(8 + length);
        change(&mut header, &mut data);
        let header = header.to_string();
        *bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
    });
}
