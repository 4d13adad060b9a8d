//! Files of weights, their index, config.json, and all of them as a model.

use std::path::{Component, Path};
use std::sync::LazyLock;

use mlx_format::checkpoint::{Checkpoint, Config, Directory, HeaderTensor, parse_header, parse_index};
use mlx_format::{FloatType, Mode, Scheme};
use mlx_quant::plan::MixedRecipe;
use mlx_quant::{Plan, Settings, Silent, convert, open};

use crate::work::{work, write};

/// A safetensors file, and the JSON of one. What is accepted lies within the file without overlap.
///
/// # Panics
/// If it does not.
pub fn header(bytes: &[u8]) {
    // Also as a header of the right length, so that the JSON behind it is reached.
    let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(&[0; 64]);
    for file in [bytes, &framed] {
        if let Ok(tensors) = parse_header(file) {
            let mut end = 0;
            for HeaderTensor { dtype, shape, range, .. } in tensors {
                assert!(range.start >= end && range.end <= file.len());
                assert_eq!(range.len() * 8, shape.iter().product::<usize>() * dtype.bitsize());
                end = range.end;
            }
        }
    }
}

/// An index of shards. No name of a shard leads out of the directory.
///
/// # Panics
/// If one does.
pub fn index(bytes: &[u8]) {
    if let Ok(map) = parse_index(bytes, "index") {
        for shard in map.values() {
            let components: Vec<Component<'_>> = Path::new(shard).components().collect();
            assert!(matches!(components[..], [Component::Normal(_)]), "{shard:?}");
        }
    }
}

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

/// Square matrices of those names, all zeros.
pub(crate) static MATRICES: LazyLock<Checkpoint> = LazyLock::new(|| {
    let mut entries = Vec::new();
    for (index, name) in NAMES.iter().enumerate() {
        let (start, end) = (index * 8192, index * 8192 + 8192);
        entries
            .push(format!(r#""{name}":{{"dtype":"BF16","shape":[64,64],"data_offsets":[{start},{end}]}}"#));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + NAMES.len() * 8192, 0);
    let files: &'static [(&'static str, &'static [u8])] =
        Vec::leak(vec![("model.safetensors", &*Vec::leak(file))]);
    Checkpoint::open(Directory::Embedded { name: "fuzz", files }).expect("the checkpoint is valid")
});

/// A config.json. What is read is written and read again as the same; planning a checkpoint with it ends in a plan or an error, for
/// every model type.
///
/// # Panics
/// If what was written is read as something else.
pub fn config(bytes: &[u8]) {
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
        if let Ok(plan) = Plan::new(&MATRICES, &config, settings) {
            let _ = plan.report();
        }
    }
}

/// Largest data part and output that are tried.
const MAX_BYTES: usize = 1 << 20;

/// A whole model directory: config.json, a line feed, the header of a safetensors file, a line feed, its data. Converting it
/// ends in a model or an error; what is written opens again.
///
/// # Panics
/// If it does not.
pub fn plan(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |byte| *byte == b'\n');
    let (Some(config), Some(header), Some(data)) = (parts.next(), parts.next(), parts.next()) else { return };
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    // The data repeats until the header's last offset, so that small inputs reach real work.
    let needed = String::from_utf8_lossy(header)
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse::<usize>().ok())
        .filter(|number| *number <= MAX_BYTES)
        .max()
        .unwrap_or(0);
    file.extend(data.iter().copied().chain(std::iter::once(0)).cycle().take(needed));
    write("model/config.json", config);
    write("model/model.safetensors", &file);
    let directory = Directory::open(&work().join("model")).map_err(mlx_quant::Error::from);
    let Ok(model) = directory.and_then(|directory| open(&directory)) else { return };
    let quantize = |mode| Settings { quantize: Scheme::new(mode, None, None).ok(), ..Settings::default() };
    for settings in [
        quantize(Mode::Affine),
        quantize(Mode::Nvfp4),
        Settings { dequantize: true, ..Settings::default() },
        Settings { dtype: Some(FloatType::F16), allow_nonfinite: true, ..Settings::default() },
    ] {
        let Ok(plan) = Plan::new(&model.checkpoint, &model.config, settings) else { continue };
        let _ = plan.report();
        if plan.layout.file_bytes() > MAX_BYTES as u64 * 8 {
            continue;
        }
        let target = work().join("out");
        if convert(&model, &plan, &target, 1, &Silent).is_ok() {
            let written = Directory::open(&target).expect("the output is a directory");
            Checkpoint::open(written).expect("what is written opens");
            std::fs::remove_dir_all(&target).expect("removed");
        } else {
            let _ = std::fs::remove_dir_all(work().join(".out.partial"));
        }
    }
}
