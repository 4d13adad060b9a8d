//! A whole model directory from bytes: config.json, a safetensors header, then data. Opening, planning and
//! converting it ends in a model or an error; what is written opens again.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mlx_format::checkpoint::{Checkpoint, Directory};
use mlx_format::{FloatType, Mode, Scheme};
use mlx_quant::{Plan, Settings, Silent, convert, open};

static WORK: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = PathBuf::from("/dev/shm");
    let base = if shm.is_dir() { shm } else { std::env::temp_dir() };
    let work = base.join(format!("mlx-quant-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(work.join("model")).expect("a work directory");
    work
});

/// Largest data part and output that are tried.
const MAX_BYTES: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    // The first newline ends config.json, the second the header.
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
    let model_path = WORK.join("model");
    std::fs::write(model_path.join("config.json"), config).expect("written");
    std::fs::write(model_path.join("model.safetensors"), file).expect("written");
    let Ok(model) = Directory::open(&model_path).map_err(mlx_quant::Error::from).and_then(|d| open(&d)) else { return };
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
        let target = WORK.join("out");
        if convert(&model, &plan, &target, 1, &Silent).is_ok() {
            let written = Directory::open(&target).expect("the output is a directory");
            Checkpoint::open(written).expect("what is written opens");
            std::fs::remove_dir_all(&target).expect("removed");
        } else {
            let _ = std::fs::remove_dir_all(WORK.join(".out.partial"));
        }
    }
});
