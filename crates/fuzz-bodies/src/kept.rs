//! What long measurements leave for later runs: sensitivities and statistics.
//!
//! Both belong to a model and windows by hashes of these, which an input leaves to the body: `@model@` and `@windows@` stand for
//! those of the tiny model, so that seeds outlive changes of it.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mlx_format::Scheme;
use mlx_format::checkpoint::{Directory, parse_header};
use mlx_quant::dynamic::{DynamicPlan, DynamicSettings, Sensitivities, SensitivitySettings, Target};
use mlx_quant::methods::{Method, Recipe};
use mlx_quant::{DataSource, Model, Pick, Plan, QuantizeSettings, Settings, Silent, Windows, open, quantize};

use crate::work::{TOKENIZER, VOCABULARY, assert_helps, byte_tokenizer, work, write};

const HIDDEN: usize = 64;

/// One block of Llama, in which every linear has 64 columns.
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
"vocab_size": 258, "max_position_embeddings": 64, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

/// A tiny model with its windows.
pub(crate) struct Tiny {
    model: Model,
    windows: Windows,
    hashes: [(&'static str, String); 2],
}

pub(crate) static TINY: LazyLock<Tiny> = LazyLock::new(|| {
    let files: &'static [(&'static str, &'static [u8])] = Vec::leak(vec![
        ("config.json", CONFIG.as_bytes()),
        ("model.safetensors", Vec::leak(weights())),
        ("tokenizer.json", TOKENIZER),
    ]);
    let model = open(&Directory::Embedded { name: "tiny", files }).expect("a valid model");
    let pick = Pick::EvenlySpaced { windows: 2 };
    let windows = Windows::read(&DataSource::BuiltinCalibration, byte_tokenizer(), VOCABULARY, 16, pick);
    let windows = windows.expect("the built-in text is long enough");
    let hashes = [("@model@", model.hash().expect("a hash")), ("@windows@", windows.tokens_hash())];
    Tiny { model, windows, hashes }
});

impl Tiny {
    /// Bytes with hashes where they are asked for.
    fn with_hashes(&self, bytes: &[u8]) -> Vec<u8> {
        self.hashes.iter().fold(bytes.to_vec(), |bytes, (name, hash)| replaced(&bytes, name, hash))
    }

    /// The other way round.
    fn without_hashes(&self, bytes: &[u8]) -> Vec<u8> {
        self.hashes.iter().fold(bytes.to_vec(), |bytes, (name, hash)| replaced(&bytes, hash, name))
    }

    fn settings() -> Settings {
        Settings { quantize: Scheme::affine(4, 64).ok(), ..Settings::default() }
    }

    fn plan(&self) -> Plan {
        Plan::new(&self.model.checkpoint, &self.model.config, Self::settings()).expect("a plan")
    }
}

fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let (mut made, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(from.as_bytes()) {
            made.extend_from_slice(to.as_bytes());
            at += from.len();
        } else {
            made.push(bytes[at]);
            at += 1;
        }
    }
    made
}

/// model.safetensors of the tiny model: weights drawn by a linear congruential generator.
fn weights() -> Vec<u8> {
    let matrices = [
        ("model.embed_tokens", VOCABULARY),
        ("model.layers.0.self_attn.q_proj", HIDDEN),
        ("model.layers.0.self_attn.k_proj", 32),
        ("model.layers.0.self_attn.v_proj", 32),
        ("model.layers.0.self_attn.o_proj", HIDDEN),
        ("model.layers.0.mlp.gate_proj", HIDDEN),
        ("model.layers.0.mlp.up_proj", HIDDEN),
        ("model.layers.0.mlp.down_proj", HIDDEN),
        ("lm_head", VOCABULARY),
    ];
    let norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"];
    let shapes = matrices.map(|(name, rows)| (name, vec![rows, HIDDEN])).into_iter();
    let (mut entries, mut data, mut state) = (Vec::new(), Vec::new(), 1u32);
    for (name, shape) in shapes.chain(norms.map(|name| (name, vec![HIDDEN]))) {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let drawn = f64::from(state) / f64::from(u32::MAX) - 0.5;
            let value = if shape.len() == 1 { 1.0 + drawn } else { drawn * 0.3 } as f32;
            // bfloat16 is the upper half of float32.
            data.extend_from_slice(&value.to_le_bytes()[2..]);
        }
        let end = data.len();
        entries.push(format!(
            r#""{name}.weight":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// A file of sensitivities. What is taken from it are figures that can be computed with: all of them finite and none negative, as are
/// those of a plan that is made of them, which keeps to its size.
///
/// # Panics
/// If they are not, or an error does not help.
pub fn sensitivities(bytes: &[u8]) {
    let path = write("sensitivities.json", &TINY.with_hashes(bytes));
    let settings = SensitivitySettings { threads: 1, ..SensitivitySettings::default() };
    let read =
        || mlx_quant::dynamic::sensitivities(&TINY.model, &TINY.windows, &settings, Some(&path), &Silent);
    let found = match read() {
        Ok(found) => found,
        Err(error) => return assert_helps(&error, &path.display().to_string()),
    };
    for layer in &found.layers {
        let sound = |value: &f32| value.is_finite() && *value >= 0.0;
        assert!(layer.seen.iter().all(|seen| seen.inputs.iter().chain(&seen.gradients).all(sound)));
        assert!(layer.costs.iter().all(|cost| cost.kl.is_finite() && cost.kl >= 0.0), "{:?}", layer.costs);
    }
    assert_eq!(read().expect("what was read or written before"), found);
    for columns in found.columns().values() {
        assert!(columns.iter().all(|weight| weight.is_finite() && *weight >= 0.0), "{columns:?}");
    }
    plans(&found);
}

fn plans(found: &Sensitivities) {
    for target in [Target::BitsPerWeight(4.5), Target::Bytes(40_000), Target::Divergence(0.1)] {
        let dynamic = DynamicSettings::new(target);
        let settings = Tiny::settings();
        let Ok(made) = DynamicPlan::new(&TINY.model, &settings, found, &dynamic) else { continue };
        assert!(made.predicted_kl.is_finite() && made.predicted_kl >= 0.0, "{}", made.predicted_kl);
        match target {
            Target::BitsPerWeight(bits) => assert!(made.plan.bits_per_weight() <= bits),
            Target::Bytes(bytes) => assert!(made.plan.layout.tensor_bytes() <= bytes),
            Target::Divergence(kl) => assert!(made.predicted_kl <= kl),
        }
    }
}

/// A directory of statistics that are complete.
struct Statistics {
    directory: PathBuf,
    plan: Plan,
    /// Files of matrices, by name.
    matrices: Vec<(String, Vec<u8>)>,
    key: Vec<u8>,
}

static STATISTICS: LazyLock<Statistics> = LazyLock::new(|| {
    let (directory, plan) = (work().join("statistics"), TINY.plan());
    run(&plan, &directory).expect("the tiny model is quantized");
    let key = std::fs::read(directory.join(KEY)).expect("a key");
    let mut matrices = Vec::new();
    for entry in std::fs::read_dir(&directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            matrices.push((name, std::fs::read(&path).expect("read")));
        }
    }
    matrices.sort();
    Statistics { directory, plan, matrices, key }
});

const KEY: &str = "statistics.json";

/// GPTQ on statistics, into a directory that is empty before and forgotten after.
fn run(plan: &Plan, statistics: &Path) -> Result<(), mlx_quant::Error> {
    let target = work().join("quantized");
    let settings = QuantizeSettings {
        threads: 1,
        statistics: Some(statistics.to_owned()),
        ..QuantizeSettings::new(Recipe::of(Method::Gptq))
    };
    let made = quantize(&TINY.model, plan, &TINY.windows, &target, &settings, &Silent);
    if made.is_ok() {
        check_numbers(&target);
    }
    let _ = std::fs::remove_dir_all(&target);
    let _ = std::fs::remove_dir_all(work().join(".quantized.partial"));
    made.map(|_| ())
}

/// No scale or bias is NaN or infinite.
fn check_numbers(target: &Path) {
    let file = std::fs::read(target.join("model.safetensors")).expect("the weights");
    for tensor in parse_header(&file).expect("a valid file") {
        if tensor.name.ends_with(".scales") || tensor.name.ends_with(".biases") {
            let values = file[tensor.range].chunks_exact(2);
            // All ones in the exponent of bfloat16.
            let finite = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]) & 0x7f80 != 0x7f80;
            assert!(values.into_iter().all(finite), "{} is not finite", tensor.name);
        }
    }
}

/// A directory of statistics: the key (nothing for the right one), a line feed, the name of a file of matrices (another one is taken
/// where there is none of that name), a line feed, what is in it. Quantizing with it ends in a model of finite numbers or
/// in an error.
///
/// # Panics
/// If it does not, or an error does not help.
pub fn statistics(bytes: &[u8]) {
    let Statistics { directory, plan, matrices, key } = &*STATISTICS;
    let mut parts = bytes.splitn(3, |byte| *byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let (own, name, content) = (part(), part(), part());
    let key = if own.is_empty() { key.clone() } else { TINY.with_hashes(own) };
    std::fs::write(directory.join(KEY), key).expect("written");
    let sum: usize = name.iter().map(|byte| *byte as usize).sum();
    let named = matrices.iter().find(|(of, _)| of.as_bytes() == name);
    let (name, right) = named.unwrap_or(&matrices[sum % matrices.len()]);
    let content = if content.is_empty() { right } else { content };
    std::fs::write(directory.join(name), content).expect("written");
    if let Err(error) = run(plan, directory) {
        assert_helps(&error, &directory.display().to_string());
    }
    std::fs::write(directory.join(name), right).expect("written");
}

/// Real files of both kinds in the form of the bodies' inputs, for the directories of seeds.
///
/// # Panics
/// If they cannot be made.
pub fn kept_seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let path = work().join("seed.json");
    let settings = SensitivitySettings { threads: 1, ..SensitivitySettings::default() };
    mlx_quant::dynamic::sensitivities(&TINY.model, &TINY.windows, &settings, Some(&path), &Silent)
        .expect("measured");
    let measured = std::fs::read(&path).expect("read");
    std::fs::remove_file(&path).expect("removed");
    let mut seeds = vec![("sensitivities", "llama.json".to_owned(), TINY.without_hashes(&measured))];
    let key = serde_json::from_slice::<serde_json::Value>(&STATISTICS.key).expect("JSON").to_string();
    let key = TINY.without_hashes(key.as_bytes());
    for (name, content) in &STATISTICS.matrices {
        let seed = [&key[..], b"\n", name.as_bytes(), b"\n", content].concat();
        seeds.push(("statistics", name.trim_end_matches(".safetensors").to_owned(), seed));
    }
    seeds
}
