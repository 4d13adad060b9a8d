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

const LLAMA: &str = r#"{"model_type": "llama", "num_hidden_layers": 0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

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
        // Close to the source, layer by layer, as that many bits allow.
        let limit = if scheme.bits() == 8 { 0.01 } else { 0.2 };
        for (name, tensor) in decoded.tensors() {
            let path = name.trim_end_matches(".weight");
            if packed.checkpoint.tensor(&format!("{path}.scales")).is_none() {
                continue;
            }
            let float = FloatType::from_dtype(tensor.dtype).unwrap();
            let mut ours = vec![0f32; tensor.elements()];
            float.widen(decoded.bytes(tensor), &mut ours);
            let source = source_of(&model, name);
            assert_eq!(source.len(), ours.len(), "{name}");
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
            let error = square(&mut source.iter().zip(&ours).map(|(a, b)| a - b))
                / square(&mut source.iter().copied());
            // Router gates are protected, and the fp modes lose the smallest groups.
            assert!(error.sqrt() < limit, "{name} at {scheme}: relative error {}", error.sqrt());
        }
    }
}

/// The values of an output tensor of the MoE fixture in its source, experts stacked.
fn source_of(model: &Model, name: &str) -> Vec<f32> {
    let names: Vec<String> = match name.split_once(".switch_mlp.") {
        None => vec![name.to_owned()],
        Some((outer, inner)) => (0..8).map(|expert| format!("{outer}.experts.{expert}.{inner}")).collect(),
    };
    let mut all = Vec::new();
    for name in names {
        let tensor = model.checkpoint.tensor(&name).unwrap_or_else(|| panic!("{name}"));
        let mut values = vec![0f32; tensor.elements()];
        FloatType::from_dtype(tensor.dtype).unwrap().widen(model.checkpoint.bytes(tensor), &mut values);
        all.extend(values);
    }
    all
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

    // The largest float32 is beyond the largest bfloat16.
    let wide: Vec<u8> = [f32::MAX, 1.0].repeat(32).iter().flat_map(|value| value.to_le_bytes()).collect();
    write_checkpoint(&source, LLAMA, &[("lm_head.weight", Dtype::F32, vec![1, 64], wide)]);
    let model = open_path(&source).unwrap();
    for settings in [quantize(4, 64), Settings::default()] {
        let refused = convert_to(&model, settings, &temporary.path().join("out")).unwrap_err();
        assert!(matches!(refused, Error::Overflow { element: 0, dtype: "bfloat16", .. }), "{refused}");
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
fn incomplete_models_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let values = |count: usize| bf16_bytes((0..count).map(|i| (i as f32).sin()));
    let plan = |config: &str, names: &[&str]| {
        let tensors: Vec<_> =
            names.iter().map(|name| (*name, Dtype::BF16, vec![8, 64], values(512))).collect();
        write_checkpoint(&source, config, &tensors);
        let model = open_path(&source).unwrap();
        Plan::new(&model.checkpoint, &model.config, quantize(4, 64))
    };
    let two_layers = LLAMA.replace("\"num_hidden_layers\": 0", "\"num_hidden_layers\": 2");
    let first = "model.layers.0.self_attn.q_proj.weight";
    assert!(matches!(plan(&two_layers, &[first]), Err(PlanError::MissingLayer { missing: 1, layers: 2 })));
    let huge = LLAMA.replace("\"num_hidden_layers\": 0", "\"num_hidden_layers\": 2147483647");
    assert!(matches!(plan(&huge, &[first]), Err(PlanError::MissingLayer { missing: 1, .. })));
    let gemma = huge.replace("llama", "gemma4_text");
    assert!(matches!(plan(&gemma, &[first]), Err(PlanError::MissingLayer { .. })));
    // A tensor that no llama has, such as experts in a form that mlx-lm does not know.
    assert!(matches!(plan(LLAMA, &["model.experts.gate_up_proj"]), Err(PlanError::Unknown { .. })));
    assert!(matches!(plan(LLAMA, &["model.some_2d_norm.weight"]), Err(PlanError::NothingToQuantize)));

    std::fs::rename(source.join("model.safetensors"), source.join("model-00001-of-00002.safetensors"))
        .unwrap();
    let model = open_path(&source).unwrap();
    let refused = Plan::new(&model.checkpoint, &model.config, quantize(4, 64));
    assert!(matches!(refused, Err(PlanError::MissingShards { found: 1, expected: 2, .. })));
}

#[test]
fn damaged_packed_layers_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let config =
        format!("{}, \"quantization\": {{\"group_size\": 64, \"bits\": 4}}}}", LLAMA.trim_end_matches('}'));
    let decode = Settings { dequantize: true, ..Settings::default() };
    let plan = |weight: Vec<usize>, scales: Vec<usize>, biases: (Dtype, Vec<usize>)| {
        let bytes =
            |dtype: Dtype, shape: &[usize]| vec![0u8; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        let tensors = [
            ("lm_head.weight", Dtype::U32, bytes(Dtype::U32, &weight), weight),
            ("lm_head.scales", Dtype::BF16, bytes(Dtype::BF16, &scales), scales),
            ("lm_head.biases", biases.0, bytes(biases.0, &biases.1), biases.1),
        ]
        .map(|(name, dtype, bytes, shape)| (name, dtype, shape, bytes));
        write_checkpoint(&source, &config, &tensors);
        let model = open_path(&source).unwrap();
        let plan = Plan::new(&model.checkpoint, &model.config, decode.clone())?;
        let target = temporary.path().join("out");
        convert(&model, &plan, &target, 1, &Silent).unwrap();
        std::fs::remove_dir_all(&target).unwrap();
        Ok(())
    };
    plan(vec![4, 8], vec![4, 1], (Dtype::BF16, vec![4, 1])).unwrap();
    for (weight, scales, biases) in [
        (vec![4, 0], vec![4, 0], (Dtype::BF16, vec![4, 0])),
        (vec![8], vec![1], (Dtype::BF16, vec![1])),
        (vec![4, 8], vec![2, 2], (Dtype::BF16, vec![2, 2])),
        (vec![4, 8], vec![4, 1], (Dtype::F32, vec![4, 1])),
        (vec![4, 8], vec![4, 1], (Dtype::BF16, vec![4, 2])),
        (vec![4, 8], vec![4, 1, 1], (Dtype::BF16, vec![4, 1, 1])),
        (vec![4, 7], vec![4, 1], (Dtype::BF16, vec![4, 1])),
    ] {
        let context = format!("{weight:?} {scales:?} {biases:?}");
        let refused: Result<(), PlanError> = plan(weight, scales, biases);
        assert!(
            matches!(refused, Err(PlanError::Packed { .. } | PlanError::UnclearScheme { .. })),
            "{context}"
        );
    }

    // Old MLX models of DeepSeek V3 hold kv_b_proj packed: splitting packed words would be nonsense.
    let v3 = r#"{"model_type": "deepseek_v3", "num_hidden_layers": 0, "num_attention_heads": 2, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "quantization": {"group_size": 64, "bits": 4}}"#;
    let kv = ("model.layers.0.self_attn.kv_b_proj.weight", Dtype::U32, vec![32, 8], vec![0; 32 * 8 * 4]);
    write_checkpoint(&source, &v3.replace("layers\": 0", "layers\": 1"), &[kv]);
    let model = open_path(&source).unwrap();
    assert!(matches!(Plan::new(&model.checkpoint, &model.config, decode), Err(PlanError::Shape { .. })));
}

#[test]
fn empty_and_scalar_tensors_are_carried_along() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let weight = bf16_bytes((0..64).map(|i| i as f32));
    write_checkpoint(
        &source,
        LLAMA,
        &[
            ("lm_head.weight", Dtype::BF16, vec![1, 64], weight),
            ("empty.weight", Dtype::BF16, vec![1 << 60, 0], vec![]),
            ("scalar", Dtype::F32, vec![], 1f32.to_le_bytes().to_vec()),
        ],
    );
    let model = open_path(&source).unwrap();
    let written = convert_to(&model, quantize(4, 64), &temporary.path().join("out")).unwrap();
    assert_eq!(written.tensor("empty.weight").unwrap().shape, [1 << 60, 0]);
    assert_eq!(written.tensor("scalar").unwrap().dtype, Dtype::BF16);
}

#[test]
fn a_refusal_keeps_what_an_earlier_run_did() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    // The second tensor has the NaN; the first fills the first rounds of one thread.
    let mut last = vec![0.5f32; 64];
    last[5] = f32::NAN;
    let rows = 20 << 14;
    write_checkpoint(
        &source,
        LLAMA,
        &[
            ("embed_tokens.weight", Dtype::BF16, vec![rows, 64], vec![0; rows * 128]),
            ("lm_head.weight", Dtype::BF16, vec![1, 64], bf16_bytes(last)),
        ],
    );
    // Natural order puts lm_head behind embed_tokens.
    let model = open_path(&source).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(2, 64)).unwrap();
    let target = temporary.path().join("out");
    let partial = temporary.path().join(".out.partial");
    let stopped = convert(&model, &plan, &target, 1, &StopAfter(AtomicUsize::new(2)));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(matches!(convert(&model, &plan, &target, 1, &Silent), Err(Error::NonFinite { element: 5, .. })));
    assert!(partial.is_dir(), "a resumed run is kept");
    std::fs::remove_dir_all(&partial).unwrap();
    assert!(matches!(convert(&model, &plan, &target, 1, &Silent), Err(Error::NonFinite { element: 5, .. })));
    assert!(!partial.exists(), "a fresh one leaves nothing");
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
