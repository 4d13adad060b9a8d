//! Sources and settings that are refused, and that a refusal leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use common::{LLAMA, PLAIN, bf16_bytes, convert_to, open_path, quantize, write_checkpoint};
use mlx_format::{Dtype, FloatType};
use mlx_quant::model::SourceError;
use mlx_quant::plan::PlanError;
use mlx_quant::{Error, Plan, Settings, Silent, convert};

#[test]
fn weights_that_are_no_numbers_are_refused_by_name_and_leave_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let mut values = vec![0.5f32; 64 * 64];
    values[777] = f32::NAN;
    write_checkpoint(
        &source,
        PLAIN,
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
    write_checkpoint(&source, PLAIN, &[("lm_head.weight", Dtype::F32, vec![1, 64], wide)]);
    let model = open_path(&source).unwrap();
    for settings in [quantize(4, 64), Settings::default()] {
        let refused = convert_to(&model, settings, &temporary.path().join("out")).unwrap_err();
        assert!(matches!(refused, Error::Overflow { element: 0, dtype: "bfloat16", .. }), "{refused}");
    }

    values[777] = 1e6;
    write_checkpoint(&source, PLAIN, &[("lm_head.weight", Dtype::BF16, vec![64, 64], bf16_bytes(values))]);
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
    assert!(matches!(plan(PLAIN, &[head()], quantize(4, 64)), Err(PlanError::NothingDivides { .. })));
    assert!(plan(PLAIN, &[head()], quantize(4, 32)).is_ok());
    let both = Settings { dequantize: true, ..quantize(4, 32) };
    assert!(matches!(plan(PLAIN, &[head()], both), Err(PlanError::Both)));
    let decode = Settings { dequantize: true, ..Settings::default() };
    assert!(matches!(plan(PLAIN, &[head()], decode), Err(PlanError::NotQuantized)));
    let awq =
        format!("{}, \"quantization_config\": {{\"quant_method\": \"awq\"}}}}", PLAIN.trim_end_matches('}'));
    assert!(matches!(
        plan(&awq, &[head(), ("a.qweight", Dtype::I32, vec![2, 2], vec![0; 16])], quantize(4, 32)),
        Err(PlanError::Source(SourceError::PackedForm { .. }))
    ));
    assert!(matches!(plan("{}", &[head()], quantize(4, 32)), Err(PlanError::Source(SourceError::Config(_)))));

    let moe = LLAMA.replace("llama", "qwen3_moe");
    let expert = |name, columns| weight(name, 4, columns);
    let missing = [
        expert("model.layers.0.mlp.experts.0.up_proj.weight", 64),
        expert("model.layers.0.mlp.experts.2.up_proj.weight", 64),
    ];
    assert!(matches!(
        plan(&moe, &missing, quantize(4, 64)),
        Err(PlanError::Source(SourceError::MissingExpert { missing: 1, .. }))
    ));
    let unequal = [
        expert("model.layers.0.mlp.experts.0.up_proj.weight", 64),
        expert("model.layers.0.mlp.experts.1.up_proj.weight", 128),
    ];
    assert!(matches!(
        plan(&moe, &unequal, quantize(4, 64)),
        Err(PlanError::Source(SourceError::UnequalExperts { odd: 1, .. }))
    ));

    // Heads that do not divide the rows of a fused projection.
    let v3 = r#"{"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_attention_heads": 3, "qk_nope_head_dim": 8, "v_head_dim": 8}"#;
    let kv = [weight("model.layers.0.self_attn.kv_b_proj.weight", 64, 64)];
    assert!(matches!(plan(v3, &kv, quantize(4, 64)), Err(PlanError::Source(SourceError::Shape { .. }))));
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
    assert!(matches!(
        plan(&two_layers, &[first]),
        Err(PlanError::Source(SourceError::MissingLayer { missing: 1, layers: 2 }))
    ));
    let huge = LLAMA.replace("\"num_hidden_layers\": 0", "\"num_hidden_layers\": 2147483647");
    assert!(matches!(
        plan(&huge, &[first]),
        Err(PlanError::Source(SourceError::MissingLayer { missing: 1, .. }))
    ));
    let gemma = huge.replace("llama", "gemma4_text");
    assert!(matches!(plan(&gemma, &[first]), Err(PlanError::Source(SourceError::MissingLayer { .. }))));
    // A tensor that no llama has, such as experts in a form that mlx-lm does not know.
    for stray in ["model.experts.gate_up_proj", "model.some_2d_norm.weight"] {
        let refused = plan(LLAMA, &[stray]).unwrap_err();
        let PlanError::Source(SourceError::Misfits { misfits, .. }) = &refused else { panic!("{refused}") };
        assert!(misfits.0.iter().any(|misfit| misfit.tensor == stray), "{refused}");
        assert!(misfits.0.iter().any(|misfit| misfit.tensor == "lm_head.weight"), "{refused}");
    }

    std::fs::rename(source.join("model.safetensors"), source.join("model-00001-of-00002.safetensors"))
        .unwrap();
    let model = open_path(&source).unwrap();
    let refused = Plan::new(&model.checkpoint, &model.config, quantize(4, 64));
    assert!(matches!(
        refused,
        Err(PlanError::Source(SourceError::MissingShards { found: 1, expected: 2, .. }))
    ));
}

#[test]
fn damaged_packed_layers_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let source = temporary.path().join("source");
    let config =
        format!("{}, \"quantization\": {{\"group_size\": 64, \"bits\": 4}}}}", PLAIN.trim_end_matches('}'));
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
            matches!(
                refused,
                Err(PlanError::Source(SourceError::Packed { .. } | SourceError::UnclearScheme { .. }))
            ),
            "{context}"
        );
    }

    // Old MLX models of DeepSeek V3 hold kv_b_proj packed: splitting packed words would be nonsense.
    let v3 = r#"{"model_type": "deepseek_v3", "num_hidden_layers": 0, "num_attention_heads": 2, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "quantization": {"group_size": 64, "bits": 4}}"#;
    let kv = ("model.layers.0.self_attn.kv_b_proj.weight", Dtype::U32, vec![32, 8], vec![0; 32 * 8 * 4]);
    write_checkpoint(&source, &v3.replace("layers\": 0", "layers\": 1"), &[kv]);
    let model = open_path(&source).unwrap();
    assert!(matches!(
        Plan::new(&model.checkpoint, &model.config, decode),
        Err(PlanError::Source(SourceError::Shape { .. }))
    ));
}
