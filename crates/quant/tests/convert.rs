//! What the zoo's listings do not show: threads, resuming, recipe files, decoding, fp8 sources, bad weights.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

#[cfg(feature = "demo")]
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{convert_to, fixtures, open_path, sha256};
use half::bf16;
use mlx_format::checkpoint::{Checkpoint, Directory, WriteError};
use mlx_format::{Dtype, FloatType, Mode, Scheme};
use mlx_quant::{Error, Event, Model, Observer, Overrides, Plan, PlanError, Settings, Silent, convert};
use serde_json::Value;

fn quantize(bits: u32, group_size: usize) -> Settings {
    Settings { quantize: Some(Scheme::affine(bits, group_size).unwrap()), ..Settings::default() }
}

fn moe() -> Model {
    open_path(&fixtures().join("demo-moe")).unwrap()
}

fn directory_hash(directory: &Path) -> String {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let all: Vec<String> = names
        .iter()
        .map(|path| {
            format!("{} {}", path.file_name().unwrap().display(), sha256(&std::fs::read(path).unwrap()))
        })
        .collect();
    sha256(all.join("\n").as_bytes())
}

/// A checkpoint of the given tensors beside a config.
fn write_checkpoint(directory: &Path, config: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("config.json"), config).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        header.insert(
            (*name).to_owned(),
            serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": range}),
        );
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(directory.join("model.safetensors"), file).unwrap();
}

fn bf16_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
}

const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let temporary = tempfile::tempdir().unwrap();
    let model = moe();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    let hashes: Vec<String> = [1, 2, 7]
        .into_iter()
        .map(|threads| {
            let target = temporary.path().join(threads.to_string());
            convert(&model, &plan, &target, threads, &Silent).unwrap();
            directory_hash(&target)
        })
        .collect();
    assert!(hashes.iter().all(|hash| *hash == hashes[0]));
}

/// Asks to stop after some progress.
struct StopAfter(AtomicUsize);

impl Observer for StopAfter {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Progress { .. }) {
            let _ =
                self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1)));
        }
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

/// Remembers how much an earlier run had done.
#[derive(Default)]
struct Resumed(AtomicUsize);

impl Observer for Resumed {
    fn event(&self, event: Event<'_>) {
        if let Event::Started { resumed, .. } = event {
            self.0.store(resumed as usize, Ordering::SeqCst);
        }
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let temporary = tempfile::tempdir().unwrap();
    let model = moe();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(3, 32)).unwrap();
    let (whole, resumed) = (temporary.path().join("whole"), temporary.path().join("resumed"));
    convert(&model, &plan, &whole, 2, &Silent).unwrap();

    let stopped = convert(&model, &plan, &resumed, 1, &StopAfter(AtomicUsize::new(1)));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(!resumed.exists() && temporary.path().join(".resumed.partial").is_dir());

    // Other settings do not continue this run, and do not destroy it.
    let other = Plan::new(&model.checkpoint, &model.config, quantize(4, 32)).unwrap();
    let refused = convert(&model, &other, &resumed, 2, &Silent).unwrap_err();
    assert!(matches!(refused, Error::Write(WriteError::OtherRun(_))) && refused.is_refusal());

    let observer = Resumed::default();
    convert(&model, &plan, &resumed, 1, &observer).unwrap();
    assert!(observer.0.load(Ordering::SeqCst) > 0, "the second run starts where the first stopped");
    assert_eq!(directory_hash(&whole), directory_hash(&resumed));
    assert!(!temporary.path().join(".resumed.partial").exists());
}

#[test]
fn decoding_gives_what_the_codes_say() {
    let temporary = tempfile::tempdir().unwrap();
    let model = moe();
    for (index, scheme) in [
        Scheme::affine(3, 32).unwrap(),
        Scheme::affine(8, 64).unwrap(),
        Scheme::new(Mode::Mxfp4, None, None).unwrap(),
        Scheme::new(Mode::Nvfp4, None, None).unwrap(),
    ]
    .into_iter()
    .enumerate()
    {
        let packed = temporary.path().join(format!("packed{index}"));
        let settings = Settings { quantize: Some(scheme), ..Settings::default() };
        convert_to(&model, settings, &packed).unwrap();
        let packed = open_path(&packed).unwrap();

        let again = Plan::new(&packed.checkpoint, &packed.config, quantize(4, 64));
        assert!(matches!(again, Err(PlanError::AlreadyQuantized(_))));

        let decoded = temporary.path().join(format!("decoded{index}"));
        let settings = Settings { dequantize: true, ..Settings::default() };
        let decoded = convert_to(&packed, settings, &decoded).unwrap();
        assert_eq!(decoded.tensors().values().filter(|tensor| tensor.dtype == Dtype::U32).count(), 0);
        let mut widest = 0f32;
        for (name, tensor) in decoded.tensors() {
            let path = name.trim_end_matches(".weight");
            let Some(codes) = packed.checkpoint.tensor(&format!("{path}.scales")) else { continue };
            // Decoded weights are within half a step of the source; compare the means of squares.
            let mut ours = vec![0f32; tensor.elements()];
            FloatType::from_dtype(tensor.dtype).unwrap().widen(decoded.bytes(tensor), &mut ours);
            let power = ours.iter().map(|v| v * v).sum::<f32>();
            assert!(power > 0.0 && codes.elements() > 0, "{name}");
            widest = widest.max(ours.iter().fold(0f32, |max, v| max.max(v.abs())));
        }
        assert!(widest.is_finite() && widest > 0.0);
    }
}

#[test]
fn a_grid_of_8_bits_survives_quantizing_and_decoding() {
    // Every group spans -255 to 0, so that its step is 1 and bfloat16 holds every value.
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let grid = (0..64 * 64).map(|i| match i % 64 {
        0 => 0.0,
        1 => -255.0,
        _ => ((i * 37) % 256) as f32 - 255.0,
    });
    write_checkpoint(&source, LLAMA, &[("lm_head.weight", Dtype::BF16, vec![64, 64], bf16_bytes(grid))]);
    let model = open_path(&source).unwrap();
    let first = temporary.path().join("first");
    convert_to(&model, quantize(8, 64), &first).unwrap();
    let packed = open_path(&first).unwrap();
    let settings = Settings { dequantize: true, ..Settings::default() };
    let decoded = convert_to(&packed, settings, &temporary.path().join("decoded")).unwrap();
    let tensor = decoded.tensor("lm_head.weight").unwrap();
    let original = model.checkpoint.tensor("lm_head.weight").unwrap();
    assert!(decoded.bytes(tensor) == model.checkpoint.bytes(original));
}

#[test]
fn recipe_files_set_layers_apart() {
    let temporary = tempfile::tempdir().unwrap();
    let model = moe();
    let text = "[[layer]]\npath = \"*.down_proj\"\nbits = 6\n[[layer]]\npath = \"model.embed_tokens\"\nkeep = true\n\
                [[layer]]\npath = \"*.self_attn.v_proj\"\nmode = \"mxfp8\"\n";
    let base = Scheme::affine(4, 64).unwrap();
    let overrides = Some(Overrides::parse(text, base).unwrap());
    let target = temporary.path().join("out");
    let written = convert_to(&model, Settings { overrides, ..quantize(4, 64) }, &target).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    let quantization = &config["quantization"];
    assert_eq!(quantization["model.embed_tokens"], false);
    assert_eq!(written.tensor("model.embed_tokens.weight").unwrap().dtype, Dtype::BF16);
    assert_eq!(quantization["model.layers.0.self_attn.v_proj"]["mode"], "mxfp8");
    assert!(written.tensor("model.layers.0.self_attn.v_proj.biases").is_none());
    assert_eq!(quantization["model.layers.0.mlp.switch_mlp.down_proj"]["bits"], 6);
    assert_eq!(std::fs::read_to_string(target.join("recipe.toml")).unwrap(), text);

    let unused = Some(Overrides::parse("[[layer]]\npath = \"*.no_such\"\nbits = 6", base).unwrap());
    let refused =
        Plan::new(&model.checkpoint, &model.config, Settings { overrides: unused, ..quantize(4, 64) });
    assert!(matches!(refused, Err(PlanError::Overrides(_))));
}

#[test]
fn fp8_with_block_scales_is_decoded_first() {
    let temporary = tempfile::tempdir().unwrap();
    let config = |fp8: bool| {
        let quantization =
            r#", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}"#;
        format!("{}{}}}", LLAMA.trim_end_matches('}'), if fp8 { quantization } else { "" })
    };
    let (rows, columns) = (200usize, 256usize);
    let codes: Vec<u8> = (0..rows * columns)
        .map(|i| ((i * 73 + i / 256) % 256) as u8)
        .map(|c| if c & 0x7F == 0x7F { 0 } else { c })
        .collect();
    let scales = [0.01f32, 0.02, 0.003, 0.5];
    let plain: Vec<f32> = (0..rows * columns)
        .map(|i| {
            let block = (i / columns / 128) * 2 + i % columns / 128;
            bf16::from_f32(mlx_format::fp::e4m3_decode(codes[i]) * scales[block]).to_f32()
        })
        .collect();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let scale_name = format!("{name}_scale_inv");
    let (fp8, bf16_dir) = (temporary.path().join("fp8"), temporary.path().join("bf16"));
    let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    write_checkpoint(
        &fp8,
        &config(true),
        &[
            (name, Dtype::F8_E4M3, vec![rows, columns], codes),
            (scale_name.as_str(), Dtype::F32, vec![2, 2], scale_bytes),
        ],
    );
    write_checkpoint(
        &bf16_dir,
        &config(false),
        &[(name, Dtype::BF16, vec![rows, columns], bf16_bytes(plain))],
    );
    let mut hashes = Vec::new();
    for (source, out) in [(&fp8, "a"), (&bf16_dir, "b")] {
        let target = temporary.path().join(out);
        let written = convert_to(&open_path(source).unwrap(), quantize(4, 64), &target).unwrap();
        let all: Vec<String> = written
            .tensors()
            .iter()
            .map(|(name, tensor)| format!("{name} {}", sha256(written.bytes(tensor))))
            .collect();
        hashes.push((all, std::fs::read_to_string(target.join("config.json")).unwrap()));
    }
    assert_eq!(hashes[0], hashes[1]);

    // Scales of another shape do not belong to the weight.
    write_checkpoint(
        &fp8,
        &config(true),
        &[
            (name, Dtype::F8_E4M3, vec![rows, columns], vec![0; rows * columns]),
            (scale_name.as_str(), Dtype::F32, vec![2], vec![0; 8]),
        ],
    );
    let model = open_path(&fp8).unwrap();
    assert!(matches!(
        Plan::new(&model.checkpoint, &model.config, quantize(4, 64)),
        Err(PlanError::Fp8 { .. })
    ));
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_name_and_leave_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let mut values = vec![0.5f32; 64 * 64];
    values[777] = f32::NAN;
    write_checkpoint(
        &source,
        LLAMA,
        &[("lm_head.weight", Dtype::BF16, vec![64, 64], bf16_bytes(values.clone()))],
    );
    let model = open_path(&source).unwrap();
    for settings in [
        quantize(4, 64),
        Settings::default(),
        Settings { dtype: Some(FloatType::F16), ..Settings::default() },
    ] {
        let target = temporary.path().join("out");
        let refused = convert_to(&model, settings.clone(), &target).unwrap_err();
        assert!(refused.is_refusal());
        let text = refused.to_string();
        assert!(
            text.contains("lm_head.weight") && text.contains("777") && text.contains("model.safetensors"),
            "{text}"
        );
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1, "nothing is left behind");
        convert_to(&model, Settings { allow_nonfinite: true, ..settings }, &target).unwrap();
        std::fs::remove_dir_all(&target).unwrap();
    }

    values[777] = 1e6;
    write_checkpoint(&source, LLAMA, &[("lm_head.weight", Dtype::BF16, vec![64, 64], bf16_bytes(values))]);
    let model = open_path(&source).unwrap();
    let settings = Settings { dtype: Some(FloatType::F16), ..quantize(4, 64) };
    let refused = convert_to(&model, settings, &temporary.path().join("out")).unwrap_err();
    assert!(matches!(refused, Error::Overflow { element: 777, .. }), "{refused}");
}

#[test]
fn sources_that_cannot_be_converted_say_why() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let weight = |name: &'static str, rows: usize, columns: usize| {
        (name, Dtype::BF16, vec![rows, columns], bf16_bytes((0..rows * columns).map(|i| i as f32)))
    };
    let plan = |config: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)], settings: Settings| {
        write_checkpoint(&source, config, tensors);
        let model = open_path(&source).unwrap();
        Plan::new(&model.checkpoint, &model.config, settings)
    };
    let head = || weight("lm_head.weight", 4, 96);
    assert!(matches!(plan(LLAMA, &[head()], quantize(4, 64)), Err(PlanError::NothingDivides { .. })));
    assert!(plan(LLAMA, &[head()], quantize(4, 32)).is_ok());
    let both = Settings { dequantize: true, ..quantize(4, 32) };
    assert!(matches!(plan(LLAMA, &[head()], both), Err(PlanError::Both)));
    let decode = Settings { dequantize: true, ..Settings::default() };
    assert!(matches!(plan(LLAMA, &[head()], decode), Err(PlanError::NotQuantized)));
    let awq =
        format!("{}, \"quantization_config\": {{\"quant_method\": \"awq\"}}}}", LLAMA.trim_end_matches('}'));
    assert!(matches!(plan(&awq, &[head()], quantize(4, 32)), Err(PlanError::Foreign { .. })));
    assert!(matches!(plan("{}", &[head()], quantize(4, 32)), Err(PlanError::Config(_))));

    let moe = LLAMA.replace("llama", "qwen3_moe");
    let expert = |name, columns| weight(name, 4, columns);
    let missing = [
        expert("model.layers.0.mlp.experts.0.up_proj.weight", 64),
        expert("model.layers.0.mlp.experts.2.up_proj.weight", 64),
    ];
    assert!(matches!(
        plan(&moe, &missing, quantize(4, 64)),
        Err(PlanError::MissingExpert { missing: 1, .. })
    ));
    let unequal = [
        expert("model.layers.0.mlp.experts.0.up_proj.weight", 64),
        expert("model.layers.0.mlp.experts.1.up_proj.weight", 128),
    ];
    assert!(matches!(plan(&moe, &unequal, quantize(4, 64)), Err(PlanError::UnequalExperts { odd: 1, .. })));

    // Heads that do not divide the rows of a fused projection.
    let v3 = r#"{"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_attention_heads": 3, "qk_nope_head_dim": 8, "v_head_dim": 8}"#;
    let kv = [weight("model.layers.0.self_attn.kv_b_proj.weight", 64, 64)];
    assert!(matches!(plan(v3, &kv, quantize(4, 64)), Err(PlanError::Shape { .. })));
}

#[test]
fn unknown_types_convert_by_names_and_say_so() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let values = |count: usize| bf16_bytes((0..count).map(|i| (i as f32).sin()));
    write_checkpoint(
        &source,
        r#"{"model_type": "brand_new"}"#,
        &[
            ("model.layers.0.attn.q.weight", Dtype::BF16, vec![8, 64], values(512)),
            ("model.layers.0.mlp.gate.weight", Dtype::BF16, vec![8, 64], values(512)),
            ("model.layers.0.norm.weight", Dtype::BF16, vec![64], values(64)),
            ("model.layers.0.some_norm.weight", Dtype::BF16, vec![2, 64], values(128)),
        ],
    );
    let model = open_path(&source).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("brand_new")));
    let target = temporary.path().join("out");
    convert(&model, &plan, &target, 1, &Silent).unwrap();
    let written = Checkpoint::open(Directory::open(&target).unwrap()).unwrap();
    let quantized: Vec<&String> = written.tensors().keys().filter(|name| name.ends_with("scales")).collect();
    assert_eq!(quantized, ["model.layers.0.attn.q.scales"]);
}

#[test]
#[cfg(feature = "demo")]
fn the_demo_model_is_what_the_project_trained() {
    let model = mlx_quant::open(&mlx_quant::demo()).unwrap();
    let tensors = model.checkpoint.tensors();
    assert_eq!(tensors.len(), 74);
    let mut text = String::new();
    for (name, tensor) in tensors {
        let hash = sha256(model.checkpoint.bytes(tensor));
        let _ = writeln!(text, "{name} {} {:?} {hash}", tensor.dtype, tensor.shape);
    }
    assert_eq!(sha256(text.as_bytes()), "7f1963c31d7ef4f532910443761b3ead76514a3ec1481c9c29c365ecd9fbee03");
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    assert!((plan.bits_per_weight() - 4.506).abs() < 5e-4);
}
