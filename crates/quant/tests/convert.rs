//! What the zoo's listings do not show: threads, resuming, recipe files, decoding, fp8 sources, bad weights.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

#[cfg(feature = "demo")]
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{PLAIN, bf16_bytes, convert_to, fixtures, open_path, quantize, sha256, write_checkpoint};
use half::bf16;
use mlx_format::checkpoint::{Checkpoint, Directory, WriteError};
use mlx_format::{Dtype, FloatType, Mode, Scheme};
use mlx_quant::model::SourceError;
use mlx_quant::plan::{Overrides, PlanError};
use mlx_quant::{Error, Event, Model, Observer, Plan, Settings, Silent, convert};
use serde_json::Value;

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
    assert!(matches!(refused, Error::Write(WriteError::OtherRun { .. })) && refused.is_refusal());

    let observer = Resumed::default();
    convert(&model, &plan, &resumed, 1, &observer).unwrap();
    assert!(observer.0.load(Ordering::SeqCst) > 0, "the second run starts where the first stopped");
    assert_eq!(directory_hash(&whole), directory_hash(&resumed));
    assert!(!temporary.path().join(".resumed.partial").exists());
}

#[test]
fn every_item_is_found_by_its_path() {
    let model = moe();
    let plan = Plan::new(&model.checkpoint, &model.config, quantize(4, 64)).unwrap();
    for (index, item) in plan.items.iter().enumerate() {
        let id = plan.by_path(&item.name).unwrap();
        assert_eq!(id.index(), index);
        assert_eq!(plan.item(id), item);
    }
    assert_eq!(plan.by_path("model.layers.0"), None);
    let prefix = "model.layers.1.";
    let below: Vec<usize> = plan.below(prefix).into_iter().map(mlx_quant::plan::TensorId::index).collect();
    let scanned: Vec<usize> =
        (0..plan.items.len()).filter(|index| plan.items[*index].name.starts_with(prefix)).collect();
    assert!(scanned.len() > 3, "{scanned:?}");
    assert_eq!(below, scanned);
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
    write_checkpoint(&source, PLAIN, &[("lm_head.weight", Dtype::BF16, vec![64, 64], bf16_bytes(grid))]);
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
fn one_is_added_to_norms_in_the_dtype_of_the_file() {
    let temporary = tempfile::tempdir().unwrap();
    let model = open_path(&fixtures().join("zoo/qwen3_5")).unwrap();
    let settings = Settings { dtype: Some(FloatType::F32), ..Settings::default() };
    let written = convert_to(&model, settings, &temporary.path().join("out")).unwrap();
    let read = |checkpoint: &Checkpoint, name: &str| {
        let tensor = checkpoint.tensor(name).unwrap();
        let mut values = vec![0f32; tensor.elements()];
        FloatType::from_dtype(tensor.dtype).unwrap().widen(checkpoint.bytes(tensor), &mut values);
        values
    };
    let source = read(&model.checkpoint, "model.language_model.norm.weight");
    let expected: Vec<f32> = source.iter().map(|w| bf16::from_f32(w + 1.0).to_f32()).collect();
    assert!(source.iter().zip(&expected).any(|(w, e)| w + 1.0 != *e), "some sums need rounding");
    assert_eq!(read(&written, "language_model.model.norm.weight"), expected);
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
        format!("{}{}}}", PLAIN.trim_end_matches('}'), if fp8 { quantization } else { "" })
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
        Err(PlanError::Source(SourceError::Fp8 { .. }))
    ));
}

#[test]
fn empty_and_scalar_tensors_are_carried_along() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let weight = bf16_bytes((0..64).map(|i| i as f32));
    write_checkpoint(
        &source,
        PLAIN,
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
        PLAIN,
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

/// What no window of text reaches keeps 8 bits where a calibrated method asks for it, and is as mlx-lm has it elsewhere.
#[test]
fn indexers_keep_their_bits_where_text_decides() {
    let seeded = common::seeds::seeded();
    for name in ["deepseek_v32", "glm_moe_dsa"] {
        let model = open_path(&seeded.path().join(name)).unwrap();
        let plan = |keep_unreached, bits| {
            let settings = Settings { keep_unreached, ..quantize(bits, 32) };
            Plan::new(&model.checkpoint, &model.config, settings).unwrap()
        };
        let scheme = |plan: &Plan, path: &str| match &plan.item(plan.by_path(path).unwrap()).job {
            mlx_quant::plan::Job::Quantize { scheme, .. } => *scheme,
            other => panic!("{path}: {other:?}"),
        };
        let (usual, kept) = (plan(false, 4), plan(true, 4));
        let entries = |plan: &Plan| plan.config.0["quantization"].as_object().unwrap().clone();
        for linear in ["wq_b", "wk", "weights_proj"] {
            let path = format!("model.layers.1.self_attn.indexer.{linear}");
            assert_eq!(scheme(&usual, &path), Scheme::affine(4, 32).unwrap(), "{path}");
            assert_eq!(scheme(&kept, &path), Scheme::affine(8, 32).unwrap(), "{path}");
            assert!(!entries(&usual).contains_key(&path));
            assert_eq!(entries(&kept)[&path]["bits"], 8, "{path}");
            assert_eq!(entries(&kept)[&path]["group_size"], 32, "{path}");
        }
        let other = "model.layers.1.self_attn.o_proj";
        assert_eq!(scheme(&kept, other), scheme(&usual, other));
        // At 8 bits nothing has to be said.
        assert_eq!(entries(&plan(true, 8)), entries(&plan(false, 8)));
    }
}

/// A layer behind the last one is a head that predicts later tokens: it is left out, and said to be.
#[test]
fn prediction_heads_are_left_out_and_said() {
    let seeded = common::seeds::seeded();
    let directory = seeded.path().join("deepseek_v32");
    let source = open_path(&directory).unwrap();
    let held = |name: &str| source.checkpoint.bytes(source.checkpoint.tensor(name).unwrap()).to_vec();
    let mut tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = source
        .checkpoint
        .tensors()
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.dtype, tensor.shape.clone(), held(name)))
        .collect();
    let plan = |model: &Model| Plan::new(&model.checkpoint, &model.config, quantize(4, 32)).unwrap();
    let says = |plan: &Plan| plan.notes.iter().any(|note| note.contains("multi-token-prediction"));
    let without = plan(&source);
    assert_eq!((without.prediction_heads, says(&without)), (0, false));
    assert!(!mlx_quant::card::model_card(&without, &source).contains("multi-token-prediction"));
    tensors.push(("model.layers.3.eh_proj.weight", Dtype::BF16, vec![64, 128], vec![0; 2 * 64 * 128]));
    tensors.push(("model.layers.3.enorm.weight", Dtype::BF16, vec![64], vec![0; 2 * 64]));
    let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
    let more = seeded.path().join("with_head");
    write_checkpoint(&more, &config, &tensors);
    let model = open_path(&more).unwrap();
    let with = plan(&model);
    assert_eq!((with.prediction_heads, says(&with)), (2, true), "{:?}", with.notes);
    assert_eq!(with.items.len(), without.items.len());
    assert!(mlx_quant::card::model_card(&with, &model).contains("head (2 tensors) is left out"));
}

/// Without data the search is careful at 3 bits where inputs may be far louder than weights tell: grids of q, k, v and down,
/// of experts too, hold zero as plain rounding's do. It is not elsewhere, and not at other widths.
#[test]
fn a_search_without_data_is_careful_at_three_bits() {
    let demo = mlx_quant::open(&mlx_quant::demo()).unwrap();
    let moe = open_path(&common::fixtures().join("demo-moe")).unwrap();
    for (model, bits) in [(&demo, 3), (&demo, 4), (&moe, 3)] {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings { search: true, ..quantize(bits, 64) };
        let made = convert_to(model, settings, &directory.path().join("model")).unwrap();
        let numbers = |name: String| -> Vec<f32> {
            let bytes = made.bytes(&made.tensors()[&name]).chunks_exact(2);
            bytes.map(|bytes| half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()).collect()
        };
        let mut seen = [0, 0];
        let paths = made.tensors().keys().filter_map(|name| name.strip_suffix(".scales"));
        // Routers have 8 bits.
        for path in paths.filter(|path| !path.ends_with(".mlp.gate")) {
            let [scales, biases] = ["scales", "biases"].map(|leaf| numbers(format!("{path}.{leaf}")));
            let holds_zero = scales.iter().zip(&biases).all(|(scale, bias)| {
                let code = (-bias / scale).round();
                // Up to the rounding of the scale to bfloat16.
                (code * scale + bias).abs() <= bias.abs() / 128.0
            });
            let loud = ["q_proj", "k_proj", "v_proj", "down_proj"].iter().any(|end| path.ends_with(end));
            assert_eq!(holds_zero, loud && bits == 3, "{path}, {bits} bits");
            seen[usize::from(loud)] += 1;
        }
        assert!(seen[0] > 5 && seen[1] > 5, "{seen:?}");
    }
}
