//! Forms that others make and that are read: one bit, and experts whose nvfp4 scales are spread over one number each.

use mlx_quant_engine::cpu;

use super::*;

/// Bytes that look random.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    (0..count).map(|_| next()).collect()
}

fn place(header: &Value, name: &str) -> std::ops::Range<usize> {
    let offset = |at: usize| header[name]["data_offsets"][at].as_u64().unwrap() as usize;
    offset(0)..offset(1)
}

fn decoded(model: &Model, name: &str) -> Vec<f32> {
    let weights = model.weights().unwrap();
    let parameters = weights.load(name, &cpu()).unwrap();
    parameters.tensor(name).unwrap().to_vec().unwrap()
}

/// Codes, scales and biases that nobody's rounding made, against a reference that reads one bit after the other.
#[test]
fn one_bit_decodes_as_mlx_has_it() {
    let layer = "model.layers.1.mlp.down_proj";
    for (group, entry) in [(32, true), (64, true), (128, true), (128, false)] {
        let source = zoo("llama_tied");
        let converted = converted(&source, quantize(1, group));
        let (mut codes, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        edit_weights(&converted.path, |header, data| {
            let number = |at: usize| half::bf16::from_f32((at % 37) as f32 / 16.0 - 1.0).to_le_bytes();
            for (leaf, kept) in [("weight", &mut codes), ("scales", &mut scales), ("biases", &mut biases)] {
                let place = place(header, &format!("{layer}.{leaf}"));
                let made = match leaf {
                    "weight" => bytes(place.len(), 5),
                    "scales" => (0..place.len() / 2).flat_map(|at| number(at * 5 + 3)).collect(),
                    _ => (0..place.len() / 2).flat_map(|at| number(at * 11 + 1)).collect(),
                };
                data[place].copy_from_slice(&made);
                *kept = made;
            }
        });
        if !entry {
            // Another tool's shared object that says nothing true of the layers: shapes and widths tell.
            let file = converted.path.join("config.json");
            let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            for key in ["quantization", "quantization_config"] {
                config[key] = serde_json::json!({"group_size": 64, "bits": 4});
            }
            std::fs::write(&file, config.to_string()).unwrap();
        }
        let model = open_path(&converted.path).unwrap();
        let number =
            |bytes: &[u8], at: usize| half::bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32();
        let found = decoded(&model, &format!("{layer}.weight"));
        assert_eq!(found.len(), codes.len() * 8);
        for (at, found) in found.iter().enumerate() {
            let bit = f32::from(codes[at / 8] >> (at % 8) & 1);
            let expected = bit * number(&scales, at / group) + number(&biases, at / group);
            assert_eq!(*found, expected, "{group} {at}");
        }
        let inspection = mlx_quant::inspect::inspect(&model).unwrap();
        let own = inspection.layers.iter().find(|own| own.path == layer).unwrap();
        let packing = own.packing.as_ref().unwrap();
        assert_eq!((packing.bits, packing.group_size), (1, group));
        let windows = windows(&model, 24, 3);
        let quality =
            evaluate(&model, Some(&source), &windows, &EvaluationSettings::default(), &Silent).unwrap();
        assert!(quality.total.against.unwrap().kl_mean > 0.0);
    }
}

/// A model's experts with a number for each, as `mlx_lm.convert --q-mode nvfp4` with `global_scale` writes them.
#[test]
fn experts_with_global_scales_decode_as_mlx_has_it() {
    let scheme = Scheme::new(Mode::Nvfp4, None, None).unwrap();
    let source = zoo("qwen3_moe");
    let converted = converted(&source, Settings { quantize: Some(scheme), ..Settings::default() });
    let layer = "model.layers.1.mlp.switch_mlp.down_proj";
    let (mut words, mut scales, mut shape) = (Vec::new(), Vec::new(), Vec::new());
    let global = |expert: usize| 0.125 * (expert as f32 + 1.5);
    let file = converted.path.join("model.safetensors");
    edit_weights(&converted.path, |header, data| {
        for (leaf, kept) in [("weight", &mut words), ("scales", &mut scales)] {
            let place = place(header, &format!("{layer}.{leaf}"));
            // Scales of e4m3 that are no NaN.
            let made: Vec<u8> = bytes(place.len(), 9).iter().map(|byte| byte & 0x7E).collect();
            data[place].copy_from_slice(&made);
            *kept = made;
        }
        shape = header[format!("{layer}.weight")]["shape"].as_array().unwrap().clone();
        let end = data.len();
        let experts = shape[0].as_u64().unwrap() as usize;
        header[format!("{layer}.global_scale")] =
            serde_json::json!({"dtype": "F32", "shape": [experts], "data_offsets": [end, end + experts * 4]});
    });
    let dims: Vec<usize> = shape.iter().map(|axis| axis.as_u64().unwrap() as usize).collect();
    let (experts, rows, columns) = (dims[0], dims[1], dims[2] * 8);
    let mut all = std::fs::read(&file).unwrap();
    all.extend((0..experts).flat_map(|expert| global(expert).to_le_bytes()));
    std::fs::write(&file, all).unwrap();
    let index = converted.path.join("model.safetensors.index.json");
    let mut listed: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    listed["weight_map"][format!("{layer}.global_scale")] = "model.safetensors".into();
    std::fs::write(&index, listed.to_string()).unwrap();
    let model = open_path(&converted.path).unwrap();
    let found = decoded(&model, &format!("{layer}.weight"));
    assert_eq!(found.len(), experts * rows * columns);
    for (at, found) in found.iter().enumerate() {
        let code = words[at / 2] >> (4 * (at % 2)) & 15;
        let element = mlx_format::fp::E2M1[code as usize];
        let scale = mlx_format::fp::e4m3_decode(scales[at / 16]);
        let expected = element * (scale * (global(at / (rows * columns)) / 2688.0));
        assert_eq!(*found, expected, "{at}");
    }
    let windows = windows(&model, 24, 3);
    evaluate(&model, None, &windows, &EvaluationSettings::default(), &Silent).unwrap();
    let inspection = mlx_quant::inspect::inspect(&model).unwrap();
    assert!(inspection.layers.iter().all(|own| !own.path.ends_with("global_scale")));
    // Carried along as it is, and not decoded without it.
    let copy = converted_with_globals(&model);
    assert_eq!(decoded(&copy.model, &format!("{layer}.weight")), found);
    let decode = Settings { dequantize: true, ..Settings::default() };
    let error = convert_to(&model, decode, &converted.directory.path().join("decoded")).unwrap_err();
    assert!(error.to_string().contains(layer) && error.is_refusal(), "{error}");
    // Of another shape it belongs to nothing.
    edit_weights(&converted.path, |header, _| {
        let own = &mut header[format!("{layer}.global_scale")];
        own["shape"] = serde_json::json!([experts / 2, 2]);
    });
    let model = open_path(&converted.path).unwrap();
    let error = refused(&model, None, &windows).to_string();
    assert!(error.contains("global_scale"), "{error}");
}

fn converted_with_globals(model: &Model) -> Converted {
    converted(model, Settings { dtype: Some(mlx_format::FloatType::Bf16), ..Settings::default() })
}

/// Experts written with a `global_scale` hold what `mx.quantize` gives with the largest magnitude of each, and only they do.
#[test]
fn experts_are_written_with_global_scales() {
    let source = zoo("qwen3_moe");
    let scheme = Scheme::new(Mode::Nvfp4, None, None).unwrap();
    let settings = || Settings { quantize: Some(scheme), ..Settings::default() };
    let spread = converted(&source, Settings { global_scale: true, ..settings() });
    let plain = converted(&source, settings());
    let config: Value =
        serde_json::from_slice(&std::fs::read(spread.path.join("config.json")).unwrap()).unwrap();
    let tensors = spread.checkpoint.tensors();
    let mut layers = 0;
    for (name, tensor) in tensors {
        let Some(path) = name.strip_suffix(".weight") else { continue };
        let global = tensors.get(&format!("{path}.global_scale"));
        let entry = &config["quantization"][path];
        assert_eq!(global.is_some(), path.contains(".switch_mlp."), "{path}");
        let Some(global) = global else {
            assert!(entry["global_scale"].is_null(), "{path}: {entry}");
            assert_eq!(
                spread.checkpoint.bytes(tensor),
                plain.checkpoint.bytes(&plain.checkpoint.tensors()[name])
            );
            continue;
        };
        let expected =
            serde_json::json!({"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": true});
        assert_eq!(*entry, expected, "{path}");
        let (experts, rows) = (tensor.shape[0], tensor.shape[1]);
        assert_eq!((global.dtype, &global.shape[..]), (Dtype::F32, &[experts][..]));
        let weights = decoded(&source, name);
        let size = weights.len() / experts;
        let numbers = spread.checkpoint.bytes(global).chunks_exact(4);
        let [words, scales] =
            [tensor, &tensors[&format!("{path}.scales")]].map(|one| spread.checkpoint.bytes(one));
        for (expert, number) in numbers.enumerate() {
            let own = &weights[expert * size..][..size];
            let most = own.iter().fold(0f32, |most, value| most.max(value.abs()));
            assert_eq!(number, most.to_le_bytes(), "{path}, expert {expert}");
            let (mut weight, mut bytes) = (vec![0; size / 2], vec![0; size / 16]);
            let out = mlx_format::PackedMut { weight: &mut weight, scales: &mut bytes, biases: &mut [] };
            let values = common::bf16_bytes(own.iter().copied());
            let float = mlx_format::FloatType::Bf16;
            mlx_format::fp::quantize_reference(Mode::Nvfp4, float, &values, out, Some(most));
            assert!(
                weight == words[expert * size / 2..][..size / 2],
                "{path}, expert {expert} of {rows} rows"
            );
            assert!(bytes == scales[expert * size / 16..][..size / 16], "{path}, expert {expert}");
        }
        let error = |model: &Model| {
            let found = decoded(model, name);
            found.iter().zip(&weights).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
        };
        assert!(error(&spread) < 1.1 * error(&plain), "{path}: {} {}", error(&spread), error(&plain));
        layers += 1;
    }
    assert_eq!(layers, 3 * 2);
    let verification = mlx_quant::inspect::verify(&spread, &Silent, 2).unwrap();
    assert_eq!(verification.verdict, mlx_quant::inspect::Verdict::Loads, "{verification:?}");
    let windows = windows(&source, 24, 3);
    let result = evaluate(&spread, Some(&source), &windows, &EvaluationSettings::default(), &Silent).unwrap();
    assert!(result.total.against.unwrap().kl_mean < 0.1);
    // Dense models have nothing that could have one, and neither has another mode.
    for (model, quantize) in [(zoo("llama_tied"), scheme), (source, Scheme::affine(4, 32).unwrap())] {
        let settings = Settings { quantize: Some(quantize), global_scale: true, ..Settings::default() };
        let error = convert_to(&model, settings, &spread.directory.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("global_scale") && error.is_refusal(), "{error}");
    }
}
