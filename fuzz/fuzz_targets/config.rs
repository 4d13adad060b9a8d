//! Any bytes as config.json: no panic; what is read is written and read again as the same; and planning a
//! checkpoint with it ends in a plan or an error, for every model type.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mlx_format::checkpoint::{Checkpoint, Config, Directory};
use mlx_format::{Mode, Scheme};
use mlx_quant::{MixedRecipe, Plan, Settings};

/// Names that the rules of some family act on; 64 by 64 bytes of bfloat16 each.
const NAMES: &[&str] = &[
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.experts.0.down_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.1.block_sparse_moe.experts.0.w1.weight",
    "model.layers.1.linear_attn.conv1d.weight",
    "h.0.attn.c_attn.weight",
    "lm_head.weight",
];

static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(|| {
    let mut entries = Vec::new();
    for (index, name) in NAMES.iter().enumerate() {
        let (start, end) = (index * 8192, index * 8192 + 8192);
        entries.push(format!(r#""{name}":{{"dtype":"BF16","shape":[64,64],"data_offsets":[{start},{end}]}}"#));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + NAMES.len() * 8192, 0);
    let files: &'static [(&'static str, &'static [u8])] =
        Vec::leak(vec![("model.safetensors", &*Vec::leak(file))]);
    Checkpoint::open(Directory::Embedded { name: "fuzz", files }).expect("the checkpoint is valid")
});

fuzz_target!(|bytes: &[u8]| {
    let Ok(config) = Config::parse(bytes) else { return };
    let written = config.to_mlx_json();
    let again = Config::parse(written.as_bytes()).expect("what is written can be read");
    assert_eq!(again.to_mlx_json(), written);
    let scheme = Scheme::new(Mode::Affine, None, None).ok();
    for settings in [
        Settings { quantize: scheme, ..Settings::default() },
        Settings { quantize: scheme, mixed: Some(MixedRecipe::Mixed4_6), ..Settings::default() },
        Settings { dequantize: true, ..Settings::default() },
    ] {
        if let Ok(plan) = Plan::new(&CHECKPOINT, &config, settings) {
            let _ = plan.report();
        }
    }
});
